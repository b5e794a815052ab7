"""A resolved engine: nothing in it is "auto", equal on every rank of the replica."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from phalanx.models.spec import DecoderConfig
from phalanx.moe.placement.linear import linear
from phalanx.moe.placement.types import LayerPlacement
from phalanx.parallel.mesh import Coordinate, MeshShape
from phalanx.runtime.expert_config import ExpertConfig
from phalanx.runtime.kv.hashing import root_hash
from phalanx.runtime.kv.spec import KVSpec
from phalanx.runtime.rank_spec import ExpertOrders, RankSpec
from phalanx.runtime.scheduler import SchedulerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """One replica.

    Attributes:
        model_path: a folder, readable by every rank.
        model: what is in it.
        shape: of the mesh.
        stage_layers: half-open layer range per stage.
        device, dtype: "cpu" or "cuda"; a torch dtype name.
        kv: pool of each dp rank.
        prefix_cache: reuse blocks of equal prefixes.
        max_batch_tokens, max_sequences: per step and dp rank.
        num_threads: CPU threads per rank; 0 = torch's choice.
        kernels: op name -> implementation name.
        experts: None for a dense model.
        digest: names this plan; ranks and replicas with another one are refused.
    """

    model_path: str
    model: DecoderConfig
    shape: MeshShape
    stage_layers: tuple[tuple[int, int], ...]
    device: str
    dtype: str
    kv: KVSpec
    prefix_cache: bool = True
    max_batch_tokens: int = 512
    max_sequences: int = 256
    num_threads: int = 0
    kernels: dict[str, str] = field(default_factory=dict)
    experts: ExpertConfig | None = None
    digest: str = ""

    @property
    def max_in_flight(self) -> int:
        """Steps the engine plans ahead: one per stage, or one beyond the running one.

        A single CPU rank runs a step inside `submit`: planning ahead would only add a wasted token to every finish.
        """
        if self.shape.pp > 1:
            return self.shape.pp
        return 1 if self.device == "cpu" and self.shape.world_size == 1 else 2

    @property
    def scheduler(self) -> SchedulerConfig:
        """The scheduler's part."""
        return SchedulerConfig(
            max_batch_tokens=self.max_batch_tokens,
            max_sequences=self.max_sequences,
            num_domains=self.shape.dp,
            is_pipelined=self.shape.pp > 1,
            max_in_flight=self.max_in_flight,
        )

    def kv_root(self, task: int | None = None) -> bytes:
        """Namespace of all block hashes: whatever changes the contents of a block for equal ids.

        Args:
            task: of the request, in a model with tasks: other experts, other keys and values. None = it has none.
        """
        return root_hash(
            {
                "model": self.model_path,
                "digest": self.digest,
                "dtype": self.dtype,
                "block_size": self.kv.block_size,
                "max_model_len": self.kv.max_model_len,
                **({} if task is None else {"task": task}),
            }
        )

    def initial_placements(self) -> tuple[LayerPlacement, ...]:
        """Of every MoE layer, before any load is known; empty for a dense model."""
        if self.experts is None:
            return ()
        group_size = self.shape.dp * self.shape.tp
        return linear(self.experts.num_experts, group_size, self.experts.slots_per_rank).layers

    def rank_specs(self, store: str, nodes: Sequence[str], interface: str = "") -> list[RankSpec]:
        """Orders for every rank, by rank.

        Args:
            store: the rendezvous address, "" for one rank.
            nodes: name of the node of each rank.
            interface: of collectives; "" = found from the host name.
        """
        specs, placements = [], self.initial_placements()
        for rank in range(self.shape.world_size):
            place = self.shape.coordinate(rank)
            group = [self.shape.rank(place.pp, dp, tp) for dp in range(self.shape.dp) for tp in range(self.shape.tp)]
            orders = self.expert_orders(place.pp, [nodes[member] for member in group], placements)
            specs.append(self.rank_spec(rank, place.dp, place, store, interface, orders))
        return specs

    def expert_orders(
        self, stage: int, nodes: Sequence[str], placements: Sequence[LayerPlacement], generation: int = 0
    ) -> ExpertOrders | None:
        """What the ranks of a stage are told about their expert group; later generations are joined by `Prepare`."""
        experts = self.experts
        if experts is None:
            return None
        return ExpertOrders(
            generation=generation,
            nodes=experts.node_names(nodes),
            placements=[list(placements[layer].physical_to_logical) for layer in experts.layers_of(stage)],
            slots_per_rank=experts.slots_per_rank,
            exact=experts.exact,
            staging_rows=experts.staging_rows,
            joins_later=generation > 0,
            outlives_peers=experts.on_rank_loss == "shrink",
            calibrate=experts.dispatch == "auto" and generation == 0,
            capacity=experts.capacity,
        )

    def rank_spec(
        self, rank: int, unit: int, place: Coordinate, store: str, interface: str, experts: ExpertOrders | None
    ) -> RankSpec:
        """Orders for one rank at a place of the mesh, which may lie beyond `shape.dp`."""
        return RankSpec(
            rank=rank,
            unit=unit,
            pp=self.shape.pp,
            dp=max(self.shape.dp, place.dp + 1),
            tp=self.shape.tp,
            pp_rank=place.pp,
            dp_rank=place.dp,
            tp_rank=place.tp,
            store=store,
            model_path=self.model_path,
            device=self.device,
            dtype=self.dtype,
            stage_layers=list(self.stage_layers),
            block_size=self.kv.block_size,
            num_blocks=self.kv.num_blocks,
            max_model_len=self.kv.max_model_len,
            max_sequences=self.max_sequences,
            max_batch_tokens=self.max_batch_tokens,
            num_threads=self.num_threads,
            choose=self.kernels,
            interface=interface,
            digest=self.digest,
            experts=experts,
        )

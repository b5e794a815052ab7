"""A resolved engine: nothing in it is "auto", equal on every rank of the replica."""

from dataclasses import dataclass, field

from phalanx.models.spec import DecoderConfig
from phalanx.parallel.mesh import MeshShape
from phalanx.runtime.kv.hashing import root_hash
from phalanx.runtime.kv.spec import KVSpec
from phalanx.runtime.rank_spec import RankSpec
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

    @property
    def kv_root(self) -> bytes:
        """Namespace of all block hashes: whatever changes the contents of a block for equal ids."""
        return root_hash(
            {
                "model": self.model_path,
                "digest": self.digest,
                "dtype": self.dtype,
                "block_size": self.kv.block_size,
                "max_model_len": self.kv.max_model_len,
            }
        )

    def rank_specs(self, store: str, interface: str = "") -> list[RankSpec]:
        """Orders for every rank, by rank; `store` is the rendezvous address, "" for one rank."""
        return [
            RankSpec(
                rank=rank,
                pp=self.shape.pp,
                dp=self.shape.dp,
                tp=self.shape.tp,
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
            )
            for rank in range(self.shape.world_size)
        ]

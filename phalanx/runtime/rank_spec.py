"""Everything a rank must be told before its first order: sent once over the rank link."""

import msgspec

from phalanx.moe.spec import CapacitySpec
from phalanx.parallel.mesh import Coordinate, MeshShape
from phalanx.runtime.kv.spec import KVSpec


class ExpertOrders(msgspec.Struct, frozen=True, kw_only=True):
    """A rank's part of the expert group of its stage.

    Attributes:
        generation: of the expert group.
        joins_later: the group is built when `Prepare` says so, because the others still serve without this rank.
        nodes: name of the node of each rank of the group, in rank order (dp_rank * tp + tp_rank).
        placements: physical_to_logical of each MoE layer of the stage.
        slots_per_rank: physical slots of every rank in a layer with as many experts; else one per expert.
        exact: bits of the result depend neither on the placement nor on the dispatcher.
        staging_rows: experts that can arrive at once beside the ones in use.
        outlives_peers: wait for another generation when a peer is lost, instead of failing.
        calibrate: time the fabric at the start, for the choice of the dispatcher.
        capacity: a limit of tokens per expert; None = dropless.
    """

    generation: int
    nodes: list[str]
    placements: list[list[int]]
    slots_per_rank: int
    exact: bool = False
    staging_rows: int = 2
    joins_later: bool = False
    outlives_peers: bool = False
    calibrate: bool = False
    capacity: CapacitySpec | None = None


class RankSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One rank's orders. Nothing in it is "auto".

    Attributes:
        rank: what the rank dials with; never given twice by one engine.
        unit: of pp x tp ranks that come and go together; never given twice.
        pp, dp, tp: sizes of the mesh.
        pp_rank, dp_rank, tp_rank: place in it; the dp rank may change later.
        store: "host:port" of the engine's rendezvous store; "" for one rank.
        device: "cpu" or "cuda".
        dtype: of weights, activations and KV: "float32", "bfloat16" or "float16".
        stage_layers: half-open layer range per stage.
        max_sequences: number of slots.
        num_threads: CPU threads of the rank; 0 = leave torch's choice.
        choose: op name -> implementation name.
        interface: network interface for collectives; "" = found from the host name.
        timeout_s: of a collective.
        digest: of the resolved plan, compared between ranks.
        experts: None for a dense model.
    """

    rank: int
    unit: int
    pp: int
    dp: int
    tp: int
    pp_rank: int
    dp_rank: int
    tp_rank: int
    store: str
    model_path: str
    device: str
    dtype: str
    stage_layers: list[tuple[int, int]]
    block_size: int
    num_blocks: int
    max_model_len: int
    max_sequences: int
    max_batch_tokens: int
    num_threads: int = 0
    choose: dict[str, str] = {}
    interface: str = ""
    timeout_s: float = 30.0
    digest: str = ""
    experts: ExpertOrders | None = None

    @property
    def shape(self) -> MeshShape:
        """Sizes of the mesh."""
        return MeshShape(pp=self.pp, dp=self.dp, tp=self.tp)

    @property
    def place(self) -> Coordinate:
        """Position in the mesh at the start."""
        return Coordinate(pp=self.pp_rank, dp=self.dp_rank, tp=self.tp_rank)

    @property
    def kv(self) -> KVSpec:
        """The KV pool of each domain."""
        return KVSpec(block_size=self.block_size, num_blocks=self.num_blocks, max_model_len=self.max_model_len)


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(RankSpec)


def encode_spec(spec: RankSpec) -> bytes:
    """A spec as bytes; inverse of `decode_spec`."""
    return _encoder.encode(spec)


def decode_spec(data: bytes) -> RankSpec:
    """Parse a spec; raises `msgspec.ValidationError` on anything else."""
    return _decoder.decode(data)

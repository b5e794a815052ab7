"""Everything a rank must be told before its first plan: sent once over the rank link."""

import msgspec

from phalanx.parallel.mesh import MeshShape
from phalanx.runtime.kv.spec import KVSpec


class RankSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One rank's orders. Nothing in it is "auto"; all ranks of a replica get the same but for `rank`.

    Attributes:
        rank, pp, dp, tp: place and sizes of the mesh.
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
    """

    rank: int
    pp: int
    dp: int
    tp: int
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

    @property
    def shape(self) -> MeshShape:
        """Sizes of the mesh."""
        return MeshShape(pp=self.pp, dp=self.dp, tp=self.tp)

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

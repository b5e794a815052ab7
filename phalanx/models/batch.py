"""The input of a model's forward: defined here because the model says what it needs; the worker fills it."""

from dataclasses import dataclass

from torch import Tensor

from phalanx.kernels.types import AttnMeta
from phalanx.moe.group import EpStep


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """T tokens of S sequences of one step, decodes first; a model is a pure function of `(batch, kv)`.

    Attributes:
        token_ids: [T] int32. Only the first stage reads it.
        positions: [T] int32, absolute position of each token in its sequence.
        slot_mapping: [T] int64, flat write index `block * block_size + offset`; -1 = padding, nothing is written.
        meta: [S] lengths, block tables and the host-known maxima.
        sample_rows: [N] int64, rows whose logits are needed, in order. Only the last stage reads it.
        num_tokens: T as a host integer; 0 is legal (a dp rank without work still takes part).
        ep: what mixture-of-experts layers must know; may be None where the expert group is one rank.
    """

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    meta: AttnMeta
    sample_rows: Tensor
    num_tokens: int
    ep: EpStep | None = None

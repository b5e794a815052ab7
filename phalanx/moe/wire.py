"""What travels of a token: one row of bytes with everything a receiver needs, so that a hop is one message per peer.

    | payload: D values, to a multiple of 4 bytes | int32 slots[K] | fp32 weights[K] | zeros to a multiple of 16 bytes |

Slots are physical slots of the whole group: a receiver, and a forwarder, looks nothing up. On the way back only outputs
travel, unpadded, as the payload's type in reduced mode for bf16 and fp16 models, and fp32 for fp32 models. Each place
that reduces (rank, node, source) adds in fp32; against fp64 a bf16 result is then wrong by 1.65e-3 if one rank computes
it all, 2.34e-3 with bf16 rows of several ranks, 2.97e-3 with bf16 rows reduced in the node as well (adding in bf16
throughout: 3.62e-3).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

# Shape suffixes: T tokens, R rows, D hidden, K choices per token, B bytes.

ALIGN_BYTES = 16


class Rows(NamedTuple):
    """Views into wire rows.

    Attributes:
        x_RD: activations; the stride between rows is the wire row's.
        slots_RK: int32 physical slots of the whole group; -1 = none.
        weights_RK: fp32.
    """

    x_RD: Tensor
    slots_RK: Tensor
    weights_RK: Tensor


@dataclass(frozen=True)
class RowLayout:
    """Where things lie in a wire row.

    Attributes:
        hidden_size, dtype: of the payload.
        top_k: slots and weights per row.
    """

    hidden_size: int
    dtype: torch.dtype
    top_k: int

    @cached_property
    def payload_bytes(self) -> int:
        """Of the activations alone."""
        return self.hidden_size * self.dtype.itemsize

    @cached_property
    def slots_at(self) -> int:
        """Byte at which the slots begin. Scales of a quantized payload would lie before it."""
        return -(-self.payload_bytes // 4) * 4

    @cached_property
    def weights_at(self) -> int:
        """Byte at which the weights begin."""
        return self.slots_at + 4 * self.top_k

    @cached_property
    def row_bytes(self) -> int:
        """Of a whole row."""
        return -(-(self.weights_at + 4 * self.top_k) // ALIGN_BYTES) * ALIGN_BYTES

    def pack(self, x_TD: Tensor, slots_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """(T, row_bytes) uint8 rows; the inverse of `views`.

        Args:
            x_TD: (T, hidden_size), dtype.
            slots_TK: (T, top_k) int32.
            weights_TK: (T, top_k) fp32.
        """
        num_rows, byte = x_TD.shape[0], torch.uint8
        parts = [x_TD.view(byte), slots_TK.view(byte), weights_TK.view(byte)]
        if gap := self.slots_at - self.payload_bytes:
            parts.insert(1, parts[0].new_zeros(()).expand(num_rows, gap))
        if tail := self.row_bytes - self.weights_at - 4 * self.top_k:
            parts.append(parts[0].new_zeros(()).expand(num_rows, tail))
        rows_TB = torch.cat(parts, dim=1)
        assert rows_TB.shape[1] == self.row_bytes, f"{[part.shape for part in parts]} do not make {self}"
        return rows_TB

    def views(self, rows_RB: Tensor) -> Rows:
        """The parts of (R, row_bytes) rows, not copied."""
        end = self.weights_at + 4 * self.top_k
        return Rows(
            rows_RB[:, : self.payload_bytes].view(self.dtype),
            self.slots(rows_RB),
            rows_RB[:, self.weights_at : end].view(torch.float32),
        )

    def slots(self, rows_RB: Tensor) -> Tensor:
        """(R, top_k) int32: the part that a forwarder reads."""
        return rows_RB[:, self.slots_at : self.weights_at].view(torch.int32)

"""Experts in plain torch: a loop over the slots that are hit (the oracle of all others), and `F.grouped_mm`."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from phalanx.kernels import memory
from phalanx.kernels.expert_shape import ExpertShape, activate

ALIGN = 64


class PlainRows:
    """Storage of the back ends that take weights as they are: a row is `gate_up | down | biases`, padded to 64 bytes.

    Attributes:
        gate_up: (s, 2I, D) and `down` (s, D, I): views of the rows, contiguous but for the slot's stride.
        gate_up_bias: (s, 2I) and `down_bias` (s, D), or None.
    """

    def __init__(self, shape: ExpertShape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype = shape, dtype
        hidden, inner = shape.hidden_size, shape.intermediate_size
        parts = [(2 * inner, hidden), (hidden, inner), *([(2 * inner,), (hidden,)] if shape.bias else [])]
        starts = [0]
        for part in parts:
            starts.append(starts[-1] + -(-torch.Size(part).numel() * dtype.itemsize // ALIGN) * ALIGN)
        self.rows = memory.empty((shape.num_slots, starts[-1]), torch.uint8, device)
        self.rows.zero_()
        self.gate_up, self.down, *biases = (
            self.rows[:, start : start + torch.Size(part).numel() * dtype.itemsize].view(dtype).unflatten(1, part)
            for start, part in zip(starts, parts, strict=False)
        )
        self.gate_up_bias: Tensor | None = biases[0] if shape.bias else None
        self.down_bias: Tensor | None = biases[1] if shape.bias else None

    def load(
        self,
        slot: int,
        gate_up: Tensor,
        down: Tensor,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> None:
        """See `Experts.load`."""
        self.gate_up[slot].copy_(gate_up)
        self.down[slot].copy_(down)
        for stored, given in ((self.gate_up_bias, gate_up_bias), (self.down_bias, down_bias)):
            if stored is not None and given is not None:
                stored[slot].copy_(given)


class LoopExperts(PlainRows):
    """One `F.linear` pair per slot that is hit, the oracle of the others.

    Which bits a row gets from a product of torch depends on the number of rows and of threads, on Intel and AMD in
    different ways. `batch_invariant` therefore means a product per row by one thread: slow, and right on every machine.
    """

    impl = "loop"

    def __init__(
        self, shape: ExpertShape, dtype: torch.dtype, device: torch.device, *, batch_invariant: bool = False
    ) -> None:
        super().__init__(shape, dtype, device)
        self.batch_invariant = batch_invariant

    def forward(self, x_RD: Tensor, slots_RK: Tensor, weights_RK: Tensor) -> Tensor:
        """See `Experts.forward`."""
        y = x_RD.new_zeros((*slots_RK.shape, x_RD.shape[1]))
        for row, choice, out in self._outputs(x_RD, slots_RK):
            y[row, choice] = out
        return weighted_sum(y, slots_RK, weights_RK)

    def forward_pairs(self, x_RD: Tensor, slots_RK: Tensor) -> Tensor:
        """See `Experts.forward_pairs`."""
        valid = slots_RK >= 0
        pair = valid.flatten().cumsum(0).view_as(slots_RK) - 1
        y = x_RD.new_empty((int(valid.sum()), x_RD.shape[1]))
        for row, choice, out in self._outputs(x_RD, slots_RK):
            y[pair[row, choice]] = out
        return y

    def _outputs(self, x_RD: Tensor, slots_RK: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(rows, choices, their outputs) of one slot after the other."""
        compute = self._one_by_one if self.batch_invariant else self._expert
        for slot in slots_RK.unique().tolist():
            if slot >= 0:
                row, choice = (slots_RK == slot).nonzero(as_tuple=True)
                yield row, choice, compute(x_RD[row], slot)

    def _one_by_one(self, x: Tensor, slot: int) -> Tensor:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            # Cloned: a product may also depend on how its row is aligned in memory.
            return torch.cat([self._expert(row.clone(), slot) for row in x.split(1)])
        finally:
            torch.set_num_threads(threads)

    def _expert(self, x: Tensor, slot: int) -> Tensor:
        bias_in = None if self.gate_up_bias is None else self.gate_up_bias[slot]
        bias_out = None if self.down_bias is None else self.down_bias[slot]
        gate, up = F.linear(x, self.gate_up[slot], bias_in).chunk(2, dim=-1)
        return F.linear(activate(gate, up, self.shape).to(x.dtype), self.down[slot], bias_out)


class GroupedExperts(PlainRows):
    """Two `F.grouped_mm` over the rows sorted by slot; no host synchronisation in `forward` where that has none.

    On CUDA its fast path is bf16 on SM90 and SM100 alone; elsewhere torch loops over the slots itself.
    """

    impl = "grouped_mm"
    batch_invariant = False

    def forward(self, x_RD: Tensor, slots_RK: Tensor, weights_RK: Tensor) -> Tensor:
        """See `Experts.forward`."""
        if slots_RK.numel() == 0:
            return x_RD.new_zeros(x_RD.shape, dtype=torch.float32)
        return weighted_sum(self._pairs(x_RD, slots_RK), slots_RK, weights_RK)

    def forward_pairs(self, x_RD: Tensor, slots_RK: Tensor) -> Tensor:
        """See `Experts.forward_pairs`."""
        if slots_RK.numel() == 0:
            return x_RD[:0]
        return self._pairs(x_RD, slots_RK)[slots_RK >= 0]

    def _pairs(self, x_RD: Tensor, slots_RK: Tensor) -> Tensor:
        """(R, K, D); undefined where the slot is -1."""
        order, slot, ends = sort_pairs(slots_RK, self.shape.num_slots)
        # Rows past the last end, those without a slot, are never written by grouped_mm: they stay what memory held.
        gate_up = F.grouped_mm(x_RD[order // slots_RK.shape[1]], self.gate_up.transpose(-2, -1), offs=ends)
        if self.gate_up_bias is not None:
            gate_up = gate_up + self.gate_up_bias[slot]
        gate, up = gate_up.chunk(2, dim=-1)
        inner = activate(gate, up, self.shape).to(x_RD.dtype)
        out = F.grouped_mm(inner, self.down.transpose(-2, -1), offs=ends)
        if self.down_bias is not None:
            out = out + self.down_bias[slot]
        y = torch.empty_like(out)
        y[order] = out
        return y.view(*slots_RK.shape, -1)


class SortedPairs(NamedTuple):
    """(row, choice) pairs by slot; within a slot by row."""

    order: Tensor
    """(R * K) int64 flat indices `row * K + j`, those without a slot last."""
    slot: Tensor
    """(R * K) int64 slot of each in this order; those without one have the last."""
    ends: Tensor
    """(s) int32, where the pairs of each slot end."""


def sort_pairs(slots_RK: Tensor, num_slots: int) -> SortedPairs:
    """Group the pairs by slot, on the device of `slots_RK` and without a host synchronisation."""
    flat = slots_RK.flatten()
    by_slot, order = torch.where(flat < 0, num_slots, flat).sort(stable=True)
    each = torch.arange(num_slots, device=flat.device, dtype=flat.dtype)
    ends = torch.searchsorted(by_slot, each, right=True, out_int32=True)
    return SortedPairs(order, by_slot.long().clamp(max=num_slots - 1), ends)


def weighted_sum(y_RKD: Tensor, slots_RK: Tensor, weights_RK: Tensor) -> Tensor:
    """Sum of `weight * y` over the choices that have a slot: fp32, ascending j; y of the others may hold anything."""
    out = y_RKD.new_zeros((y_RKD.shape[0], y_RKD.shape[2]), dtype=torch.float32)
    for j in range(y_RKD.shape[1]):
        term = y_RKD[:, j].float() * weights_RK[:, j, None]
        out += torch.where(slots_RK[:, j, None] >= 0, term, 0.0)
    return out


def refuses_grouped(shape: ExpertShape, dtype: torch.dtype) -> str | None:
    """Why `F.grouped_mm` cannot be used, or None."""
    if not hasattr(F, "grouped_mm"):
        return "this torch has no grouped_mm"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{dtype} is not one of fp32, bf16, fp16"
    if shape.num_slots >= 1024:
        return f"{shape.num_slots} slots; it takes at most 1023"
    for name, size in (("hidden", shape.hidden_size), ("inner", shape.intermediate_size)):
        if size * dtype.itemsize % 16:
            return f"its {name} rows ({size} of {dtype}) are not whole 16-byte words"
    return None

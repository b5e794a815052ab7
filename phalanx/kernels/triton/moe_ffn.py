"""Triton experts: pairs sorted into tiles of one slot, two products, a combine; no host synchronisation, no atomics."""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from phalanx.kernels.experts_torch import PlainRows

CHUNK = 1024
COMBINE_BLOCK = 1024


class Tiles(NamedTuple):
    """Sizes of a launch: rows, columns and depth of a tile, tiles per pass over the columns, warps and stages."""

    BM: int
    BN: int
    BK: int
    GROUP: int
    num_warps: int
    num_stages: int


class Alignment(NamedTuple):
    """Pairs `row * K + j` by slot, each slot from a tile of its own on."""

    sorted_pairs: Tensor
    """(num_tiles * BM) int32; R * K in the unused end of a slot's last tile."""
    tile_slot: Tensor
    """(num_tiles) int32; -1 for tiles not used, whose pairs are undefined."""


def refuses(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the Triton experts cannot be used, or None."""
    if device.type != "cuda":
        return f"the weights are on {device.type}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{dtype} is not one of fp32, bf16, fp16"
    try:
        _kernels()
    except ImportError:
        return "triton is not installed"
    return None


def tiles(num_pairs: int, num_slots: int) -> tuple[Tiles, Tiles]:
    """Of gate_up_act and of down, by the mean number of rows per slot; seeds, not yet tuned on a GPU."""
    rows = num_pairs / num_slots
    if rows <= 16:
        return Tiles(16, 64, 128, 1, 4, 4), Tiles(16, 128, 128, 1, 4, 4)
    if rows <= 64:
        return Tiles(64, 64, 64, 4, 4, 4), Tiles(64, 128, 64, 4, 4, 4)
    return Tiles(128, 128, 64, 8, 8, 4), Tiles(128, 256, 64, 8, 8, 4)


def align(slots_RK: Tensor, num_slots: int, block_m: int) -> Alignment:
    """Sort the pairs into tiles of `block_m` rows of one slot, stable; their number is bounded without a look at it."""
    num_pairs = slots_RK.numel()
    num_tiles = min(num_pairs, (num_pairs + num_slots * (block_m - 1)) // block_m)
    sorted_pairs = slots_RK.new_empty(num_tiles * block_m)
    tile_slot = slots_RK.new_empty(num_tiles)
    bins = max(2, 1 << (num_slots - 1).bit_length())
    _kernels().moe_align[(num_slots,)](
        slots_RK, sorted_pairs, tile_slot, num_pairs, num_tiles, BINS=bins, BM=block_m, CHUNK=CHUNK
    )
    return Alignment(sorted_pairs, tile_slot)


class TritonExperts(PlainRows):
    """See `Experts`. Tiles depend on the number of rows, so a row's bits may too."""

    impl = "triton"
    batch_invariant = False

    def forward(self, x_RD: Tensor, slots_RK: Tensor, weights_RK: Tensor) -> Tensor:
        """See `Experts.forward`."""
        out = x_RD.new_empty(x_RD.shape, dtype=torch.float32)
        rows, top_k = slots_RK.shape
        if slots_RK.numel() == 0:
            return out.zero_()
        hidden = self.shape.hidden_size
        slots_RK, weights_RK = slots_RK.contiguous(), weights_RK.contiguous()
        _kernels().combine[(rows, -(-hidden // COMBINE_BLOCK))](
            self._pairs(x_RD, slots_RK), slots_RK, weights_RK, out, HIDDEN=hidden, TOP_K=top_k, BN=COMBINE_BLOCK
        )
        return out

    def forward_pairs(self, x_RD: Tensor, slots_RK: Tensor) -> Tensor:
        """See `Experts.forward_pairs`; waits for the device, since the number of pairs is its size."""
        if slots_RK.numel() == 0:
            return x_RD[:0]
        pairs = self._pairs(x_RD, slots_RK.contiguous())
        return pairs[slots_RK.flatten() >= 0]

    def _pairs(self, x_RD: Tensor, slots_RK: Tensor) -> Tensor:
        """(R * K, D); undefined where the slot is -1."""
        shape, kernels = self.shape, _kernels()
        num_pairs = slots_RK.numel()
        first, second = tiles(num_pairs, shape.num_slots)
        sorted_pairs, tile_slot = align(slots_RK, shape.num_slots, first.BM)
        num_tiles = tile_slot.shape[0]
        inner = x_RD.new_empty((sorted_pairs.shape[0], shape.intermediate_size))
        pairs = x_RD.new_empty((num_pairs, shape.hidden_size))
        sizes = {"HIDDEN": shape.hidden_size, "INNER": shape.intermediate_size, "BIAS": shape.bias}
        common = (sorted_pairs, tile_slot)
        kernels.gate_up_act[(num_tiles * -(-shape.intermediate_size // first.BN),)](
            *(x_RD.contiguous(), self.gate_up, self.gate_up_bias, *common, inner),
            *(num_pairs, num_tiles, self.gate_up.stride(0), shape.alpha, shape.limit),
            **sizes,
            TOP_K=slots_RK.shape[1],
            ACTIVATION=shape.activation,
            **first._asdict(),
        )
        kernels.down[(num_tiles * -(-shape.hidden_size // second.BN),)](
            *(inner, self.down, self.down_bias, *common, pairs, num_pairs, num_tiles, self.down.stride(0)),
            **sizes,
            **second._asdict(),
        )
        return pairs


def _kernels() -> ModuleType:
    """The jit functions; imported late, because Triton may be missing."""
    from phalanx.kernels.triton import _moe_kernels

    return _moe_kernels

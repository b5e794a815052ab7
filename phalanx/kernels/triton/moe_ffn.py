"""Triton experts: pairs sorted into tiles of one slot, two products, a combine; no host synchronisation, no atomics."""

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from phalanx.kernels.expert_shape import ExpertShape
from phalanx.kernels.experts_torch import PlainRows

FEW_PAIRS = 4096
"""Up to so many pairs are sorted by one launch."""
CHUNK = 128
"""Pairs that a program of the other way compares with each other."""
COMBINE_BLOCK = 1024
RESERVED_BYTES = 1024
"""Of a block's shared memory, for barriers and the like."""


class Tiles(NamedTuple):
    """Sizes of a launch: rows, columns and depth of a tile, tiles per pass over the columns, warps and stages."""

    BM: int
    BN: int
    BK: int
    GROUP: int
    num_warps: int
    num_stages: int
    TMA: bool = False
    """Weights come by the bulk copy engine, where the shape allows it."""


class Limit(NamedTuple):
    """What a device gives a block."""

    shared_bytes: int
    has_tma: bool

    @classmethod
    def of(cls, device: torch.device) -> "Limit":
        """Of a device; where kernels are interpreted there is none."""
        if device.type != "cuda":
            return cls(1 << 20, True)
        properties = torch.cuda.get_device_properties(device)
        shared_bytes = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]  # not in the stub
        return cls(shared_bytes, properties.major >= 9)


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
    """Of gate_up_act and of down, by the mean number of rows per slot.

    Tuned in bf16 on an H200: `benchmarks/results/experts_gpu_tuning_h200.jsonl`.
    """
    rows = num_pairs / num_slots
    if rows <= 8:
        return Tiles(16, 64, 128, 1, 4, 3, True), Tiles(16, 128, 128, 1, 4, 3, True)
    if rows <= 24:
        return Tiles(32, 64, 128, 1, 4, 3, True), Tiles(32, 128, 128, 1, 4, 3, True)
    if rows <= 48:
        return Tiles(64, 64, 64, 8, 4, 3, True), Tiles(64, 128, 64, 8, 4, 4, True)
    return Tiles(128, 128, 64, 8, 8, 4, True), Tiles(128, 256, 64, 8, 8, 4, True)


FIXED_TILES = (Tiles(64, 64, 64, 8, 4, 3, True), Tiles(64, 128, 64, 8, 4, 4, True))
"""For rows whose bits must not depend on how many there are."""


def fitted(tile: Tiles, num_weights: int, itemsize: int, limit: Limit) -> Tiles:
    """A tile as wide in bytes as in bf16, with as many buffers as a device has room for.

    Args:
        tile: for 2-byte elements.
        num_weights: matrices of which a block holds BN columns at once.
        itemsize: of the elements, bytes.
        limit: of the device.
    """
    tile = tile._replace(BK=tile.BK * 2 // itemsize, TMA=tile.TMA and limit.has_tma)
    stage_bytes = (tile.BM + num_weights * tile.BN) * tile.BK * itemsize
    return tile._replace(num_stages=max(1, min(tile.num_stages, (limit.shared_bytes - RESERVED_BYTES) // stage_bytes)))


def align(slots_RK: Tensor, num_slots: int, block_m: int) -> Alignment:
    """Sort the pairs into tiles of `block_m` rows of one slot, stable; their number is bounded without a look at it."""
    num_pairs = slots_RK.numel()
    num_tiles = min(num_pairs, (num_pairs + num_slots * (block_m - 1)) // block_m)
    sorted_pairs = slots_RK.new_empty(num_tiles * block_m)
    tile_slot = slots_RK.new_empty(num_tiles)
    bins = max(2, 1 << (num_slots - 1).bit_length())
    if num_pairs <= FEW_PAIRS:
        _kernels().align_few[(num_slots,)](
            slots_RK, sorted_pairs, tile_slot, num_pairs, num_tiles, BINS=bins, BM=block_m, CHUNK=1024
        )
        return Alignment(sorted_pairs, tile_slot)
    num_chunks = -(-num_pairs // CHUNK)
    counts, totals = slots_RK.new_empty((bins, num_chunks)), slots_RK.new_zeros(bins)
    _kernels().count_pairs[(num_chunks,)](
        slots_RK, counts, totals, num_pairs, num_chunks, BINS=bins, CHUNK=CHUNK, num_warps=1
    )
    _kernels().place_slots[(num_slots,)](
        counts, totals, sorted_pairs, tile_slot, num_pairs, num_tiles, num_chunks, BINS=bins, BM=block_m, WIDTH=1024
    )
    _kernels().place_pairs[(num_chunks,)](slots_RK, counts, sorted_pairs, num_pairs, num_chunks, CHUNK=CHUNK)
    return Alignment(sorted_pairs, tile_slot)


def combine(pairs: Tensor, slots_RK: Tensor, weights_RK: Tensor) -> Tensor:
    """Weighted sum of the outputs of the pairs (R * K, D) that have a slot: (R, D) fp32, ascending j."""
    (rows, top_k), hidden = slots_RK.shape, pairs.shape[1]
    out = pairs.new_empty((rows, hidden), dtype=torch.float32)
    _kernels().combine[(rows, -(-hidden // COMBINE_BLOCK))](
        pairs, slots_RK, weights_RK, out, HIDDEN=hidden, TOP_K=top_k, BN=COMBINE_BLOCK
    )
    return out


class TritonExperts(PlainRows):
    """See `Experts`. Tiles follow the number of rows, and bits of rows the tiles: `batch_invariant` fixes them."""

    impl = "triton"

    def __init__(
        self, shape: ExpertShape, dtype: torch.dtype, device: torch.device, *, batch_invariant: bool = False
    ) -> None:
        super().__init__(shape, dtype, device)
        self.batch_invariant = batch_invariant
        self._limit = Limit.of(device)
        self._descriptors: dict[tuple[int, int, int], Any] = {}

    def forward(self, x_RD: Tensor, slots_RK: Tensor, weights_RK: Tensor) -> Tensor:
        """See `Experts.forward`."""
        if slots_RK.numel() == 0:
            return x_RD.new_zeros(x_RD.shape, dtype=torch.float32)
        slots_RK = slots_RK.contiguous()
        return combine(self._pairs(x_RD, slots_RK), slots_RK, weights_RK.contiguous())

    def forward_pairs(self, x_RD: Tensor, slots_RK: Tensor) -> Tensor:
        """See `Experts.forward_pairs`; waits for the device, since the number of pairs is its size."""
        if slots_RK.numel() == 0:
            return x_RD[:0]
        pairs = self._pairs(x_RD, slots_RK.contiguous())
        return pairs[slots_RK.flatten() >= 0]

    def _pairs(self, x_RD: Tensor, slots_RK: Tensor) -> Tensor:
        """(R * K, D); undefined where the slot is -1."""
        num_pairs = slots_RK.numel()
        first, second = self.tiles(num_pairs)
        aligned = align(slots_RK, self.shape.num_slots, first.BM)
        inner = x_RD.new_empty((aligned.sorted_pairs.shape[0], self.shape.intermediate_size))
        pairs = x_RD.new_empty((num_pairs, self.shape.hidden_size))
        self.gate_up_act(x_RD.contiguous(), aligned, inner, num_pairs, slots_RK.shape[1], first)
        self.project_down(inner, aligned, pairs, second)
        return pairs

    def tiles(self, num_pairs: int) -> tuple[Tiles, Tiles]:
        """Of both products for a number of pairs, on this device."""
        first, second = FIXED_TILES if self.batch_invariant else tiles(num_pairs, self.shape.num_slots)
        itemsize = self.dtype.itemsize
        return fitted(first, 2, itemsize, self._limit), fitted(second, 1, itemsize, self._limit)

    def gate_up_act(
        self, x_RD: Tensor, aligned: Alignment, inner: Tensor, num_pairs: int, top_k: int, tile: Tiles
    ) -> None:
        """Fill `inner` (rows of all tiles, I) from the rows of the pairs."""
        shape, num_tiles = self.shape, aligned.tile_slot.shape[0]
        weight, tma = self._operand(self.gate_up, tile)
        _kernels().gate_up_act[(num_tiles * -(-shape.intermediate_size // tile.BN),)](
            *(x_RD, weight, self.gate_up_bias, *aligned, inner, num_pairs, num_tiles, self.gate_up.stride(0)),
            *(shape.alpha, shape.limit),
            **self._sizes,
            TOP_K=top_k,
            ACTIVATION=shape.activation,
            **tile._replace(TMA=tma)._asdict(),
        )

    def project_down(self, inner: Tensor, aligned: Alignment, pairs: Tensor, tile: Tiles) -> None:
        """Fill `pairs` (R * K, D) from `inner`, which has tiles of as many rows."""
        num_tiles = aligned.tile_slot.shape[0]
        weight, tma = self._operand(self.down, tile)
        _kernels().down[(num_tiles * -(-self.shape.hidden_size // tile.BN),)](
            *(inner, weight, self.down_bias, *aligned, pairs, pairs.shape[0], num_tiles, self.down.stride(0)),
            **self._sizes,
            **tile._replace(TMA=tma)._asdict(),
        )

    @property
    def _sizes(self) -> dict[str, Any]:
        return {"HIDDEN": self.shape.hidden_size, "INNER": self.shape.intermediate_size, "BIAS": self.shape.bias}

    def _operand(self, weight: Tensor, tile: Tiles) -> tuple[Any, bool]:
        """How a kernel is given weights: by a pointer, or by a descriptor (True), which wants rows of 16-byte words."""
        if not tile.TMA or weight.shape[2] * self.dtype.itemsize % 16:
            return weight, False
        key = (weight.data_ptr(), tile.BN, tile.BK)
        if key not in self._descriptors:
            self._descriptors[key] = _descriptor(weight, [1, tile.BN, tile.BK])
        return self._descriptors[key], True


def _kernels() -> ModuleType:
    """The jit functions; imported late, because Triton may be missing."""
    from phalanx.kernels.triton import _moe_kernels

    return _moe_kernels


def _descriptor(matrices: Tensor, block: list[int]) -> Any:
    """Of (s, rows, columns) matrices for the copy engine; made on the host, so that kernels need no scratch memory."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(matrices, list(matrices.shape), list(matrices.stride()), block)

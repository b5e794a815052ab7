"""Weights that a checkpoint stores quantized, read as plain ones: dequantized slice by slice on the way in.

    mxfp4   experts of gpt-oss       <name>_blocks (E, rows, G, 16) uint8, two 4-bit floats a byte, the low half first
                                     <name>_scales (E, rows, G) uint8, exponent of 2 plus 127 of 32 values
                                     -> <name> (E, 32 G, rows), transposed like its bf16 form
    fp8     linears of DeepSeek-V3   <name> (N, K) float8_e4m3fn
                                     <name>_scale_inv (ceil(N / n), ceil(K / k)) fp32, factor of a block of (n, k)
                                     -> <name> (N, K)

What a rank holds afterwards is plain: as large, and as quick, as a checkpoint in its dtype.

Source: OCP Microscaling Formats (MX) 1.0, sec. 5.3 and 6.3; DeepSeek-V3 (arXiv:2412.19437) sec. 3.3.2.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from phalanx.errors import CheckpointError
from phalanx.models.checkpoint import Checkpoint, StoredTensor
from phalanx.models.hf_config import Quantization

BLOCKS, SCALES, SCALE_INV = "_blocks", "_scales", "_scale_inv"
GROUP = 32
"""Values that share an exponent in mxfp4."""

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""e2m1 by its bits."""


class PlainTensor(Protocol):
    """A tensor that can be read as floats, whatever the file holds."""

    key: str
    path: Path
    shape: tuple[int, ...]

    def read(self, index: tuple[slice, ...]) -> Tensor:
        """The part `index`, on the CPU, in a float dtype."""


def plain(checkpoint: Checkpoint, quantization: Quantization | None) -> Iterator[PlainTensor]:
    """Every tensor of a checkpoint under the name it has in a plain one.

    Raises:
        CheckpointError: as `Checkpoint.tensors`; or parts of a quantized tensor are missing or do not fit.
    """
    for stored in checkpoint.tensors():
        key = stored.key
        if quantization is None:
            yield stored
        elif quantization.method == "mxfp4" and key.endswith(BLOCKS):
            name = key.removesuffix(BLOCKS)
            yield Mxfp4Tensor(name, stored, _beside(checkpoint, stored, name + SCALES))
        elif quantization.method == "fp8" and stored.dtype == "F8_E4M3":
            yield Fp8Tensor(stored, _beside(checkpoint, stored, key + SCALE_INV), quantization.block)
        elif not key.endswith(SCALES if quantization.method == "mxfp4" else SCALE_INV):
            yield stored


def _beside(checkpoint: Checkpoint, stored: StoredTensor, key: str) -> StoredTensor:
    if key not in checkpoint:
        raise CheckpointError(f"{stored.path}: tensor {stored.key!r} is quantized, and {key!r} is missing")
    return checkpoint.tensor(key)


class Mxfp4Tensor:
    """A tensor of all experts in mxfp4; the face of a `StoredTensor`.

    Raises:
        CheckpointError: blocks and scales do not fit each other.
    """

    def __init__(self, key: str, blocks: StoredTensor, scales: StoredTensor) -> None:
        if len(blocks.shape) != 4 or blocks.shape[3] != GROUP // 2 or scales.shape != blocks.shape[:3]:
            raise CheckpointError(
                f"{blocks.path}: {blocks.key!r} {list(blocks.shape)} and {scales.key!r} {list(scales.shape)} are no "
                "mxfp4 pair (E, rows, groups, 16) and (E, rows, groups)"
            )
        self.key, self.path = key, blocks.path
        experts, rows, groups, _ = blocks.shape
        self.shape: tuple[int, ...] = (experts, groups * GROUP, rows)
        self._blocks, self._scales = blocks, scales

    def read(self, index: tuple[slice, ...]) -> Tensor:
        """The part `index`, bf16, which holds every value exactly; only the groups that it touches are read."""
        experts, columns, rows = (slice(*part.indices(size)[:2]) for part, size in zip(index, self.shape, strict=True))
        groups = slice(columns.start // GROUP, -(-columns.stop // GROUP))
        packed = self._blocks.raw((experts, rows, groups, slice(0, GROUP // 2)), "U8")
        exponents = self._scales.raw((experts, rows, groups), "U8").int() - 127
        table = torch.tensor(FP4, dtype=torch.bfloat16)
        values = torch.stack([table[(packed & 15).int()], table[(packed >> 4).int()]], dim=-1).flatten(-2)
        values = torch.ldexp(values, exponents[..., None]).flatten(-2)
        first = columns.start - groups.start * GROUP
        return values[..., first : first + columns.stop - columns.start].transpose(1, 2)


class Fp8Tensor:
    """A matrix in blocks of float8; the face of a `StoredTensor`.

    Raises:
        CheckpointError: there are not as many factors as blocks.
    """

    def __init__(self, weight: StoredTensor, scales: StoredTensor, block: tuple[int, int]) -> None:
        expected = tuple(-(-size // step) for size, step in zip(weight.shape, block, strict=False))
        if len(weight.shape) != 2 or scales.shape != expected:
            raise CheckpointError(
                f"{weight.path}: {weight.key!r} {list(weight.shape)} in blocks of {list(block)} needs factors "
                f"{list(expected)}, not {list(scales.shape)}"
            )
        self.key: str = weight.key
        self.path: Path = weight.path
        self.shape: tuple[int, ...] = weight.shape
        self._weight, self._scales, self._block = weight, scales, block

    def read(self, index: tuple[slice, ...]) -> Tensor:
        """The part `index`, fp32."""
        parts = [slice(*part.indices(size)[:2]) for part, size in zip(index, self.shape, strict=True)]
        covers = [slice(part.start // n, -(-part.stop // n)) for part, n in zip(parts, self._block, strict=True)]
        factors = self._scales.raw((covers[0], covers[1]), "F32")
        for dim, (part, cover, n) in enumerate(zip(parts, covers, self._block, strict=True)):
            first = part.start - cover.start * n
            factors = factors.repeat_interleave(n, dim).narrow(dim, first, part.stop - part.start)
        return self._weight.raw((parts[0], parts[1]), "F8_E4M3").float() * factors

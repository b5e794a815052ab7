"""The seal of an expert's row on its way to another rank: a damaged row, or another one than was meant, is refused.

sealed = row | checksum  expert  layer        uint8; the seal is three 64-bit words, a row whole words
"""

from collections.abc import Callable
from ctypes import c_long, c_uint64, c_void_p
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from phalanx.kernels.cpu import library

SEAL_BYTES = 24
COLUMNS = 512
"""Words of a row are summed as lines of so many where there is no C++: two passes, in none of the row's size."""


def seal(row: Tensor, expert: int, layer: int) -> Tensor:
    """A sealed copy of a row; the inverse question is `is_sound`.

    Args:
        row: (n,) uint8, contiguous, n a multiple of 8.
        expert: logical number.
        layer: of the model.

    Returns:
        (n + SEAL_BYTES,) uint8 on the same device, without a host synchronisation.
    """
    out = torch.empty(row.shape[0] + SEAL_BYTES, dtype=torch.uint8, device=row.device)
    tail = out[-SEAL_BYTES:].view(torch.int64)
    cpp = _cpp() if row.device.type == "cpu" else None
    if cpp is None:
        out[:-SEAL_BYTES].copy_(row)
        tail[0] = checksum(row)
        tail[1], tail[2] = expert, layer
    else:
        words = tail.numpy()
        words.view("uint64")[0] = cpp.copy(row.data_ptr(), out.data_ptr(), row.shape[0] // 8)
        words[1:] = expert, layer
    return out


def is_sound(sealed: Tensor, expert: int, layer: int) -> Tensor:
    """Whether this is the sealed row of an expert of a layer, as it was sent: a 0-dim bool tensor on its device."""
    row, tail = sealed[:-SEAL_BYTES], sealed[-SEAL_BYTES:].view(torch.int64)
    cpp = _cpp() if row.device.type == "cpu" else None
    if cpp is None:
        return (tail[0] == checksum(row)) & (tail[1] == expert) & (tail[2] == layer)
    words = tail.numpy()
    total = cpp.checksum(row.data_ptr(), row.shape[0] // 8)
    return torch.tensor(int(words.view("uint64")[0]) == total and (words[1], words[2]) == (expert, layer))


def checksum(row: Tensor) -> Tensor:
    """Sum of a row's 64-bit words, word i times 2i + 1, as a 0-dim int64 tensor that has wrapped around.

    Order counts, and no change of one word goes unseen: an even factor would hide a word's highest bit.
    """
    words = row.view(torch.int64)
    words = torch.nn.functional.pad(words, (0, -words.numel() % COLUMNS)).view(-1, COLUMNS)
    lines = torch.arange(0, 2 * words.numel(), 2 * COLUMNS, device=row.device)
    columns = torch.arange(1, 2 * COLUMNS, 2, device=row.device)
    return (words.sum(1) * lines).sum() + (words.sum(0) * columns).sum()


class _Cpp(NamedTuple):
    checksum: Callable[..., int]
    copy: Callable[..., int]


@cache
def _cpp() -> _Cpp | None:
    if library.load().handle is None:
        return None
    return _Cpp(
        library.function("row_checksum", (c_void_p, c_long), c_uint64),
        library.function("row_copy", (c_void_p, c_void_p, c_long), c_uint64),
    )

"""Large CPU tensors on huge pages: reading a block here and a block there, page walks cost a quarter of the time."""

import ctypes
import math
from functools import cache

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20
MADV_HUGEPAGE = 14


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor, on huge pages where the system grants them (Linux; it is only advice).

    Must be advised before it is touched, which is why this is not a method of an existing tensor.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < HUGE_PAGE:
        return torch.empty(shape, dtype=dtype)
    storage = torch.empty(num_bytes + HUGE_PAGE, dtype=torch.uint8)
    start = -storage.data_ptr() % HUGE_PAGE
    advise = _madvise()
    if advise is not None:
        advise(storage.data_ptr() + start, num_bytes, MADV_HUGEPAGE)
    return storage[start : start + num_bytes].view(dtype).view(shape)


@cache
def _madvise() -> "ctypes._NamedFuncPointer | None":
    try:
        function = ctypes.CDLL(None).madvise
    except (AttributeError, OSError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function

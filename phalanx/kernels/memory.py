"""Memory for large tensors that are read a block here and a block there: the KV pool, packed weights."""

import ctypes
import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20
MADV_HUGEPAGE = 14


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised contiguous tensor; on a CPU with huge pages where Linux grants them (it is only advice).

    Page walks are a quarter of the time of a decode that reads a paged pool. The advice must come before the memory is
    touched, which is why this is not a function of an existing tensor.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    advise = _madvise() if device.type == "cpu" and num_bytes >= HUGE_PAGE else None
    if advise is None:
        return torch.empty(shape, dtype=dtype, device=device)
    storage = torch.empty(num_bytes + 2 * HUGE_PAGE, dtype=torch.uint8)
    start = -storage.data_ptr() % HUGE_PAGE
    advise(storage.data_ptr() + start, -(-num_bytes // HUGE_PAGE) * HUGE_PAGE, MADV_HUGEPAGE)
    return storage[start : start + num_bytes].view(dtype).view(shape)


@cache
def _madvise() -> Callable[..., int] | None:
    try:
        function = ctypes.CDLL(None).madvise
    except (AttributeError, OSError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function

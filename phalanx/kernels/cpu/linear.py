"""C++ linear layers: the bits of a row depend neither on the rows beside it nor on the threads."""

from collections.abc import Callable
from ctypes import c_int, c_long, c_void_p

import torch
from torch import Tensor, get_num_threads

from phalanx.kernels import memory
from phalanx.kernels.cpu import library

PANEL = 48  # linear.cpp


def refuses(device: torch.device, dtype: torch.dtype, in_features: int) -> str | None:
    """Why the C++ product cannot use such a weight, or None."""
    if device.type != "cpu":
        return f"the weight is on {device.type}"
    if in_features * dtype.itemsize % 4:
        return f"its rows ({in_features} of {dtype}) are not whole 32-bit words"
    return library.refuses(dtype)


def pack(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Copy the weight (N, K) into panels; the result maps contiguous or strided (..., K) to (..., N)."""
    dtype, suffix = weight.dtype, library.SUFFIX[weight.dtype]
    n, k = weight.shape
    packed = memory.empty((-(-n // PANEL), k, PANEL), dtype, weight.device)
    weight = weight.detach().contiguous()
    copy = library.function(f"pack_linear_{suffix}", (c_void_p, c_void_p, c_long, c_long, c_int))
    copy(weight.data_ptr(), packed.data_ptr(), n, k, get_num_threads())
    call = library.function(f"linear_{suffix}", (*(c_void_p,) * 4, *(c_long,) * 3, c_int))
    bias32 = None if bias is None else bias.detach().float().contiguous()

    def linear(x: Tensor) -> Tensor:
        x = x.contiguous()
        y = torch.empty((*x.shape[:-1], n), dtype=dtype)
        bias_pointer = None if bias32 is None else bias32.data_ptr()
        call(x.data_ptr(), packed.data_ptr(), bias_pointer, y.data_ptr(), x.numel() // k, k, n, get_num_threads())
        return y

    return linear

"""C++ `add_rms_norm`: one pass, one row at a time."""

from ctypes import c_float, c_int, c_long, c_void_p

import torch
from torch import Tensor, empty_like, get_num_threads

from phalanx.kernels.cpu import library
from phalanx.kernels.op import Function, Impl


def load(dtype: torch.dtype) -> Function:
    """Bind the C function for a dtype."""
    argtypes = (*(c_void_p,) * 5, c_long, c_long, c_float, c_int)
    call = library.function(f"add_rms_norm_{library.SUFFIX[dtype]}", argtypes)

    def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        rows, width = x.shape
        y = empty_like(x)
        if residual is None:
            call(x.data_ptr(), None, weight.data_ptr(), y.data_ptr(), None, rows, width, eps, get_num_threads())
            return y, x
        stream = empty_like(x)
        call(
            *(x.data_ptr(), residual.data_ptr(), weight.data_ptr(), y.data_ptr(), stream.data_ptr()),
            *(rows, width, eps, get_num_threads()),
        )
        return y, stream

    return add_rms_norm


IMPLS = (Impl("cpp", library.refuses, load, batch_invariant=True),)

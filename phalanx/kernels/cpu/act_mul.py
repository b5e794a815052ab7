"""C++ `act_mul`: one pass, one row at a time."""

from ctypes import c_int, c_long, c_void_p

import torch
from torch import Tensor, get_num_threads

from phalanx.errors import ConfigError
from phalanx.kernels.act_mul import ACTIVATIONS
from phalanx.kernels.cpu import library
from phalanx.kernels.op import Function, Impl


def load(dtype: torch.dtype) -> Function:
    """Bind the C function for a dtype."""
    argtypes = (c_void_p, c_void_p, c_long, c_long, c_int, c_int)
    call = library.function(f"act_mul_{library.SUFFIX[dtype]}", argtypes)

    def act_mul(gate_up: Tensor, activation: str) -> Tensor:
        if activation not in ACTIVATIONS:
            raise ConfigError(f"activation {activation!r} is unknown; use one of {', '.join(ACTIVATIONS)}")
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty((rows, width), dtype=dtype)
        call(gate_up.data_ptr(), out.data_ptr(), rows, width, activation == "gelu_tanh", get_num_threads())
        return out

    return act_mul


IMPLS = (Impl("cpp", library.refuses, load, batch_invariant=True),)

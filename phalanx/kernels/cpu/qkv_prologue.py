"""C++ `qkv_prologue`: norm, rotation, KV write and q re-layout in one pass."""

from ctypes import c_float, c_int, c_long, c_void_p

import torch
from torch import Tensor, get_num_threads

from phalanx.kernels.cpu import library
from phalanx.kernels.op import Function, Impl


def load(dtype: torch.dtype) -> Function:
    """Bind the C function for a dtype."""
    argtypes = (*(c_void_p,) * 8, c_long, *(c_int,) * 8, c_float, c_int)
    call = library.function(f"qkv_prologue_{library.SUFFIX[dtype]}", argtypes)

    def qkv_prologue(
        qkv: Tensor,
        positions: Tensor,
        cos_sin: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        slot_mapping: Tensor,
        kv: Tensor,
        layer: int,
        eps: float,
        interleaved: bool,
    ) -> Tensor:
        num_tokens, width = qkv.shape
        _, layers, _, num_kv_heads, block_size, head_dim = kv.shape
        group = (width // head_dim) // num_kv_heads - 2
        q = torch.empty((num_kv_heads, num_tokens, group, head_dim), dtype=dtype)
        call(
            *(qkv.data_ptr(), positions.data_ptr(), cos_sin.data_ptr()),
            None if q_weight is None else q_weight.data_ptr(),
            None if k_weight is None else k_weight.data_ptr(),
            *(slot_mapping.data_ptr(), kv.data_ptr(), q.data_ptr(), num_tokens, num_kv_heads, group, head_dim),
            *(cos_sin.shape[1], block_size, layers, layer, interleaved, eps, get_num_threads()),
        )
        return q

    return qkv_prologue


IMPLS = (Impl("cpp", library.refuses, load, batch_invariant=True),)

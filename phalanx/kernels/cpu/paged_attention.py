"""C++ `paged_attention`: reads the pool in place; a row's bits depend on its q and its keys alone."""

from ctypes import c_float, c_int, c_long, c_void_p

import torch
from torch import Tensor, get_num_threads

from phalanx.kernels.cpu import library
from phalanx.kernels.op import Function, Impl
from phalanx.kernels.types import AttnMeta


def load(dtype: torch.dtype) -> Function:
    """Bind the C function for a dtype."""
    argtypes = (*(c_void_p,) * 7, *(c_long,) * 3, *(c_int,) * 7, c_float, c_float, c_int, c_int)
    call = library.function(f"paged_attention_{library.SUFFIX[dtype]}", argtypes)

    def paged_attention(
        q: Tensor,
        kv: Tensor,
        layer: int,
        meta: AttnMeta,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        num_kv_heads, num_tokens, group, head_dim = q.shape
        num_seqs, table_width = meta.block_tables.shape
        out = torch.empty((num_tokens, num_kv_heads * group * head_dim), dtype=dtype)
        call(
            *(q.data_ptr(), kv.data_ptr(), out.data_ptr(), None if sinks is None else sinks.data_ptr()),
            *(meta.cu_seqlens_q.data_ptr(), meta.seq_lens.data_ptr(), meta.block_tables.data_ptr()),
            *(num_seqs, table_width, num_tokens, num_kv_heads, group, head_dim),
            *(kv.shape[4], kv.shape[1], kv.shape[2], layer),
            *(scale, softcap or 0.0, window or 0, get_num_threads()),
        )
        return out

    return paged_attention


IMPLS = (Impl("cpp", library.refuses, load, batch_invariant=True),)

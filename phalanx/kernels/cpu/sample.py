"""C++ `sample`: vectorised noise, filters without sorting."""

from ctypes import c_int, c_long, c_void_p

import torch
from torch import Tensor, get_num_threads

from phalanx.kernels.cpu import library
from phalanx.kernels.op import Function, Impl


def load(dtype: torch.dtype) -> Function:
    """Bind the C function; logits are fp32 whatever the activations are."""
    call = library.function("sample", (*(c_void_p,) * 9, c_long, c_long, c_int))

    def sample(
        logits: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        min_p: Tensor,
        seeds: Tensor,
        positions: Tensor,
        choices: Tensor,
    ) -> Tensor:
        rows, vocab = logits.shape
        tokens = torch.empty(rows, dtype=torch.int64)
        columns = (logits, temperature, top_k, top_p, min_p, seeds, positions, choices, tokens)
        call(*(column.data_ptr() for column in columns), rows, vocab, get_num_threads())
        return tokens

    return sample


IMPLS = (Impl("cpp", library.refuses, load, batch_invariant=True),)

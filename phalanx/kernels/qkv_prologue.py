"""From the QKV projection to attention: per-head norm, rotary embedding, K/V into the pool, q in attention's layout."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from phalanx.kernels.op import Cost, Op


def reference(
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
    """Norm and rotate q and k, write k and v into the pool, return q kv-head-major.

    Args:
        qkv: (T, (K*G + 2K) * D), activation dtype, contiguous: K*G query heads, K key heads, K value heads.
        positions: (T) int32, rows of `cos_sin`.
        cos_sin: (max_pos, R) fp32, R/2 cosines then R/2 sines; only the first R <= D dims of a head are rotated.
        q_weight: (D) fp32 weight of the RMS norm of each query head, or None for no norm.
        k_weight: (D) fp32 likewise for key heads.
        slot_mapping: (T) int64, block * block_size + offset; -1 = padding, nothing is written.
        kv: pool (blocks, layers, 2, K, block_size, D), activation dtype, contiguous; written in place.
        layer: index into the pool's layers.
        eps: of both norms.
        interleaved: rotate the pairs (2i, 2i + 1) instead of (i, i + R/2).

    Returns:
        q as (K, T, G, D) in qkv's dtype. All maths in fp32, rounded once.
    """
    num_tokens, _, _, num_kv_heads, block_size, head_dim = qkv.shape[0], *kv.shape[1:]
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    heads = qkv.view(num_tokens, num_heads + 2 * num_kv_heads, head_dim).float()
    q, k, v = heads[:, :num_heads], heads[:, num_heads:-num_kv_heads], heads[:, -num_kv_heads:]
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
    q = _rotate(_rms_norm(q, q_weight, eps), cos, sin, interleaved).to(qkv.dtype)
    k = _rotate(_rms_norm(k, k_weight, eps), cos, sin, interleaved).to(qkv.dtype)

    # A padding row writes back what is already in slot 0 of the null block, so no row has to be selected (no sync).
    slots = slot_mapping.clamp(min=0)
    block, offset = slots // block_size, slots % block_size
    padding = (slot_mapping < 0).view(-1, 1, 1)
    for index, rows in ((0, k), (1, v.to(qkv.dtype))):
        pool = kv[:, layer, index]
        pool[block, :, offset] = torch.where(padding, pool[block, :, offset], rows)
    return q.view(num_tokens, num_kv_heads, num_heads // num_kv_heads, head_dim).transpose(0, 1).contiguous()


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        return x
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    rotary_dim = 2 * cos.shape[-1]
    rotated, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    if interleaved:
        a, b = rotated[..., 0::2], rotated[..., 1::2]
        rotated = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = rotated.chunk(2, dim=-1)
        rotated = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((rotated, rest), dim=-1)


class Problem(NamedTuple):
    """Static facts of a call; `padding` rows at the end have slot -1."""

    tokens: int
    num_kv_heads: int
    group: int
    head_dim: int
    rotary_dim: int
    block_size: int = 16
    norm: bool = True
    interleaved: bool = False
    padding: int = 0


def make_inputs(problem: Problem, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    """Random rows, scattered slots of a pool of two layers; the null block is NaN and must stay so."""
    p = problem
    rows = (p.group + 2) * p.num_kv_heads * p.head_dim
    max_pos, num_blocks = 300, p.tokens // p.block_size + 3
    kv = torch.randn((num_blocks, 2, 2, p.num_kv_heads, p.block_size, p.head_dim), generator=generator).to(dtype)
    kv[0] = float("nan")
    free = torch.randperm((num_blocks - 1) * p.block_size, generator=generator) + p.block_size
    slots = free[: p.tokens].clone()
    slots[p.tokens - p.padding :] = -1
    angles = torch.rand((max_pos, p.rotary_dim // 2), generator=generator) * 6.3
    weights = 1 + 0.3 * torch.randn((2, p.head_dim), generator=generator)
    return {
        "qkv": torch.randn((p.tokens, rows), generator=generator).to(dtype),
        "positions": torch.randint(0, max_pos, (p.tokens,), generator=generator, dtype=torch.int32),
        "cos_sin": torch.cat((angles.cos(), angles.sin()), dim=-1),
        "q_weight": weights[0] if p.norm else None,
        "k_weight": weights[1] if p.norm else None,
        "slot_mapping": slots,
        "kv": kv,
        "layer": 1,
        "eps": 1e-6,
        "interleaved": p.interleaved,
    }


def cost(problem: Problem, dtype: torch.dtype) -> Cost:
    """Read the rows once, write as much into q and the pool."""
    p = problem
    elements = p.tokens * (p.group + 2) * p.num_kv_heads * p.head_dim
    return Cost(2 * elements * dtype.itemsize, 10 * elements)


OP = Op(
    name="qkv_prologue",
    reference=reference,
    make_inputs=make_inputs,
    cost=cost,
    problems={
        "test": (
            Problem(0, 2, 2, 64, 64),
            Problem(1, 2, 1, 32, 32),
            Problem(5, 1, 3, 80, 80, norm=False),
            Problem(7, 2, 4, 128, 64, padding=2),
            Problem(70, 3, 8, 64, 64, block_size=64, interleaved=True),
            Problem(17, 2, 3, 128, 128, interleaved=True, norm=False, padding=1),
            Problem(9, 1, 2, 80, 20, interleaved=True),
        ),
        "bench": tuple(Problem(tokens, 8, 2, 128, 128) for tokens in (1, 8, 32, 256)),
    },
    mutates=("kv",),
)

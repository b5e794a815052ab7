"""Causal attention over a paged KV pool: decode rows and prefill chunks in one call."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from phalanx.kernels.op import Cost, Op
from phalanx.kernels.types import AttnMeta


def reference(
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
    """Attend every new row to the keys of its sequence up to itself.

    Args:
        q: (K, T, G, D), activation dtype, contiguous; from `qkv_prologue`.
        kv: pool (blocks, layers, 2, K, block_size, D); keys and values of the new rows are already in it. Slots that
            were never written may hold anything, NaN too. A pool (blocks, layers, 1, K, block_size, D) holds rows that
            are key and value at once (latent attention).
        layer: index into the pool's layers.
        meta: the batch, see `AttnMeta`.
        scale: factor of the scores.
        window: a row at position p sees the keys `p - window < key <= p`; None = all up to p.
        softcap: scores become `softcap * tanh(score / softcap)`, before the mask; None = off.
        sinks: (K*G) fp32, one extra score per query head that takes probability and gives no value; None = off.

    Returns:
        (T, K*G*D) in q's dtype; rows without a key, and rows past `cu_seqlens_q[-1]`, are 0. Maths in fp32.
    """
    num_kv_heads, num_tokens, group, head_dim = q.shape
    out = q.new_zeros((num_tokens + 1, num_kv_heads, group, head_dim))  # one more row: where padding rows land
    num_seqs = meta.block_tables.shape[0]
    # Decodes as one batch; prefills one by one, which bounds the scores to one max_q_len x max_seq_len matrix.
    spans = [(0, meta.num_decodes, 1)] if meta.num_decodes else []
    spans += [(b, b + 1, meta.max_q_len) for b in range(meta.num_decodes, num_seqs)]
    for first, last, max_q_len in spans if num_tokens and meta.max_seq_len else ():
        start = meta.cu_seqlens_q[first:last, None].long()
        q_lens = meta.cu_seqlens_q[first + 1 : last + 1, None] - start
        seq_lens = meta.seq_lens[first:last, None]
        rows = torch.arange(max_q_len, device=q.device)[None]
        valid_rows = rows < q_lens
        token = torch.where(valid_rows, start + rows, num_tokens)
        position = seq_lens - q_lens + rows  # (b, i)

        k, v = _gather(kv, layer, meta.block_tables[first:last], meta.max_seq_len)  # (b, K, keys, D)
        key = torch.arange(k.shape[2], device=q.device)
        v = v.masked_fill((key >= seq_lens)[:, None, :, None], 0)  # 0 * NaN of an unwritten slot would be NaN
        q_rows = q[:, token.clamp(max=num_tokens - 1)].float()  # (K, b, i, G, D)
        scores = torch.einsum("kbigd,bksd->bkgis", q_rows, k) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        visible = (key <= position[..., None]) & (key < seq_lens[..., None])
        if window is not None:
            visible &= key > position[..., None] - window
        probs = _softmax(scores.masked_fill(~visible[:, None, None], -torch.inf), sinks)
        out[token] = torch.einsum("bkgis,bksd->bikgd", probs, v).to(q.dtype)
    return out[:num_tokens].flatten(1)


def _gather(kv: Tensor, layer: int, block_tables: Tensor, max_seq_len: int) -> tuple[Tensor, Tensor]:
    block_size = kv.shape[4]
    num_blocks = -(-max_seq_len // block_size)
    tiles = kv[block_tables[:, :num_blocks].long(), layer].float()  # (b, block, 2, K, S, D)
    keys_values = tiles.permute(2, 0, 3, 1, 4, 5).flatten(3, 4)
    return keys_values[0], keys_values[-1]


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over the last dim of (b, K, G, i, keys); a row without a key gives zeros."""
    top = scores.amax(-1, keepdim=True)
    if sinks is not None:
        sink = sinks.view(1, *scores.shape[1:3], 1, 1)
        top = torch.maximum(top, sink)
    top = top.clamp(min=torch.finfo(torch.float32).min)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sink - top)
    return weights / total.clamp(min=torch.finfo(torch.float32).tiny)


class Problem(NamedTuple):
    """Static facts of a call: sequences as (context before, new rows), decodes first; `parts` 1 = keys are values."""

    seqs: tuple[tuple[int, int], ...]
    num_kv_heads: int
    group: int
    head_dim: int
    block_size: int = 16
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    padding: int = 0
    parts: int = 2


def make_inputs(problem: Problem, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    """Random q, and a pool in which every slot that belongs to no sequence is NaN; blocks lie in random order."""
    p = problem
    seq_lens = [context + new for context, new in p.seqs]
    q_lens = [new for _, new in p.seqs]
    blocks_of = [-(-length // p.block_size) for length in seq_lens]
    num_blocks = sum(blocks_of) + 2
    ids = iter((torch.randperm(num_blocks - 1, generator=generator) + 1).tolist())
    kv = torch.full((num_blocks, 2, p.parts, p.num_kv_heads, p.block_size, p.head_dim), torch.nan, dtype=dtype)
    tables = torch.zeros((len(p.seqs), max(blocks_of, default=0) + 1), dtype=torch.int32)
    for row, length in enumerate(seq_lens):
        for index in range(blocks_of[row]):
            tables[row, index] = block = next(ids)
            used = min(p.block_size, length - index * p.block_size)
            shape = (p.parts, p.num_kv_heads, used, p.head_dim)
            kv[block, 1, :, :, :used] = torch.randn(shape, generator=generator).to(dtype)
    meta = AttnMeta(
        cu_seqlens_q=torch.tensor([0, *q_lens]).cumsum(0).int(),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        block_tables=tables,
        num_decodes=next((i for i, new in enumerate(q_lens) if new > 1), len(q_lens)),
        max_q_len=max(q_lens, default=0),
        max_seq_len=max(seq_lens, default=0),
    )
    shape = (p.num_kv_heads, sum(q_lens) + p.padding, p.group, p.head_dim)
    return {
        "q": (torch.randn(shape, generator=generator) * 2).to(dtype),
        "kv": kv,
        "layer": 1,
        "meta": meta,
        "scale": p.head_dim**-0.5,
        "window": p.window,
        "softcap": p.softcap,
        "sinks": torch.randn(p.num_kv_heads * p.group, generator=generator) * 2 if p.sinks else None,
    }


def cost(problem: Problem, dtype: torch.dtype) -> Cost:
    """Keys and values of every sequence once, q and output; two products per visible (row, key)."""
    p = problem
    keys = sum(context + new for context, new in p.seqs)
    rows = sum(new for _, new in p.seqs)
    pairs = sum(new * context + new * (new + 1) // 2 for context, new in p.seqs)
    elements = p.num_kv_heads * p.head_dim * (p.parts * keys + 2 * p.group * rows)
    return Cost(elements * dtype.itemsize, 4 * pairs * p.num_kv_heads * p.group * p.head_dim)


DECODES = ((0, 1), (1, 1), (14, 1), (15, 1), (16, 1), (132, 1))
MIXED = (*DECODES[2:], (0, 2), (133, 17), (63, 2), (0, 70), (16, 17))
OP = Op(
    name="paged_attention",
    reference=reference,
    make_inputs=make_inputs,
    cost=cost,
    problems={
        "test": (
            Problem((), 2, 2, 64),
            Problem(((0, 0),), 1, 2, 32),
            Problem(((133, 1), (5, 0), (20, 1)), 2, 1, 64),
            Problem(DECODES, 2, 3, 80),
            Problem(MIXED, 1, 8, 128),
            Problem(MIXED, 2, 4, 64, block_size=64, padding=3),
            Problem(MIXED, 2, 1, 128, window=5),
            Problem(MIXED, 1, 3, 80, window=40, sinks=True),
            Problem(MIXED, 2, 4, 32, block_size=64, softcap=3.0),
            Problem(DECODES, 3, 8, 128, block_size=64, sinks=True, window=17, padding=2),
            Problem(((16, 70), (1, 17), (0, 1), (133, 70)), 1, 4, 128, softcap=20.0, window=64, sinks=True),
            Problem(MIXED, 1, 16, 576, parts=1),
            Problem(MIXED, 1, 3, 28, padding=2, parts=1),
            Problem(DECODES, 1, 128, 576, block_size=64, parts=1),
        ),
        "bench": (
            *(Problem(((160, 1),) * batch, 8, 2, 128) for batch in (1, 8, 32)),
            Problem(((2047, 1),), 8, 4, 128),
            *(Problem(((context, 256),), 8, 2, 128) for context in (0, 256, 1024)),
        ),
    },
)

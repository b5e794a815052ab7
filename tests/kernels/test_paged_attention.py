"""C++ attention: a row has the same bits as a decode, in any chunk, in any batch, in any blocks, with any threads."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from phalanx.kernels import registry
from phalanx.kernels.cpu import library
from phalanx.kernels.paged_attention import OP, Problem
from phalanx.kernels.types import AttnMeta

NUM_KV_HEADS, LENGTH = 2, 150
needs_cpp = pytest.mark.skipif(library.load().handle is None, reason=library.load().reason or "built")


class Text(NamedTuple):
    """The q, k, v of one whole sequence."""

    q: Tensor  # (K, LENGTH, G, D)
    k: Tensor  # (LENGTH, K, D)
    v: Tensor


def random_text(seed: int, group: int, dim: int, dtype: torch.dtype) -> Text:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator).to(dtype)  # noqa: E731
    return Text(
        draw(NUM_KV_HEADS, LENGTH, group, dim), draw(LENGTH, NUM_KV_HEADS, dim), draw(LENGTH, NUM_KV_HEADS, dim)
    )


def attend(pieces: list[tuple[Text, int, int]], block_size: int = 16, seed: int = 0, **options: Any) -> list[Tensor]:
    """Rows [start, stop) of several texts in one call; keys past `stop` are not written yet and stay NaN."""
    text = pieces[0][0]
    dtype, dim = text.q.dtype, text.q.shape[-1]
    per_seq = -(-LENGTH // block_size)
    ids = torch.randperm(len(pieces) * per_seq, generator=torch.Generator().manual_seed(seed)).int() + 1
    kv = torch.full((len(ids) + 1, 1, 2, NUM_KV_HEADS, block_size, dim), torch.nan, dtype=dtype)
    tables = ids.view(len(pieces), per_seq)
    for (source, _, stop), table in zip(pieces, tables, strict=True):
        key = torch.arange(stop)
        kv[table[key // block_size].long(), 0, 0, :, key % block_size] = source.k[:stop]
        kv[table[key // block_size].long(), 0, 1, :, key % block_size] = source.v[:stop]
    lengths = [stop - start for _, start, stop in pieces]
    meta = AttnMeta(
        cu_seqlens_q=torch.tensor([0, *lengths]).cumsum(0).int(),
        seq_lens=torch.tensor([stop for _, _, stop in pieces], dtype=torch.int32),
        block_tables=tables,
        num_decodes=next((i for i, n in enumerate(lengths) if n > 1), len(lengths)),
        max_q_len=max(lengths),
        max_seq_len=max(stop for _, _, stop in pieces),
    )
    q = torch.cat([source.q[:, start:stop] for source, start, stop in pieces], dim=1)
    function = registry.bind(
        "paged_attention", device=torch.device("cpu"), dtype=dtype, choose={"paged_attention": "cpp"}
    )
    return list(function(q, kv, 0, meta, scale=dim**-0.5, **options).split(lengths))


@pytest.fixture
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


OPTIONS = [{}, {"window": 37}, {"softcap": 5.0}, {"sinks": torch.linspace(-1, 2, 16)}]
SHAPES = [(1, 64), (2, 128), (3, 80), (8, 24)]


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("group", "dim"), SHAPES)
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "window", "softcap", "sinks"])
def test_row_bits_depend_on_the_row_alone(
    group: int, dim: int, dtype: torch.dtype, options: dict[str, Any], restored_threads: None
) -> None:
    if "sinks" in options:
        options = {"sinks": options["sinks"][: NUM_KV_HEADS * group].contiguous()}
    text, other = random_text(1, group, dim, dtype), random_text(2, group, dim, dtype)
    (whole,) = attend([(text, 0, LENGTH)], **options)
    assert torch.isfinite(whole).all()

    decoded = [attend([(text, i, i + 1)], seed=i, **options)[0] for i in range(LENGTH)]
    assert torch.equal(torch.cat(decoded), whole)

    edges = [0, 1, 3, 20, 84, 85, 133, LENGTH]
    chunks = [attend([(text, a, b)], block_size=64, **options)[0] for a, b in pairwise(edges)]
    assert torch.equal(torch.cat(chunks), whole)

    batch = [(text, 149, 150), (other, 40, 41), (text, 0, 70), (other, 3, 150), (text, 70, 149)]
    torch.set_num_threads(3)
    threaded = attend(batch, seed=9, **options)
    assert torch.equal(torch.cat((threaded[2], threaded[4], threaded[0])), whole)


@needs_cpp
def test_a_nan_row_stays_alone() -> None:
    text, other = random_text(1, 2, 64, torch.float32), random_text(2, 2, 64, torch.float32)
    clean = attend([(text, 140, 150), (other, 0, 150)])
    text.q[:, 145] = torch.nan
    rows, untouched = attend([(text, 140, 150), (other, 0, 150)])
    assert torch.equal(untouched, clean[1])
    assert torch.isnan(rows[5]).all()
    assert torch.equal(rows[:5], clean[0][:5])
    assert torch.equal(rows[6:], clean[0][6:])


@needs_cpp
def test_far_keys_and_extreme_scores() -> None:
    # The online softmax must survive a maximum that only appears in the last tile, and scores of +-1000.
    text = random_text(3, 2, 64, torch.float32)
    text.k[:-1] *= 100
    text.k[-1] = text.q[0, -1, 0] * 100
    (row,) = attend([(text, LENGTH - 1, LENGTH)])
    expected = text.v[-1, 0]  # all probability lies on the last key for this head
    torch.testing.assert_close(row[0, :64], expected, atol=1e-6, rtol=1e-6)


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("problem", [problem for problem in OP.problems["test"] if problem.parts == 1], ids=str)
def test_a_row_that_is_key_and_value(problem: Problem, dtype: torch.dtype) -> None:
    """A pool of single rows gives the bits of a pool that holds each of them twice."""
    inputs = OP.make_inputs(problem, torch.Generator().manual_seed(4), dtype)
    twice = {**inputs, "kv": inputs["kv"].repeat(1, 1, 2, 1, 1, 1)}
    function = registry.bind(
        "paged_attention", device=torch.device("cpu"), dtype=dtype, choose={"paged_attention": "cpp"}
    )
    once = function(**inputs)
    assert torch.isfinite(once).all()
    assert torch.equal(once, function(**twice))

"""Sampling: the filters keep exactly what they say, the distribution is right, a row depends on nothing but itself."""

from typing import Any

import pytest
import torch
from torch import Tensor

from phalanx.kernels import registry
from phalanx.kernels.sample import OP, Problem, make_inputs, top_logprobs

CPU = torch.device("cpu")
IMPLS = [impl for impl in registry.implementations(OP, CPU) if impl.supports(torch.float32) is None]
each_impl = pytest.mark.parametrize("sample", [impl.load(torch.float32) for impl in IMPLS], ids=[i.name for i in IMPLS])


def draw(
    sample: Any,
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    num: int = 1,
) -> Tensor:
    """`num` samples of one row of logits at successive positions."""
    column = lambda value, dtype: torch.full((num,), value, dtype=dtype)  # noqa: E731
    return sample(
        logits.float().expand(num, -1).contiguous(),
        column(temperature, torch.float32),
        column(top_k, torch.int32),
        column(top_p, torch.float32),
        column(min_p, torch.float32),
        column(-(2**63) + 12345, torch.int64),
        torch.arange(num, dtype=torch.int32),
        column(1, torch.int32),
    )


def support(sample: Any, logits: Tensor, **settings: Any) -> set[int]:
    return set(draw(sample, logits, num=4000, **settings).tolist())


@each_impl
def test_greedy_takes_the_lowest_id_of_a_tie(sample: Any) -> None:
    logits = torch.zeros(77)
    logits[[30, 31, 76]] = 4.0
    assert draw(sample, logits, temperature=0.0).item() == 30
    assert draw(sample, torch.tensor([-0.0, 0.0]), temperature=0.0).item() == 0


@each_impl
def test_top_k_is_exact_under_ties(sample: Any) -> None:
    logits = torch.full((50,), -3.0)
    logits[[5, 17, 20, 33, 41]] = torch.tensor([1.0, 1.5, 1.0, 1.0, 1.0])
    assert support(sample, logits, top_k=1) == {17}
    assert support(sample, logits, top_k=3) == {17, 5, 20}
    assert support(sample, logits, top_k=50) > {17, 5, 20, 33, 41}


@each_impl
def test_top_k_does_not_tell_zeros_apart(sample: Any) -> None:
    logits = torch.tensor([-1.0, -0.0, 0.0, -0.0, 0.0])
    assert support(sample, logits, top_k=2) == {1, 2}


@each_impl
def test_top_p_keeps_the_smallest_prefix(sample: Any) -> None:
    probs = torch.tensor([0.1, 0.4, 0.05, 0.2, 0.25])
    logits = probs.log()
    assert support(sample, logits, top_p=1e-6) == {1}
    assert support(sample, logits, top_p=0.39) == {1}
    assert support(sample, logits, top_p=0.41) == {1, 4}
    assert support(sample, logits, top_p=0.86) == {1, 4, 3, 0}
    # after top_k the mass is that of the survivors: 0.4 of 0.65 is 0.615
    assert support(sample, logits, top_k=2, top_p=0.61) == {1}
    assert support(sample, logits, top_k=2, top_p=0.62) == {1, 4}


@each_impl
def test_top_p_takes_ties_by_id(sample: Any) -> None:
    assert support(sample, torch.zeros(10), top_p=0.35) == {0, 1, 2, 3}


@each_impl
def test_min_p_is_relative_to_the_best(sample: Any) -> None:
    logits = torch.tensor([0.1, 0.4, 0.05, 0.2, 0.25]).log()
    assert support(sample, logits, min_p=0.6) == {1, 4}
    assert support(sample, logits, min_p=0.24) == {1, 4, 3, 0}
    assert support(sample, logits, min_p=1.0) == {1}


@each_impl
def test_distribution(sample: Any) -> None:
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.2, -0.4])
    temperature, num = 0.8, 40_000
    counts = draw(sample, logits, temperature=temperature, num=num).bincount(minlength=6)
    expected = torch.softmax(logits / temperature, 0) * num
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_square < 20.5  # 5 degrees of freedom, p = 0.001; the seed is fixed


@each_impl
def test_rows_that_cannot_be_sampled(sample: Any) -> None:
    logits = torch.zeros(6, 40)
    logits[0, 33] = torch.nan
    logits[1, 2] = torch.inf
    logits[2] = -torch.inf
    logits[3, 1:] = -torch.inf
    for temperature in (0.0, 1.0):
        tokens = [draw(sample, row, temperature=temperature, top_k=5, top_p=0.9).item() for row in logits]
        assert tokens[:4] == [-1, -1, -1, 0]
        assert tokens[4] >= 0


@each_impl
def test_a_row_depends_on_nothing_but_itself(sample: Any) -> None:
    inputs = make_inputs(Problem(16, 999), torch.Generator().manual_seed(5), torch.float32)
    together = sample(**inputs)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(6))
    assert torch.equal(sample(**{name: value[order] for name, value in inputs.items()}), together[order])
    for i in range(16):
        assert sample(**{name: value[i : i + 1] for name, value in inputs.items()}).item() == together[i]


@each_impl
def test_argument_types_of_the_definition(sample: Any) -> None:
    tokens = draw(sample, torch.randn(10), num=3)
    assert tokens.dtype == torch.int64
    assert tokens.shape == (3,)


def test_top_logprobs_against_a_sorted_list() -> None:
    logits = (torch.randn((5, 60), generator=torch.Generator().manual_seed(1)) * 2).round()  # many ties
    token_ids = torch.tensor([0, 59, 7, 8, 30])
    result = top_logprobs(logits, token_ids, 9)
    exact = torch.log_softmax(logits.double(), -1)
    for row in range(5):
        order = sorted(range(60), key=lambda i: (-logits[row, i].item(), i))
        assert result.top_ids[row].tolist() == order[:9]
        assert result.ranks[row] == 1 + order.index(int(token_ids[row]))
        torch.testing.assert_close(result.top_logprobs[row].double(), exact[row, order[:9]], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(result.logprobs[row].double(), exact[row, token_ids[row]], atol=1e-5, rtol=1e-5)


def test_top_logprobs_of_nothing() -> None:
    result = top_logprobs(torch.zeros(2, 4), torch.tensor([1, 3]), 0)
    assert result.top_ids.shape == (2, 0)
    assert result.ranks.tolist() == [2, 4]

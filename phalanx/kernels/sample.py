"""Choose the next token of every row, reproducibly; and the log-probabilities of tokens."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from phalanx.kernels.op import Cost, Op
from phalanx.kernels.philox import gumbel


def reference(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    choices: Tensor,
) -> Tensor:
    """Sample one token per row by the Gumbel-max method; a row depends on nothing but itself.

    "In order" means by logit, largest first, equal ones by lower id. The survivors of a row are cut in three steps:
    exactly `top_k` in order; of their softmax the smallest prefix in order with mass >= top_p (at least one token);
    of these the tokens with probability >= min_p times the largest. The sample is the survivor with the largest
    `logit / temperature + noise`, where the noise of a token depends only on (seed, position, choice, token id).

    Args:
        logits: (N, V) fp32, contiguous.
        temperature: (N) fp32; 0 = the first token in order (greedy), the other settings are then ignored.
        top_k: (N) int32; 0 = off.
        top_p: (N) fp32; 1 = off.
        min_p: (N) fp32; 0 = off.
        seeds: (N) int64.
        positions: (N) int32, index of the token in its output.
        choices: (N) int32.

    Returns:
        (N) int64 token ids; -1 for a row that cannot be sampled because its largest logit is not finite or NaN.
    """
    order = torch.sort(logits, dim=-1, descending=True, stable=True)
    top = order.values[:, :1]  # NaN sorts first
    heat = torch.where(temperature > 0, temperature, 1.0)[:, None]
    shifted = (order.values - top) / heat  # shifting first keeps a tiny temperature finite at the top
    rank = torch.arange(logits.shape[1], device=logits.device)
    limit = torch.where(top_k > 0, top_k, logits.shape[1])[:, None]
    keep = rank < limit
    weights = torch.exp(shifted) * keep
    mass_before = weights.double().cumsum(-1) - weights
    keep &= (top_p[:, None] >= 1) | (mass_before < top_p[:, None].double() * weights.double().sum(-1, keepdim=True))
    keep |= rank == 0
    keep &= weights >= min_p[:, None]
    noise = gumbel(order.indices, seeds[:, None], positions[:, None], choices[:, None])
    best = torch.where(keep, shifted + noise, -torch.inf).argmax(-1)
    best = torch.where(temperature > 0, best, 0)[:, None]
    tokens = order.indices.gather(1, best)
    return torch.where(torch.isfinite(top), tokens, -1).squeeze(1)


class TopLogprobs(NamedTuple):
    """Log-probabilities of N chosen tokens and of the best k of their rows."""

    logprobs: Tensor
    """(N) fp32 of the chosen tokens."""
    top_ids: Tensor
    """(N, k) int64, best first, equal ones by lower id."""
    top_logprobs: Tensor
    """(N, k) fp32."""
    ranks: Tensor
    """(N) int64 place of the chosen token in the same order; 1 = the best."""


def top_logprobs(logits: Tensor, token_ids: Tensor, k: int) -> TopLogprobs:
    """Log-softmax in fp32 of the chosen tokens and of the k best tokens of each row.

    Args:
        logits: (N, V).
        token_ids: (N) int64 chosen tokens, each in 0 .. V-1.
        k: how many of the best to return, 0 <= k <= V.
    """
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    chosen = logprobs.gather(1, token_ids[:, None])
    ids = torch.arange(logits.shape[1], device=logits.device)
    ahead = (logprobs > chosen) | ((logprobs == chosen) & (ids < token_ids[:, None]))
    # topk orders ties as it likes: order by (value, -id) in one integer. Negative floats order backwards as bits.
    bits = logprobs.view(torch.int32).long()
    keys = (torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) << 32) | (0xFFFFFFFF - ids)
    top_ids = 0xFFFFFFFF - (keys.topk(k, dim=-1).values & 0xFFFFFFFF)
    return TopLogprobs(chosen.squeeze(1), top_ids, logprobs.gather(1, top_ids), 1 + ahead.sum(-1))


class Problem(NamedTuple):
    """Static facts of a call. `setting` names one row of `SETTINGS`, or "mixed" for all of them in turn."""

    rows: int
    vocab: int
    setting: str = "mixed"


# temperature, top_k, top_p, min_p
SETTINGS = {
    "greedy": (0.0, 0, 1.0, 0.0),
    "plain": (1.0, 0, 1.0, 0.0),
    "top_k": (0.7, 40, 1.0, 0.0),
    "top_p": (1.3, 0, 0.9, 0.0),
    "min_p": (1.0, 0, 1.0, 0.05),
    "all": (0.8, 50, 0.95, 0.02),
    "one": (1.0, 1, 1.0, 0.0),
    "tiny_temperature": (1e-30, 0, 1.0, 0.0),
}


def make_inputs(problem: Problem, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    """Random logits, quantised so that ties happen, whatever `dtype`: logits are fp32 always."""
    names = list(SETTINGS) if problem.setting == "mixed" else [problem.setting]
    rows = [SETTINGS[names[i % len(names)]] for i in range(problem.rows)]
    columns = torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)
    seeds = torch.randint(-(2**63), 2**63 - 1, (problem.rows,), generator=generator, dtype=torch.int64)
    return {
        "logits": (torch.randn((problem.rows, problem.vocab), generator=generator) * 3).bfloat16().float(),
        "temperature": columns[:, 0].contiguous(),
        "top_k": columns[:, 1].int(),
        "top_p": columns[:, 2].contiguous(),
        "min_p": columns[:, 3].contiguous(),
        "seeds": seeds,
        "positions": torch.randint(0, 5000, (problem.rows,), generator=generator, dtype=torch.int32),
        "choices": torch.randint(0, 4, (problem.rows,), generator=generator, dtype=torch.int32),
    }


def cost(problem: Problem, dtype: torch.dtype) -> Cost:
    """Every logit once; the noise of a token is about 100 integer operations."""
    elements = problem.rows * problem.vocab
    return Cost(4 * elements, 100 * elements)


OP = Op(
    name="sample",
    reference=reference,
    make_inputs=make_inputs,
    cost=cost,
    problems={
        "test": (Problem(0, 50), Problem(16, 50), Problem(24, 999), Problem(8, 32768)),
        "bench": (
            Problem(1, 32768, "plain"),
            Problem(32, 32768, "greedy"),
            Problem(32, 32768, "plain"),
            Problem(32, 32768, "all"),
            Problem(32, 32768, "top_p"),
        ),
    },
)

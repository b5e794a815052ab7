"""What transformers answers to a family's tiny checkpoint: the oracle of the end-to-end tests."""

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from phalanx.kernels.philox import gumbel
from phalanx.runtime.sampling_params import SamplingParams
from tests.support import tiny

NUM_TOKENS = 48
TOLERANCE = 1e-4
"""Of a logit, against transformers in fp32."""

MARGIN = 50 * TOLERANCE
"""Smallest distance between the two best logits on a greedy path; below it, equal tokens would be luck."""

LENGTHS = (41, 33, 57, 26, 47, 19)
"""Of the prompts: beyond every window and most of them beyond a step's budget."""

NUM_SHARED = 24
"""Tokens that the last prompt but one shares with the first as a prefix; the third last has some of them elsewhere."""

CANDIDATES = 64
"""Prompts tried per length; the first good one is taken."""

AT_ONCE = 16

NUM_DISTINCT = 8
"""Different ids in an answer; a model that repeats one id proves little."""


class Oracle(NamedTuple):
    """Greedy answers of transformers.

    Attributes:
        path: the checkpoint.
        prompts, outputs: ids; each output has `NUM_TOKENS`.
        logits: per prompt, (prompt + output, vocab): row p is computed from ids 0 ... p.
        margin: smallest distance between the best two logits of any output token.
    """

    path: Path
    prompts: list[list[int]]
    outputs: list[list[int]]
    logits: list[Tensor]
    margin: float

    def contexts(self) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """Every prefix of every sequence, and the logits that follow it."""
        for prompt, output, logits in zip(self.prompts, self.outputs, self.logits, strict=True):
            ids = tuple(prompt + output)
            for position, row in enumerate(logits):
                yield ids[: position + 1], row


def make_oracle(family: str, directory: Path) -> Oracle:
    """Draw prompts for a family until their greedy answers are no matter of rounding, and answer them."""
    path = tiny.make_checkpoint(family, directory)
    model = tiny.load_hf(path)
    generator = torch.Generator().manual_seed(3)
    prompts: list[list[int]] = []
    outputs: list[list[int]] = []
    logits: list[Tensor] = []
    margins: list[float] = []
    for length in LENGTHS:
        drawn = torch.randint(1, model.config.vocab_size, (CANDIDATES, length), generator=generator)
        if length == LENGTHS[-2]:
            drawn[:, :NUM_SHARED] = torch.tensor(prompts[0][:NUM_SHARED])
        if length == LENGTHS[-3]:  # equal blocks that are no equal prefix
            drawn[:, : NUM_SHARED - 8] = torch.tensor(prompts[0][8:NUM_SHARED])
        found = next(filter(None, (_first_good(model, part) for part in drawn.split(AT_ONCE))), None)
        assert found, f"{family}: none of {CANDIDATES} prompts has a margin of {MARGIN} and {NUM_DISTINCT} ids"
        ids, rows, margin = found
        prompts.append(ids[:length].tolist())
        outputs.append(ids[length:].tolist())
        logits.append(rows)
        margins.append(margin)
    return Oracle(path, prompts, outputs, logits, min(margins))


def _first_good(model: Any, prompts: Tensor) -> tuple[Tensor, Tensor, float] | None:
    """(ids with the answer, logits, smallest margin) of the first prompt whose answer rounding does not decide."""
    length, ids = prompts.shape[1], generate(model, prompts)
    with torch.inference_mode():
        rows = model(ids).logits.float()
    best = rows[:, length - 1 : -1].topk(2, dim=-1)
    margin = (best.values[..., 0] - best.values[..., 1]).amin(-1)
    num_distinct = torch.tensor([len(row.unique()) for row in ids[:, length:]])
    is_good = (margin > MARGIN) & (num_distinct >= NUM_DISTINCT)
    if not is_good.any():
        return None
    good = int(is_good.int().argmax())
    # Of the others some are decided by rounding, which a cache changes.
    assert torch.equal(best.indices[good, :, 0], ids[good, length:]), "generate, cached, and forward agree"
    return ids[good], rows[good], float(margin[good])


def generate(model: Any, prompts: Tensor) -> Tensor:
    """transformers' own greedy `generate`, past every end-of-sequence id; prompts (B, T) to (B, T + `NUM_TOKENS`)."""
    ids: Tensor = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=NUM_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return ids


def sample(model: Any, prompt: list[int], params: SamplingParams, seed: int, choice: int = 0) -> list[int]:
    """What `SamplingParams` promises, token by token in plain Python, on transformers' logits; a stop id included.

    Its random numbers are the product's own (`gumbel`), nothing else is. `max_tokens` must be set; the model's
    end-of-sequence ids do not count, so give `ignore_eos`.
    """
    output: list[int] = []
    while len(output) < (params.max_tokens or 0):
        logits = dict(enumerate(tiny.hf_logits(model, prompt + output)[-1].tolist()))
        token_id = _choose(_adjusted(logits, prompt, output, params), params, seed, len(output), choice)
        output.append(token_id)
        if token_id in params.stop_token_ids:
            break
    return output


def _adjusted(
    logits: dict[int, float], prompt: list[int], output: list[int], params: SamplingParams
) -> dict[int, float]:
    for token_id, bias in params.logit_bias.items():
        logits[token_id] += bias
    for token_id in {*prompt, *output}:
        penalty = params.repetition_penalty
        logits[token_id] = logits[token_id] / penalty if logits[token_id] > 0 else logits[token_id] * penalty
    for token_id, count in Counter(output).items():
        logits[token_id] -= params.presence_penalty + params.frequency_penalty * count
    if len(output) < params.min_tokens:
        for token_id in params.stop_token_ids:
            logits[token_id] = -math.inf
    return logits


def _choose(logits: dict[int, float], params: SamplingParams, seed: int, position: int, choice: int) -> int:
    order = sorted(logits, key=lambda token_id: (-logits[token_id], token_id))
    if params.temperature == 0:
        return order[0]
    kept = order[: params.top_k or None]
    heated = {token_id: (logits[token_id] - logits[order[0]]) / params.temperature for token_id in kept}
    weight = {token_id: math.exp(value) for token_id, value in heated.items()}
    enough, mass = params.top_p * math.fsum(weight.values()), 0.0
    survivors = []
    for token_id in kept:
        if params.top_p < 1 and mass >= enough:
            break
        mass += weight[token_id]
        if weight[token_id] >= params.min_p:
            survivors.append(token_id)
    column = torch.tensor(survivors)
    words = [torch.tensor(value) for value in (_signed(seed), position, choice)]
    noise = dict(zip(survivors, gumbel(column, *words).tolist(), strict=True))
    return max(survivors, key=lambda token_id: heated[token_id] + noise[token_id])


def _signed(seed: int) -> int:
    return seed - (1 << 64) if seed >> 63 else seed

"""`Sampler` against a slow reference per row, and its distributions against transformers' processors. About 4 s."""

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from phalanx.kernels.philox import gumbel
from phalanx.runtime.kv.spec import KVSpec
from phalanx.runtime.plan import DomainPlan, Extend, SlotInit, SlotSampling
from phalanx.runtime.sampler import Sampled, Sampler
from phalanx.runtime.slot_table import SlotTable

VOCABULARY = 60
SPEC = KVSpec(block_size=4, num_blocks=300, max_model_len=40)
CPU = torch.device("cpu")
DEFAULTS: dict[str, Any] = {
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "logit_bias": {},
    "seed": 7,
    "choice": 0,
    "min_tokens": 0,
    "stop_token_ids": [],
    "logprobs": -1,
    "prompt_logprobs": -1,
}


class Row:
    """A sequence that is about to be sampled, in one chunk."""

    def __init__(self, prompt: list[int], output: list[int], **sampling: Any) -> None:
        self.prompt, self.output, self.tokens = prompt, output, prompt + output
        self.sampling = SlotSampling(**{**DEFAULTS, **sampling})


def run(rows: list[Row], logits: Tensor, *, order: list[int] | None = None) -> Sampled:
    """Sample each row from its logits [N, V]; `order` puts them into other slots and another order."""
    table = SlotTable(len(rows), SPEC, CPU)
    order = order or list(range(len(rows)))
    # Rows of one token come first, so make every row a chunk of at least two.
    inits, extends, plan, next_block = [], [], [], 1
    for slot, index in enumerate(order):
        row = rows[index]
        packed = b"".join(token_id.to_bytes(4, "little") for token_id in row.tokens)
        inits.append(SlotInit(slot, packed, len(row.prompt), 0, row.sampling))
        blocks = list(range(next_block, next_block + SPEC.max_blocks(len(row.tokens))))
        next_block += len(blocks)
        extends.append(Extend(slot, 0, blocks))
        plan += [slot, len(row.tokens), 1]
    table.apply(DomainPlan([], inits, extends, plan))
    batch, sampled_rows = table.build(plan)
    width = len(batch.sample_rows)
    given = logits[order] if width == len(rows) else logits
    return Sampler(table, {}).sample(given.clone(), sampled_rows)


def make_rows(seed: int, count: int, **fixed: Any) -> list[Row]:
    """Rows with random settings, penalties and biases."""
    rng = random.Random(seed)
    rows = []
    for index in range(count):
        sampling: dict[str, Any] = {
            "temperature": rng.choice((0.0, 0.3, 1.0, 2.5)),
            "top_k": rng.choice((0, 1, 5, VOCABULARY + 3)),
            "top_p": rng.choice((1.0, 0.9, 0.3)),
            "min_p": rng.choice((0.0, 0.05, 0.5)),
            "repetition_penalty": rng.choice((1.0, 1.3, 0.7)),
            "presence_penalty": rng.choice((0.0, 1.1, -0.4)),
            "frequency_penalty": rng.choice((0.0, 0.6, -0.2)),
            "logit_bias": rng.choice(({}, {rng.randrange(VOCABULARY): 3.5, rng.randrange(VOCABULARY): -100.0})),
            "seed": rng.getrandbits(64),
            "choice": rng.randrange(3),
            "min_tokens": rng.choice((0, 0, 3, 9)),
            "stop_token_ids": rng.sample(range(VOCABULARY), 4),
            "logprobs": rng.choice((-1, 0, 2, 5)),
        }
        prompt = rng.choices(range(VOCABULARY), k=rng.randrange(2, 20))
        output = rng.choices(range(VOCABULARY), k=rng.randrange(0, 12))
        rows.append(Row(prompt, output, **{**sampling, "seed": sampling["seed"] + index & 2**64 - 1, **fixed}))
    return rows


def make_logits(seed: int, count: int) -> Tensor:
    return torch.randn((count, VOCABULARY), generator=torch.Generator().manual_seed(seed)) * 3


def adjusted(row: Row, logits: Tensor) -> Tensor:
    """Bias, penalties and the min_tokens mask, one id after the other, in double precision."""
    scores, sampling = logits.double().tolist(), row.sampling
    for token_id in range(VOCABULARY):
        score = scores[token_id] + sampling.logit_bias.get(token_id, 0.0)
        if token_id in row.tokens:
            factor = sampling.repetition_penalty
            score = score / factor if score > 0 else score * factor
        count = row.output.count(token_id)
        score -= sampling.frequency_penalty * count + sampling.presence_penalty * (count > 0)
        if len(row.output) < sampling.min_tokens and token_id in sampling.stop_token_ids:
            score = -math.inf
        scores[token_id] = score
    return torch.tensor(scores, dtype=torch.float64)


def warped(row: Row, scores: Tensor) -> Tensor:
    """transformers' processors: [V] scores whose softmax is the distribution to sample from."""
    sampling = row.sampling
    processors = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        processors.append(MinPLogitsWarper(sampling.min_p))
    tokens: Any = torch.tensor([row.tokens])
    result: Tensor = processors(tokens, scores[None].float())[0]
    return result


def expected_token(row: Row, logits: Tensor) -> tuple[int, float]:
    """The id by the Gumbel-max rule over transformers' distribution, and by how much it wins."""
    scores = adjusted(row, logits)
    if row.sampling.temperature:
        ids = torch.arange(VOCABULARY)
        seed = row.sampling.seed - (2**64 if row.sampling.seed >= 2**63 else 0)
        position, choice = torch.tensor(len(row.output)), torch.tensor(row.sampling.choice)
        scores = (warped(row, scores) + gumbel(ids, torch.tensor(seed), position, choice)).double()
    best = scores.topk(2).values
    return int(scores.argmax()), float(best[0] - best[1])


@pytest.mark.parametrize("seed", range(8))
def test_every_row_equals_the_slow_reference(seed: int) -> None:
    rows, logits = make_rows(seed, 24), make_logits(seed, 24)
    got = run(rows, logits)
    decided = 0
    for index, row in enumerate(rows):
        token_id, margin = expected_token(row, logits[index])
        if margin > 1e-4:  # fp32 against fp64: a smaller lead decides nothing
            assert int(got.token_ids[index]) == token_id, (row.sampling, margin)
            decided += 1
    assert decided >= 23
    assert not got.failed.any()


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.7])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    rows, logits = make_rows(3, 8), make_logits(3, 8)
    for row, one in zip(rows, logits, strict=True):
        plain = Row(row.prompt, row.output, repetition_penalty=penalty)
        expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([row.tokens]), one[None].clone())[0]
        torch.testing.assert_close(adjusted(plain, one).float(), expected, rtol=1e-6, atol=1e-6)
        assert int(run([plain], one[None]).token_ids) == int(expected.argmax())


@pytest.mark.parametrize(
    "setting",
    [{}, {"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.2}, {"top_k": 20, "top_p": 0.9, "min_p": 0.05, "temperature": 1.7}],
)
def test_frequencies_are_those_of_transformers(setting: dict[str, Any]) -> None:
    count, logits = 3000, make_logits(11, 1) / 3
    rows = [Row([1, 2], [], **{"temperature": 1.0, "seed": 1000 + i, **setting}) for i in range(60)]
    probabilities = warped(rows[0], logits[0]).softmax(-1)
    observed = torch.zeros(VOCABULARY)
    for start in range(0, count, 60):
        for i, row in enumerate(rows):
            row.sampling = SlotSampling(**{**DEFAULTS, "temperature": 1.0, "seed": start * 60 + i, **setting})
        observed += run(rows, logits.expand(60, -1)).token_ids.bincount(minlength=VOCABULARY)
    assert not observed[probabilities == 0].any()
    alive = probabilities > 0
    chi_square = float(((observed - count * probabilities)[alive] ** 2 / (count * probabilities[alive])).sum())
    freedom = int(alive.sum()) - 1
    # Mean `freedom`, variance 2 * freedom: five sigma.
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom) + 10


def test_a_row_does_not_depend_on_its_batch() -> None:
    rows, logits = make_rows(21, 20), make_logits(21, 20)
    together = run(rows, logits)
    alone = [run([row], logits[i : i + 1]) for i, row in enumerate(rows)]
    assert together.token_ids.tolist() == [int(one.token_ids) for one in alone]
    order = random.Random(2).sample(range(20), 20)
    shuffled = run(rows, logits, order=order)
    assert together.token_ids[order].tolist() == shuffled.token_ids.tolist()
    assert together.logprobs is not None
    for place, index in enumerate(together.logprob_rows):
        single = alone[index].logprobs
        assert single is not None
        assert torch.equal(together.logprobs.logprobs[place], single.logprobs[0])
        count = rows[index].sampling.logprobs
        assert torch.equal(together.logprobs.top_ids[place, :count], single.top_ids[0, :count])


def test_seed_position_and_choice_make_the_stream() -> None:
    logits = make_logits(5, 1)

    def draw(seed: int, choice: int, num_output: int, num_prompt: int = 3) -> int:
        row = Row([1] * num_prompt, [2] * num_output, temperature=1.5, seed=seed, choice=choice)
        return int(run([row], logits).token_ids)

    stream = [draw(9, 0, n) for n in range(20)]
    assert stream == [draw(9, 0, n, num_prompt=11) for n in range(20)]  # the position in the output counts
    assert stream != [draw(10, 0, n) for n in range(20)]
    assert stream != [draw(9, 1, n) for n in range(20)]
    assert stream != [draw(9 + 2**63, 0, n) for n in range(20)]  # all 64 bits
    assert len(set(stream)) > 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_bad_row_fails_alone(temperature: float) -> None:
    rows, logits = make_rows(31, 12, logprobs=3, temperature=temperature), make_logits(31, 12)
    clean = run(rows, logits)
    for bad, value in ((0, math.nan), (5, math.inf), (11, math.nan), (7, -math.inf)):
        broken = logits.clone()
        if value == -math.inf:
            broken[bad] = value
        else:
            broken[bad, random.Random(bad).randrange(VOCABULARY)] = value
        rows[bad].sampling = SlotSampling(**{**DEFAULTS, "temperature": temperature, "logprobs": 3})
        got = run(rows, broken)
        others = [i for i in range(12) if i != bad]
        assert got.failed.tolist() == [i == bad for i in range(12)]
        # A void id, but the input of a step that runs already.
        assert 0 <= int(got.token_ids[bad]) < VOCABULARY
        rows[bad].sampling = make_rows(31, 12, logprobs=3, temperature=temperature)[bad].sampling
        assert torch.equal(got.token_ids[others], clean.token_ids[others])
        assert got.logprobs is not None
        assert clean.logprobs is not None
        for mine, theirs in zip(got.logprobs, clean.logprobs, strict=True):
            assert torch.equal(mine[others], theirs[others])


def test_greedy_ties_go_to_the_lowest_id() -> None:
    logits = torch.zeros((3, VOCABULARY))
    logits[1, [40, 13, 50]] = 2.0
    logits[2, -1] = 1.0
    for extra in ([], [Row([1, 2], [], temperature=1.0)]):  # alone, and through the sampling op
        rows = [Row([1, 2], [], logprobs=4), Row([1, 2], []), Row([1, 2], []), *extra]
        got = run(rows, torch.cat([logits, torch.zeros((len(extra), VOCABULARY))]))
        assert got.token_ids[:3].tolist() == [0, 13, VOCABULARY - 1]
        assert got.logprobs is not None
        assert got.logprobs.top_ids[0].tolist() == [0, 1, 2, 3]


def test_logprobs_are_those_of_the_model_not_of_the_sampler() -> None:
    rows, logits = make_rows(41, 16, logprobs=5), make_logits(41, 16)
    got = run(rows, logits)
    exact = logits.double().log_softmax(-1)
    assert got.logprob_rows == list(range(16))
    assert got.logprobs is not None
    for i, token_id in enumerate(got.token_ids.tolist()):
        assert float(got.logprobs.logprobs[i]) == pytest.approx(float(exact[i, token_id]), abs=1e-5)
        assert int(got.logprobs.ranks[i]) == 1 + int((exact[i] > exact[i, token_id]).sum())
        assert got.logprobs.top_ids[i].tolist() == exact[i].topk(5).indices.tolist()
        torch.testing.assert_close(got.logprobs.top_logprobs[i].double(), exact[i].topk(5).values, rtol=0, atol=1e-5)


def test_only_rows_that_ask_are_looked_at() -> None:
    rows, logits = make_rows(43, 6, logprobs=-1), make_logits(43, 6)
    assert run(rows, logits).logprobs is None
    rows[2].sampling = SlotSampling(**{**DEFAULTS, "logprobs": 0})
    rows[4].sampling = SlotSampling(**{**DEFAULTS, "logprobs": 2})
    got = run(rows, logits)
    assert got.logprob_rows == [2, 4]
    assert got.logprobs is not None
    assert got.logprobs.top_ids.shape == (2, 2)


def test_prompt_logprobs_of_a_chunk() -> None:
    """Two rows sample, the second also wants its prompt: its logits follow those of the samples."""
    prompt = [5, 6, 7, 8, 9]
    rows = [Row([1, 2], []), Row(prompt, [3], prompt_logprobs=2)]
    logits = make_logits(51, 2 + 4)
    got = run(rows, logits)
    assert got.token_ids.tolist() == logits[:2].argmax(-1).tolist()
    ((values, targets),) = got.prompt_logprobs
    assert targets.tolist() == prompt[1:]
    exact = logits[2:].double().log_softmax(-1)
    torch.testing.assert_close(values.logprobs.double(), exact.gather(1, targets[:, None])[:, 0], rtol=0, atol=1e-5)
    assert values.top_ids.tolist() == exact.topk(2).indices.tolist()


@pytest.mark.parametrize("num_output", [0, 2, 3])
def test_no_stop_id_before_min_tokens(num_output: int) -> None:
    logits = torch.zeros((1, VOCABULARY))
    logits[0, [3, 4]] = 10.0
    for temperature in (0.0, 1.0):
        row = Row(
            [1, 2], [9] * num_output, min_tokens=3, stop_token_ids=[3, 4, VOCABULARY + 7], temperature=temperature
        )
        assert (int(run([row], logits).token_ids) in (3, 4)) == (num_output >= 3)


def test_nothing_to_sample() -> None:
    table = SlotTable(1, SPEC, CPU)
    _, rows = table.build([])
    got = Sampler(table, {}).sample(torch.zeros((0, VOCABULARY)), rows)
    assert got.token_ids.shape == got.failed.shape == (0,)
    assert (got.logprobs, got.logprob_rows, got.prompt_logprobs) == (None, [], [])

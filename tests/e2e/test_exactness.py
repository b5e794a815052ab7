"""The whole offline engine against transformers: every family, every layout, under pressure. 280 s on one core.

An engine whose steps are smaller than the prompts and whose pool is too small for all of them answers two batches: the
first asks for the logits of two prompts; the second answers all, in chunks, from cached prefixes, and preempted. Every
rank of the last stage writes down every logit it computes, and each is compared with transformers' for the same ids.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from phalanx import LLM, SamplingParams
from tests.support import tiny
from tests.support.engines import SHARING_CORES, forked_ranks, read_records
from tests.support.oracle import NUM_TOKENS, TOLERANCE, Oracle, make_oracle

LAYOUTS = {"1,1,1": (1, 1, 1), "2,1,1": (2, 1, 1), "1,2,1": (1, 2, 1), "2,2,1": (2, 2, 1), "1,1,2": (1, 1, 2)}
LAYOUTS |= {"4,1,1": (4, 1, 1)}
MOE_LAYOUTS = {"1,1,1": (1, 1, 1), "2,1,1": (2, 1, 1), "1,1,2": (1, 1, 2), "1,1,4": (1, 1, 4), "2,1,2": (2, 1, 2)}
MOE_LAYOUTS |= {"1,2,2": (1, 2, 2)}
BUDGET = 24
PRESSURE = {
    "scheduler": {"max_batch_tokens": BUDGET, "max_sequences": 6, "max_model_len": 112},
    "kv": {"num_blocks": 30, "block_size": 8},
}
TITLE = "family x (tp,pp,dp) against transformers: largest logit error, equal tokens, cached prompt tokens, preemptions"
MOE_TITLE = "MoE family x (tp,pp,dp) against transformers: largest logit error, equal tokens over all dispatchers"
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
ASKING = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, prompt_logprobs=0)


@pytest.fixture(scope="module")
def oracle_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Oracle]:
    folder = tmp_path_factory.mktemp("checkpoints")
    made: dict[str, Oracle] = {}

    def make(family: str) -> Oracle:
        if family not in made:
            made[family] = make_oracle(family, folder)
        return made[family]

    return make


@pytest.mark.multi
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", sorted(set(tiny.family_names()) - set(tiny.moe_family_names())))
def test_engine_equals_transformers(family, layout, oracle_of, tmp_path, record_property):
    oracle, (tp, pp, dp) = oracle_of(family), LAYOUTS[layout]
    shape = {"tensor": tp, "pipeline": pp, "data": dp}
    with forked_ranks(tmp_path), LLM(str(oracle.path), **shape, **SHARING_CORES, **PRESSURE) as llm:
        assert min(map(len, oracle.prompts[:2])) > BUDGET
        assert _answer(llm, oracle, [0, 1], ASKING) == [0, 0]
        assert llm.engine.scheduler.num_preemptions == 0
        cached = _answer(llm, oracle, [0, 1, 2, 3, 4, 5], GREEDY)
        assert min(cached[:2]) > 0
        num_preemptions = llm.engine.scheduler.num_preemptions
        assert num_preemptions > 0
    error = _largest_error(oracle, tmp_path, num_ranks=tp * dp)
    assert error < TOLERANCE
    cell = f"{error:.1e} {6 * NUM_TOKENS} {sum(cached)} {num_preemptions}"
    record_property("table", (TITLE, family, layout, cell))


@pytest.mark.multi
@pytest.mark.parametrize("layout", MOE_LAYOUTS)
@pytest.mark.parametrize("family", tiny.moe_family_names())
def test_expert_parallel_engine_equals_transformers(family, layout, oracle_of, tmp_path, record_property):
    """Every dispatcher answers in turn; two nodes of experts, so that two_hop has both of its hops."""
    oracle, (tp, pp, dp) = oracle_of(family), MOE_LAYOUTS[layout]
    shape, group = {"tensor": tp, "pipeline": pp, "data": dp}, tp * dp
    kinds = ("allgather", "flat", "two_hop") if group > 1 else ("local",)
    moe = {"node_size": max(1, group // 2), "dispatch": kinds[0]}  # auto would calibrate first
    with forked_ranks(tmp_path), LLM(str(oracle.path), **shape, **SHARING_CORES, **PRESSURE, moe=moe) as llm:
        assert llm.engine.mesh.planner is not None
        _answer(llm, oracle, [0, 1], ASKING)
        for number, kind in enumerate(kinds):
            llm.engine.mesh.planner.policy.fix(kind)
            _answer(llm, oracle, [number, number + 1] if number else [0, 1, 2, 3, 4, 5], GREEDY)
        num_preemptions = llm.engine.scheduler.num_preemptions
        assert num_preemptions > 0 or dp > 2  # several pools of the same size are enough for all
        llm.engine.mesh.planner.check()
    error = _largest_error(oracle, tmp_path, num_ranks=tp * dp)
    assert error < TOLERANCE
    cell = f"{error:.1e} {(6 + 2 * (len(kinds) - 1)) * NUM_TOKENS}"
    record_property("table", (MOE_TITLE, family, layout, cell))


def _answer(llm: LLM, oracle: Oracle, which: list[int], params: SamplingParams) -> list[int]:
    """Answer some of the oracle's prompts together, all tokens equal; returns the cached tokens of each prompt."""
    results = llm.generate([oracle.prompts[i] for i in which], params)
    assert [result.token_ids for result in results] == [oracle.outputs[i][: params.max_tokens] for i in which]
    while llm.engine.has_work:
        llm.engine.step(1.0)
    llm.engine.check()
    return [result.num_cached_tokens for result in results]


def _largest_error(oracle: Oracle, folder: Path, num_ranks: int) -> float:
    """Over all recorded logits; every output token, and every position of the first two prompts, must be there."""
    expected = dict(oracle.contexts())
    seen: set[tuple[int, ...]] = set()
    ranks: set[int] = set()
    error = 0.0
    for record in read_records(folder):
        error = max(error, float((record.logits - expected[record.token_ids]).abs().max()))
        seen.add(record.token_ids)
        ranks.add(record.rank)
    assert len(ranks) == num_ranks, "all ranks of the last stage"
    for i, (prompt, output) in enumerate(zip(oracle.prompts, oracle.outputs, strict=True)):
        ids = tuple(prompt + output)
        first = 1 if i < 2 else len(prompt)
        assert all(ids[:length] in seen for length in range(first, len(ids)))
    return error

"""Task-level routing through the whole engine, against the reference that runs one task at a time. Runs in 40 s."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from phalanx import LLM, SamplingParams
from phalanx.errors import ConfigError, InvalidRequestError
from phalanx.runtime.frames import Place
from tests.support import tiny
from tests.support.census import Census
from tests.support.deployment import deployed
from tests.support.engines import SHARING_CORES, forked_ranks
from tests.support.oracle import generate
from tests.support.traffic import planner_of

# Tasks x (3, 5 and 8 experts) x 2; a third task differs from the first in the last layer alone.
TABLE = [[[0, 1], [4, 0], [7, 2]], [[2, 1], [3, 1], [0, 5]], [[0, 1], [4, 0], [6, 1]]]
WEIGHTS = [[[0.5, 0.7], [0.2, 0.8], [1.0, 0.4]], [[0.9, 0.1], [0.3, 0.6], [0.5, 0.5]], [[0.5, 0.7], [0.2, 0.8], [1, 1]]]
LENGTH, NUM_TOKENS, MARGIN = 40, 24, 5e-3
LIMITS: dict[str, Any] = {
    "scheduler": {"max_batch_tokens": 24, "max_sequences": 4, "max_model_len": 112},
    "kv": {"num_blocks": 30, "block_size": 8},
    **SHARING_CORES,
}
LAYOUTS = {
    "1 rank": ({}, {}),
    "data 2, flat": ({"data": 2}, {"dispatch": "flat", "redundant_experts": 2}),
    "data 2, two_hop": ({"data": 2}, {"dispatch": "two_hop", "node_size": 1, "exact": True}),
    "tensor 2, allgather": ({"tensor": 2}, {"dispatch": "allgather"}),
    "pipeline 2": ({"pipeline": 2}, {}),
}


class Tasks(NamedTuple):
    path: Path
    prompts: list[list[int]]
    outputs: list[list[list[int]]]  # of each prompt, by task


def make(folder: Path, **overrides: Any) -> Tasks:
    """Prompts whose greedy answers are no matter of rounding under any task, and another one under each."""
    path = tiny.make_checkpoint("pr_moe", folder, task_experts=TABLE, **overrides)
    model = tiny.load_hf(path)
    drawn = torch.randint(1, 203, (160, LENGTH), generator=torch.Generator().manual_seed(3))
    answers, is_good = [], torch.ones(len(drawn), dtype=torch.bool)
    for task in range(len(TABLE)):
        model.use_task(task)
        ids = generate(model, drawn)[:, : LENGTH + NUM_TOKENS]
        with torch.inference_mode():
            best = model(ids).logits[:, LENGTH - 1 : -1].topk(2, dim=-1)
        assert torch.equal(best.indices[..., 0], ids[:, LENGTH:])
        is_good &= (best.values[..., 0] - best.values[..., 1]).amin(-1) > MARGIN
        answers.append(ids[:, LENGTH:])
    for one in range(3):
        for other in range(one):
            is_good &= (answers[one] != answers[other]).any(-1)
    good = is_good.nonzero().flatten().tolist()
    assert len(good) >= 3
    outputs = [[answer[index].tolist() for answer in answers] for index in good]
    return Tasks(path, [drawn[index].tolist() for index in good], outputs)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Tasks:
    return make(tmp_path_factory.mktemp("tasks"), task_weights=WEIGHTS)


@pytest.fixture
def llm(tasks: Tasks) -> Iterator[LLM]:
    with LLM(str(tasks.path), **LIMITS) as llm:
        yield llm


def asking(task: int | None) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, task=task)


def test_a_task_is_its_experts(tasks: Tasks, llm: LLM) -> None:
    """Each alone; no task means task 0."""
    for task in (None, 0, 1, 2):
        (result,) = llm.generate([tasks.prompts[0]], asking(task))
        assert result.token_ids == tasks.outputs[0][task or 0]


def test_equal_weights_without_a_table(tmp_path: Path) -> None:
    tasks = make(tmp_path)
    with LLM(str(tasks.path), **LIMITS) as llm:
        results = llm.generate([tasks.prompts[0]] * 3, [asking(task) for task in range(3)])
    assert [result.token_ids for result in results] == tasks.outputs[0]


@pytest.mark.multi
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tasks_side_by_side(layout: str, tasks: Tasks) -> None:
    """All prompts under all tasks at once, with a pool too small for them: chunks, cached prefixes, preemptions."""
    shape, moe = LAYOUTS[layout]
    count = range(len(tasks.prompts[:5]))
    asked = [(prompt, task) for prompt in count for task in (1, 0, 2)]
    with forked_ranks(), LLM(str(tasks.path), **shape, moe=moe, **LIMITS) as llm:
        for _ in range(2):
            results = llm.generate([tasks.prompts[prompt] for prompt, _ in asked], [asking(task) for _, task in asked])
            for (prompt, task), result in zip(asked, results, strict=True):
                assert result.token_ids == tasks.outputs[prompt][task], f"prompt {prompt} under task {task}"
        planner_of(llm.engine).check()
        llm.engine.check()


def test_the_prefix_cache_does_not_mix_tasks(tasks: Tasks, llm: LLM) -> None:
    """Task 2 shares all experts but the last layer's with task 0: even then each has blocks of its own."""
    cached = []
    for task in (0, 2, 1, None, 2, 1):
        (result,) = llm.generate([tasks.prompts[0]], asking(task))
        assert result.token_ids == tasks.outputs[0][task or 0]
        cached.append(result.num_cached_tokens)
    assert cached[:3] == [0, 0, 0]
    assert all(count >= LENGTH - 8 for count in cached[3:])


def test_load_and_drops_are_counted(tasks: Tasks) -> None:
    """All of a request's 40 tokens want the same two experts of each layer; a limit lets few of them in."""
    moe = {"capacity": {"factor": 0.5}}
    with LLM(str(tasks.path), **LIMITS, moe=moe) as llm:
        planner, once = planner_of(llm.engine), SamplingParams(temperature=0, max_tokens=1, task=1)
        while not planner.num_dropped:
            llm.generate([tasks.prompts[0]], once)
            assert planner.num_steps < 1000
        for load_E, experts in zip(planner.load.load(), TABLE[1], strict=True):
            assert set(load_E.nonzero()[0].tolist()) == set(experts)


REFUSED = {
    "above": (3, r"task \(3\) is unknown; this model has tasks 0 to 2"),
    "negative": (-1, r"task \(-1\) must be an integer from 0 to 2147483647"),
    "text": ("0", r"task \('0'\) must be an integer from 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_tasks_the_model_has_not(case: str, tasks: Tasks, llm: LLM) -> None:
    task, message = REFUSED[case]
    with pytest.raises(InvalidRequestError, match=message):
        llm.generate([tasks.prompts[0]], SamplingParams(task=task))  # type: ignore[arg-type]
    assert not llm.engine.has_work


def test_a_task_for_a_model_without_any() -> None:
    with (
        LLM("tiny-moe", **SHARING_CORES) as llm,
        pytest.raises(InvalidRequestError, match=r"task \(0\): this model has no tasks \(0\); leave the field out"),
    ):
        llm.generate([[5, 6]], SamplingParams(task=0))


@pytest.mark.parametrize("task", [None, 3])
def test_an_engine_runs_nothing_without_its_task(task: int | None, tasks: Tasks, llm: LLM) -> None:
    """Whatever a controller has let through: such tokens would visit no expert, or miss the cache's namespace."""
    llm.engine.place(Place("stray", 0, b"\1\0\0\0", [b""], asking(task), 1))
    (row,) = llm.engine.step()
    assert (row.finish, row.error) == ("error", f"task {task} is none of this model's 3")
    assert not llm.engine.has_work


@pytest.mark.slow
def test_a_deployment(tasks: Tasks) -> None:
    """The controller learns how many tasks there are, and a request's goes over gRPC to both ranks."""
    text = f"""
model: {{path: {tasks.path}, dtype: float32}}
ray: {{address: local, nodes: 2}}
device: cpu
parallel: {{data: 2}}
moe: {{dispatch: two_hop}}
workers: {{threads: 1}}
server: {{listen: '127.0.0.1:0', metrics: 'off'}}
"""
    with Census() as census, deployed(text, census) as deployment, deployment.client() as client:
        for prompt, by_task in list(zip(tasks.prompts, tasks.outputs, strict=True))[:3]:
            for task in (1, None, 2):
                chunks = list(client.generate(prompt, asking(task)))
                assert [token_id for chunk in chunks for token_id in chunk.token_ids] == by_task[task or 0]
        with pytest.raises(InvalidRequestError, match=r"task \(3\) is unknown; this model has tasks 0 to 2"):
            client.submit(tasks.prompts[0], asking(3))


def test_overflow_to_the_next_best_needs_a_router(tasks: Tasks) -> None:
    message = "moe.capacity.overflow next needs the scores of a router, but pr_moe chooses experts by task; use drop"
    with pytest.raises(ConfigError, match=message):
        LLM(str(tasks.path), **LIMITS, moe={"capacity": {"factor": 1.0, "overflow": "next"}})

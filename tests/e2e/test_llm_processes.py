"""The offline API with ranks in child processes: equal answers, lost ranks, nothing left behind. Runs in 45 s.

Where a test says "real", ranks are the product's own child processes; elsewhere they are forked, which is much quicker.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import psutil
import pytest

from phalanx import LLM, SamplingParams
from phalanx.errors import PhalanxError, ReplicaLostError
from tests.support import tiny
from tests.support.engines import SHARING_CORES, forked_ranks

RNG = random.Random(11)
PROMPTS = ["class Stack:\n", [RNG.randrange(3, 4000) for _ in range(70)], "import os\n\n\ndef main"]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=32, stop=("\n\n\n\n",)),
    SamplingParams(seed=8, top_p=0.9, max_tokens=32, n=2, logprobs=2, ignore_eos=True),
    SamplingParams(seed=9, temperature=1.2, repetition_penalty=1.2, max_tokens=32, prompt_logprobs=0),
]
LIMITS = {"scheduler": {"max_batch_tokens": 48}, **SHARING_CORES}
ENDLESS = SamplingParams(temperature=0, max_tokens=1500, ignore_eos=True)
KILLED_S, FROZEN_S = 1.0, 5.0
"""Limits for noticing a rank that is gone, or alive and silent."""

SHAPES = {"tp 2": {"tensor": 2}, "pp 2": {"pipeline": 2}, "dp 2": {"data": 2}}


def _answers(llm: LLM) -> list[Any]:
    return [
        (choice.token_ids, choice.text, choice.finish_reason, choice.stop_match)
        for result in llm.generate(PROMPTS, PARAMS)
        for choice in result.choices
    ]


def _pids(llm: LLM) -> list[int]:
    return [ready.pid for ready in llm.engine.executor.ready.values()]


@pytest.mark.multi
@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "rank", "number", "limit_s"),
    [({"tensor": 2}, 1, signal.SIGSTOP, FROZEN_S), ({"tensor": 2, "pipeline": 2}, 2, signal.SIGKILL, KILLED_S)],
    ids=["tp 2, then frozen", "pp 2 x tp 2, then killed"],
)
def test_real_processes(shape, rank, number, limit_s):
    """They answer as one rank does; one of them is lost; closing ends the others, and the frozen one too."""
    with LLM("tiny", **LIMITS) as alone:
        expected = _answers(alone)
    with LLM("tiny", **LIMITS, **shape) as llm:
        pids = _pids(llm)
        assert len({*pids, os.getpid()}) == len(pids) + 1
        assert _answers(llm) == expected
        _lose(llm, rank, number, limit_s)
    assert not any(map(psutil.pid_exists, pids))


@pytest.mark.multi
@pytest.mark.slow
def test_real_processes_end_with_their_parent():
    code = (
        "import time, phalanx; llm = phalanx.LLM('tiny', tensor=2, device='cpu', workers={'threads': 1});"
        "print(*[ready.pid for ready in llm.engine.executor.ready.values()], flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    with contextlib.closing(parent.stdout):
        ranks = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        parent.kill()
        parent.wait()
    assert len(ranks) == 2
    assert psutil.wait_procs(ranks, 3.0)[1] == []


@pytest.mark.multi
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_killed_rank_is_named_in_time(shape, rank):
    with forked_ranks(), LLM("tiny", **LIMITS, **SHAPES[shape]) as llm:
        _lose(llm, rank, signal.SIGKILL, KILLED_S)
        before = time.monotonic()
        with pytest.raises(ReplicaLostError):
            llm.generate(PROMPTS, PARAMS)
        assert time.monotonic() - before < KILLED_S


@pytest.mark.multi
@pytest.mark.parametrize(("shape", "rank"), [("tp 2", 0), ("pp 2", 0), ("dp 2", 1)])
def test_frozen_rank_is_named_in_time(shape, rank):
    with forked_ranks(), LLM("tiny", **LIMITS, **SHAPES[shape]) as llm:
        _lose(llm, rank, signal.SIGSTOP, FROZEN_S)


@pytest.mark.multi
@pytest.mark.parametrize("rank", [0, 1])
def test_rank_lost_while_idle(rank):
    with forked_ranks(), LLM("tiny", **LIMITS, tensor=2) as llm:
        os.kill(_pids(llm)[rank], signal.SIGKILL)
        psutil.wait_procs([psutil.Process(_pids(llm)[rank])], 3.0)
        before = time.monotonic()
        with pytest.raises(ReplicaLostError, match=f"rank {rank} .*died"):
            llm.generate(PROMPTS, PARAMS)
        assert time.monotonic() - before < KILLED_S


@pytest.mark.multi
def test_rank_that_cannot_load_says_why(tmp_path):
    folder = tiny.make_checkpoint("llama", tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with forked_ranks(), pytest.raises(PhalanxError, match=r"(?s)rank . .*CheckpointError.*model\.safetensors"):
        LLM(str(folder), **LIMITS, tensor=2)


@pytest.mark.multi
def test_closing_twice_and_closing_early():
    with forked_ranks(), LLM("tiny", **LIMITS, pipeline=2) as llm:
        pids = _pids(llm)
        llm.close()
        assert not any(map(psutil.pid_exists, pids))
        llm.close()


def _lose(llm: LLM, rank: int, number: int, limit_s: float) -> None:
    """Signal a rank in the middle of `generate`, which must say within the limit which one was lost."""
    signalled: list[float] = []
    before = llm.engine.scheduler.num_generated_tokens

    def signal_rank() -> None:
        while llm.engine.scheduler.num_generated_tokens < before + 20:
            time.sleep(0.01)
        os.kill(_pids(llm)[rank], number)
        signalled.append(time.monotonic())

    thread = threading.Thread(target=signal_rank, daemon=True)
    thread.start()
    with pytest.raises(ReplicaLostError) as caught:
        llm.generate(PROMPTS * 2, ENDLESS)
    assert time.monotonic() - signalled[0] < limit_s
    assert str(caught.value).startswith(f"rank {rank} (node "), caught.value
    assert f"pid {_pids(llm)[rank]}" in str(caught.value)
    assert ("silent" if number == signal.SIGSTOP else "died") in str(caught.value)
    thread.join()

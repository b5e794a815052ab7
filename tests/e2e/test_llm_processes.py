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
from phalanx.errors import ConfigError, PhalanxError, ReplicaLostError
from phalanx.models.loading import read_config
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


@pytest.mark.multi
def test_scaling_refused_and_broken_off_by_a_loss(tmp_path, monkeypatch):
    """A size that cannot be changes nothing; a member's death ends the LLM here as it does in `generate`."""
    folder = tiny.make_checkpoint("mixtral", tmp_path)
    with forked_ranks(), LLM(str(folder), **LIMITS, data=2) as llm:
        for data in (0, 1025, 2.0, True):
            with pytest.raises(ConfigError, match=r"data .* must be an integer from 1 to 1024"):
                llm.scale(data)
        assert len(llm.generate([[5, 6, 7]], SamplingParams(max_tokens=4, ignore_eos=True))[0].token_ids) == 4
        step, pids = llm.engine.step, _pids(llm)

        def step_after_a_kill(*args: Any, **options: Any) -> Any:
            os.kill(pids[1], signal.SIGKILL)
            return step(*args, **options)

        monkeypatch.setattr(llm.engine, "step", step_after_a_kill)
        with pytest.raises(ReplicaLostError, match=r"rank 1 .*died"):
            llm.scale(3)
        assert not any(map(psutil.pid_exists, pids))
        with pytest.raises(ReplicaLostError, match="this LLM has ended"):
            llm.scale(3)


@pytest.mark.multi
def test_a_repair_cannot_be_taken_back(tmp_path):
    """`abort` is for the size that somebody wanted: there is no way back to ranks that are dead."""
    folder = tiny.make_checkpoint("mixtral", tmp_path)
    experts = read_config(folder).moe_specs((0, 1))[0].router.num_experts
    moe = {"redundant_experts": 2 * experts, "on_rank_loss": "shrink"}
    with forked_ranks(), LLM(str(folder), **LIMITS, data=3, moe=moe) as llm:
        os.kill(_pids(llm)[1], signal.SIGKILL)
        engine, deadline = llm.engine, time.monotonic() + 20.0
        while engine.mesh.op is None or not engine.mesh.op.is_over:
            assert time.monotonic() < deadline
            engine.step(0.01, now=time.monotonic())
            if engine.mesh.op is not None:
                engine.abort_scale(engine.mesh.op.goal.op_id, "by mistake", time.monotonic())
        assert engine.mesh.op.goal.is_repair
        assert engine.mesh.op.phase == "DONE"
        assert len(llm.generate([[5, 6, 7]], SamplingParams(max_tokens=4, ignore_eos=True))[0].token_ids) == 4


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

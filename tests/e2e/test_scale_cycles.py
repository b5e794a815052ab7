"""Data 2 -> 4 -> 3 -> 2 again and again under 16 streams, and a kill in every phase. About 40 s on two busy cores.

No token changes, no request fails, nothing leaks, in the engine's process or in the ranks that stay.
"""

import functools
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from phalanx import LLM
from phalanx.errors import ConfigError, ReplicaLostError
from phalanx.runtime.executor.processes import ProcessExecutor
from phalanx.runtime.rank_experts import RankExperts
from phalanx.runtime.scaling import ScaleOp
from tests.support.engines import SHARING_CORES, forked_ranks
from tests.support.oracle import Oracle
from tests.support.traffic import Traffic, planner_of

NUM_STREAMS = 16
NUM_CYCLES = 10
LIMITS: dict[str, Any] = {
    "scheduler": {"max_batch_tokens": 64, "max_sequences": NUM_STREAMS, "max_model_len": 112},
    "kv": {"num_blocks": 260, "block_size": 8},
}
TITLE = "2 -> 4 -> 3 -> 2 under 16 streams, milliseconds"
COMMIT_S = 0.05
"""A commit may cost so much above a step."""


class Held(NamedTuple):
    """What a process holds."""

    descriptors: int
    threads: int


def held(pid: int) -> Held:
    return Held(len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task")))


def all_held(llm: LLM) -> tuple[Held, ...]:
    """Of the engine's process and of the two ranks that always stay."""
    ours = Held(held(os.getpid()).descriptors, threading.active_count())
    return (ours, held(pids(llm)[0]), held(pids(llm)[1]))


def settle(llm: LLM, traffic: Traffic, before: tuple[Held, ...]) -> None:
    """Serve until nothing is held that was not before: groups that were left close beside the steps that follow.

    A moment's connection or thread is neither a group nor a leak.
    """
    traffic.until(
        lambda: all(
            one.descriptors <= first.descriptors + 2 and one.threads <= first.threads + 1
            for one, first in zip(all_held(llm), before, strict=True)
        )
    )


def pids(llm: LLM) -> dict[int, int]:
    assert isinstance(llm.engine.executor, ProcessExecutor)
    return llm.engine.executor.pids


def scale(llm: LLM, traffic: Traffic, op_id: str, target: int) -> tuple[ScaleOp, float]:
    """Carry an operation out under load; returns it and the time between the tokens before and after its commit."""
    op, mesh = llm.engine.scale(op_id, target, time.monotonic()), llm.engine.mesh
    generation, deadline, seen = mesh.generation, time.monotonic() + 20, 0
    while not op.is_over:
        assert time.monotonic() < deadline, f"the operation is still {op.phase}"
        seen = len(traffic.times)
        traffic.turn()
    if op.phase != "DONE":
        return op, 0.0
    assert mesh.generation > generation
    traffic.until(lambda: len(traffic.times) > seen)  # the turn of the commit may have brought tokens already
    return op, traffic.times[seen] - traffic.times[seen - 1]


@pytest.mark.multi
def test_cycles(moe_oracle: Oracle, record_property: Callable[[str, object], None]) -> None:
    moe = {"dispatch": "flat", "redundant_experts": 2}
    with forked_ranks(), LLM(str(moe_oracle.path), data=2, moe=moe, **SHARING_CORES, **LIMITS) as llm:
        traffic = Traffic(llm.engine, moe_oracle, NUM_STREAMS)
        pauses: dict[int, list[float]] = {4: [], 3: [], 2: []}
        traffic.turns(6)
        before = all_held(llm)
        for cycle in range(NUM_CYCLES):
            for target in (4, 3, 2):
                traffic.turns(6)
                op, pause = scale(llm, traffic, f"{cycle}-{target}", target)
                assert op.phase == "DONE", op.detail
                pauses[target].append(pause)
                assert len(llm.engine.mesh.units) == len(pids(llm)) == target
                planner_of(llm.engine).check()
                llm.engine.scheduler.check()
            if cycle == 0:  # the first ranks that join make the engine's process open what it then keeps
                before = (all_held(llm)[0], *before[1:])
            settle(llm, traffic, before)
        after = all_held(llm)
        traffic.finish()
        assert traffic.num_done >= NUM_STREAMS
        assert llm.engine.mesh.units == (0, 1)
    median = statistics.median(traffic.gaps)
    record_property("table", (TITLE, "step", "median", f"{1000 * median:.0f}"))
    record_property("table", (TITLE, "step", "worst", f"{1000 * max(traffic.gaps):.0f}"))
    for target, seconds in pauses.items():
        record_property("table", (TITLE, f"commit to {target}", "median", f"{1000 * statistics.median(seconds):.0f}"))
        record_property("table", (TITLE, f"commit to {target}", "worst", f"{1000 * max(seconds):.0f}"))
    for when, at in (("before", before), ("after", after)):
        text = ", ".join(f"{one.descriptors} + {one.threads}" for one in at)
        record_property(
            "table", ("descriptors + threads of engine, rank 0, rank 1", f"{NUM_CYCLES} cycles", when, text)
        )
    everything = [second for seconds in pauses.values() for second in seconds]
    assert statistics.median(everything) < median + COMMIT_S


def die(rank: int, victim: int, phase: str) -> None:
    """A hook: one rank dies in a phase of its first operation."""
    if rank != victim:
        return
    attach, prepare, enter = RankExperts.attach, RankExperts._prepare, RankExperts.enter

    def end() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def loading(self: RankExperts, experts: Any) -> None:
        end()
        attach(self, experts)

    def building(self: RankExperts, order: Any) -> None:
        end()
        prepare(self, order)

    def built(self: RankExperts, order: Any) -> None:
        prepare(self, order)
        end()

    def entering(self: RankExperts, order: Any) -> int:
        end()
        return enter(self, order)

    name = {"loading": "attach", "building": "_prepare", "built": "_prepare", "entering": "enter"}[phase]
    changed = {"loading": loading, "building": building, "built": built, "entering": entering}
    setattr(RankExperts, name, changed[phase])


@pytest.mark.multi
@pytest.mark.parametrize(
    ("victim", "phase", "units"),
    [
        (2, "loading", (0, 1)),
        (2, "building", (0, 1)),
        (2, "built", (0, 1)),
        (2, "entering", (0, 1)),
        (0, "building", (1,)),
        (0, "built", (1,)),
        (0, "entering", (1, 2)),
    ],
)
def test_a_kill_in_every_phase(moe_oracle: Oracle, victim: int, phase: str, units: tuple[int, ...]) -> None:
    """Growing from 2 to 3 with every expert twice: the end is the old size, or the new one, less what died."""
    moe = {"dispatch": "flat", "redundant_experts": 6, "on_rank_loss": "shrink"}
    hook = functools.partial(die, victim=victim, phase=phase)
    with forked_ranks(hook=hook), LLM(str(moe_oracle.path), data=2, moe=moe, **SHARING_CORES, **LIMITS) as llm:
        traffic, mesh = Traffic(llm.engine, moe_oracle, NUM_STREAMS), llm.engine.mesh
        traffic.turns(10)
        op, _ = scale(llm, traffic, "op", 3)
        traffic.until(lambda: mesh.units == units and not mesh.holds)
        assert op.phase == ("DONE" if phase == "entering" else "ABORTED")
        traffic.turns(10)
        traffic.finish()
        assert set(pids(llm)) == set(units)
        assert sorted(llm.engine.executor.members) == sorted(units)


@pytest.mark.multi
def test_undone_and_tried_again(moe_oracle: Oracle) -> None:
    """By hand, at several moments; a second operation is refused while one runs; the third one works."""
    moe = {"dispatch": "flat", "redundant_experts": 2}
    with forked_ranks(), LLM(str(moe_oracle.path), data=2, moe=moe, **SHARING_CORES, **LIMITS) as llm:
        traffic, mesh = Traffic(llm.engine, moe_oracle, NUM_STREAMS), llm.engine.mesh
        for turns in (0, 3, 12):
            op = llm.engine.scale(f"try-{turns}", 4, time.monotonic())
            traffic.turns(turns)
            with pytest.raises(ConfigError, match=f"scale operation 'try-{turns}' is running"):
                llm.engine.scale("other", 3, time.monotonic())
            llm.engine.abort_scale(op.goal.op_id, "changed my mind", time.monotonic())
            assert (op.phase, op.detail) == ("ABORTED", "changed my mind")
            traffic.turns(5)
            assert set(pids(llm)) == {0, 1}
        op, _ = scale(llm, traffic, "works", 4)
        assert op.phase == "DONE"
        assert mesh.units == (0, 1, 8, 9)
        traffic.turns(10)
        traffic.finish()


@pytest.mark.multi
def test_a_member_lost_without_shrink_ends_it(moe_oracle: Oracle) -> None:
    hook = functools.partial(die, victim=0, phase="building")
    moe = {"dispatch": "flat", "redundant_experts": 6}
    with (
        forked_ranks(hook=hook),
        LLM(str(moe_oracle.path), data=2, moe=moe, **SHARING_CORES, **LIMITS) as llm,
        pytest.raises(ReplicaLostError, match="rank 0"),
    ):
        llm.scale(3)


@pytest.mark.multi
def test_idle_and_through_the_public_method(moe_oracle: Oracle, tmp_path: Path) -> None:
    moe = {"dispatch": "flat", "redundant_experts": 2}
    with forked_ranks(), LLM(str(moe_oracle.path), data=3, moe=moe, **SHARING_CORES, **LIMITS) as llm:
        with pytest.raises(ConfigError, match=r"data 1: 1 ranks of 3 expert slots hold 3 of 6 experts; use 2 or more"):
            llm.scale(1)
        for data in (2, 3):
            llm.scale(data)
            traffic = Traffic(llm.engine, moe_oracle, NUM_STREAMS)
            traffic.turns(3)
            traffic.finish()


@pytest.mark.multi
@pytest.mark.parametrize("axis", ["tensor", "pipeline"])
def test_the_first_unit_leaves_its_node(moe_oracle: Oracle, axis: str) -> None:
    moe = {"dispatch": "flat", "redundant_experts": 6}
    shape: dict[str, Any] = {"data": 3, axis: 2}
    with forked_ranks(), LLM(str(moe_oracle.path), **shape, moe=moe, **SHARING_CORES, **LIMITS) as llm:
        traffic, mesh = Traffic(llm.engine, moe_oracle, NUM_STREAMS), llm.engine.mesh
        for rank, place in mesh.seats.items():
            llm.engine.executor.nodes[rank] = "one" if place.dp == 0 else "another"
        traffic.turns(10)
        op = llm.engine.scale("leave", 2, time.monotonic(), ("one",))
        traffic.until(lambda: op.is_over)
        assert (op.phase, mesh.units, mesh.nodes) == ("DONE", (1, 2), ["another"])
        again = llm.engine.scale("nobody is there", 2, time.monotonic(), ("one",))
        traffic.until(lambda: again.is_over)
        assert (again.phase, mesh.units) == ("DONE", (1, 2))
        traffic.turns(10)
        traffic.finish()
        assert len(pids(llm)) == 4

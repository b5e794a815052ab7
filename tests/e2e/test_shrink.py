"""A rank dies, the group goes on without it: all tokens equal, back within a second. About 25 s on two busy cores."""

import contextlib
import functools
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest

from phalanx import LLM, SamplingParams
from phalanx.errors import ReplicaLostError
from phalanx.moe.placement.types import LayerPlacement
from phalanx.parallel.torch_transport import TorchTransport
from phalanx.parallel.transport import Pending, Request
from phalanx.runtime import replica_mesh
from phalanx.runtime.executor.link import SILENCE_S
from phalanx.runtime.executor.processes import ProcessExecutor
from phalanx.runtime.rank_experts import RankExperts
from tests.support.engines import SHARING_CORES, Hook, forked_ranks
from tests.support.oracle import Oracle
from tests.support.traffic import Traffic, planner_of

NUM_STREAMS = 8
LIMITS: dict[str, Any] = {
    "scheduler": {"max_batch_tokens": 64, "max_sequences": NUM_STREAMS, "max_model_len": 112},
    "kv": {"num_blocks": 160, "block_size": 8},
}
SHRINK = {"dispatch": "flat", "on_rank_loss": "shrink"}
TITLE = "loss of a rank: milliseconds until it is noticed, until tokens come again"
BACK_S = 1.0


@contextlib.contextmanager
def running(oracle: Oracle, data: int, redundant: int, hook: Hook | None = None, **moe: Any) -> Iterator[LLM]:
    options = {**SHRINK, "redundant_experts": redundant, **moe}
    with forked_ranks(hook=hook), LLM(str(oracle.path), data=data, moe=options, **SHARING_CORES, **LIMITS) as llm:
        yield llm


def pids(llm: LLM) -> dict[int, int]:
    assert isinstance(llm.engine.executor, ProcessExecutor)
    return llm.engine.executor.pids


def kill(llm: LLM, rank: int) -> None:
    os.kill(pids(llm)[rank], signal.SIGKILL)


def lose(llm: LLM, traffic: Traffic, rank: int, kind: int = signal.SIGKILL) -> tuple[float, float]:
    """Signal a rank in mid-step; returns the seconds until the repair begins and until tokens come again."""
    engine, generation, begun = llm.engine, llm.engine.mesh.generation, time.monotonic()
    os.kill(pids(llm)[rank], kind)
    traffic.until(lambda: engine.mesh.op is not None and rank in engine.mesh.op.goal.removed)
    noticed = time.monotonic()
    traffic.until(lambda: engine.mesh.generation > generation)
    seen = len(traffic.times)
    traffic.until(lambda: len(traffic.times) > seen)
    planner_of(engine).check()
    engine.check()
    assert rank not in pids(llm), "the dead are reaped"
    assert rank not in engine.mesh.seats
    return noticed - begun, time.monotonic() - begun


@pytest.mark.multi
@pytest.mark.parametrize(("data", "rank"), [(3, 0), (3, 1), (3, 2), (4, 0), (4, 1), (4, 2), (4, 3)])
def test_any_rank(moe_oracle: Oracle, data: int, rank: int, record_property: Callable[[str, object], None]) -> None:
    with running(moe_oracle, data, redundant=6, node_size=2, dispatch="two_hop") as llm:
        traffic = Traffic(llm.engine, moe_oracle, NUM_STREAMS)
        traffic.turns(40)
        noticed_s, back_s = lose(llm, traffic, rank)
        traffic.turns(20)
        traffic.finish()
        assert len(llm.engine.mesh.units) == data - 1
    record_property(
        "table", (TITLE, f"SIGKILL, data {data}", f"rank {rank}", f"{1000 * noticed_s:.0f} {1000 * back_s:.0f}")
    )
    assert back_s < BACK_S


@pytest.mark.multi
@pytest.mark.parametrize("rank", [0, 2])
def test_a_frozen_rank(moe_oracle: Oracle, rank: int, record_property: Callable[[str, object], None]) -> None:
    """It is found by its silence and ended; those that wait for it in an exchange wake up by that."""
    with running(moe_oracle, 3, redundant=6) as llm:
        frozen, traffic = pids(llm)[rank], Traffic(llm.engine, moe_oracle, NUM_STREAMS)
        traffic.turns(20)
        noticed_s, back_s = lose(llm, traffic, rank, signal.SIGSTOP)
        traffic.turns(20)
        traffic.finish()
        assert len(llm.engine.mesh.units) == 2
        with pytest.raises(ProcessLookupError):
            os.kill(frozen, 0)
    row = ("SIGSTOP, data 3", f"rank {rank}", f"{1000 * noticed_s:.0f} {1000 * back_s:.0f}")
    record_property("table", (TITLE, *row))
    assert back_s < SILENCE_S + 1 + BACK_S


@pytest.mark.multi
def test_one_after_the_other_down_to_one(moe_oracle: Oracle) -> None:
    with running(moe_oracle, data=4, redundant=18) as llm:
        traffic = Traffic(llm.engine, moe_oracle, NUM_STREAMS)
        for rank in (2, 0, 3):
            traffic.turns(15)
            lose(llm, traffic, rank)
        assert llm.engine.mesh.units == (1,)
        traffic.finish()
        kill(llm, 1)
        with pytest.raises(ReplicaLostError, match=r"rank 1 .* no other rank has experts \[0, 1, 2, 3, 4, 5\]"):
            llm.generate([moe_oracle.prompts[0]], SamplingParams(temperature=0, max_tokens=4))


@pytest.mark.multi
def test_two_at_once(moe_oracle: Oracle) -> None:
    with running(moe_oracle, data=4, redundant=18) as llm:
        traffic = Traffic(llm.engine, moe_oracle, NUM_STREAMS)
        traffic.turns(20)
        kill(llm, 0)
        kill(llm, 2)
        traffic.until(lambda: llm.engine.mesh.units == (1, 3))
        traffic.turns(20)
        traffic.finish()


@pytest.mark.multi
def test_too_few_replicas(moe_oracle: Oracle) -> None:
    """Ranks hold experts (0, 1) (2, 3) (4, 5) (0, 1): the second may not be lost, the first may."""
    with running(moe_oracle, data=4, redundant=2) as llm:
        traffic = Traffic(llm.engine, moe_oracle, NUM_STREAMS)
        traffic.turns(10)
        lose(llm, traffic, 0)
        traffic.turns(10)
        kill(llm, 1)
        message = (
            r"rank 1 \(node .*\) died without a word; no other rank has experts \[2, 3\] of MoE layer 0 \(3 layers"
        )
        with pytest.raises(ReplicaLostError, match=message):
            traffic.turns(100)
    assert not pids(llm)


class Walk:
    """Moves one expert at a time and layer, so that at any moment every expert is on two ranks at least."""

    def __init__(self, llm: LLM, seed: int) -> None:
        self.planner, self.rng = planner_of(llm.engine), random.Random(seed)
        size = self.planner.config.slots_per_rank
        many, few = (0, 1, 2), (3, 4, 5)
        first = LayerPlacement(0, tuple(e for r in range(3) for e in (*many, *few[:r], *few[r + 1 :])[:size]))
        self.planner.migrate(dict.fromkeys(range(len(self.planner.placements)), first))

    @property
    def is_staged(self) -> bool:
        """A layer flips with the next plan."""
        return any(layer.active is not None and not layer.active.unfinished for layer in self.planner._layers)

    def stir(self) -> None:
        size = self.planner.config.slots_per_rank
        for index, layer in enumerate(self.planner.placements):
            if self.planner.is_still(index):
                slots = [
                    slot for slot, expert in enumerate(layer.physical_to_logical) if layer.num_replicas[expert] == 3
                ]
                slot, table = self.rng.choice(slots), list(layer.physical_to_logical)
                (table[slot],) = set(range(6)) - set(layer.experts_of(slot // size, size))
                self.planner.migrate({index: LayerPlacement(layer.version, tuple(table))})


@pytest.mark.multi
@pytest.mark.parametrize("seed", range(6))
def test_while_rows_travel(moe_oracle: Oracle, seed: int) -> None:
    """Survivors that broke off in a step have executed the flips of the next one, too: the tables agree."""
    with running(moe_oracle, data=3, redundant=9) as llm:
        traffic, walk = Traffic(llm.engine, moe_oracle, NUM_STREAMS), Walk(llm, seed)
        traffic.until(lambda: not walk.planner.is_migrating)
        flips = walk.planner.num_flips
        while walk.planner.num_flips < flips + 4 or not walk.is_staged:
            walk.stir()
            traffic.turn()
        kill(llm, seed % 3)  # the flip goes out with the next plan, behind steps that fail
        traffic.until(lambda: llm.engine.mesh.generation == 1)
        traffic.turns(10)
        traffic.finish()


@pytest.mark.multi
@pytest.mark.parametrize("victim", ["new", "stays", "goes"])
def test_while_scaling(moe_oracle: Oracle, victim: str) -> None:
    """The operation is undone; a lost member is then repaired; afterwards the group can grow again."""
    with running(moe_oracle, data=3, redundant=12) as llm:
        traffic = Traffic(llm.engine, moe_oracle, NUM_STREAMS)
        traffic.turns(10)
        target = 2 if victim == "goes" else 4
        op = llm.engine.scale("op", target, time.monotonic())
        if victim == "new":
            traffic.until(lambda: 3 in pids(llm))
        kill(llm, {"new": 3, "stays": 0, "goes": 2}[victim])
        traffic.until(lambda: op.is_over and not llm.engine.mesh.holds)
        traffic.turns(20)
        assert op.phase == "ABORTED"
        assert llm.engine.mesh.units == {"new": (0, 1, 2), "stays": (1, 2), "goes": (0, 1)}[victim]
        assert llm.engine.scale("op", target, time.monotonic()) is op, "the same id is the same operation"
        again = llm.engine.scale("again", 4, time.monotonic())
        traffic.until(lambda: again.is_over)
        assert again.phase == "DONE"
        traffic.turns(20)
        traffic.finish()
        assert len(pids(llm)) == 4


def die_in_prepare(rank: int, victims: tuple[int, ...], generation: int) -> None:
    """A hook: these ranks die when they should build the groups of a generation."""
    prepare = RankExperts._prepare

    def dying(self: RankExperts, order: Any) -> None:
        if rank in victims and order.generation == generation:
            os.kill(os.getpid(), signal.SIGKILL)
        prepare(self, order)

    RankExperts._prepare = dying  # type: ignore[method-assign]


@pytest.mark.multi
def test_a_rank_dies_while_another_one_is_repaired(moe_oracle: Oracle) -> None:
    hook = functools.partial(die_in_prepare, victims=(1,), generation=1)
    with running(moe_oracle, data=4, redundant=18, hook=hook) as llm:
        traffic = Traffic(llm.engine, moe_oracle, NUM_STREAMS)
        traffic.turns(10)
        kill(llm, 3)
        traffic.until(lambda: llm.engine.mesh.units == (0, 2))
        traffic.turns(20)
        traffic.finish()


@pytest.mark.multi
def test_restart_is_the_default(moe_oracle: Oracle) -> None:
    with running(moe_oracle, data=3, redundant=12, on_rank_loss="restart") as llm:
        traffic = Traffic(llm.engine, moe_oracle, NUM_STREAMS)
        traffic.turns(5)
        kill(llm, 1)
        with pytest.raises(ReplicaLostError, match="rank 1"):
            traffic.turns(100)


def break_once(rank: int, victim: int, after: int) -> None:
    """A hook: one exchange of one rank fails although nobody is dead."""
    start, count = TorchTransport.start, 0

    def breaking(self: TorchTransport, request: Request) -> Pending:
        nonlocal count
        count += 1
        if rank == victim and count == after:
            raise ReplicaLostError("a cable was pulled")
        return start(self, request)

    TorchTransport.start = breaking  # type: ignore[method-assign]


@pytest.mark.multi
def test_a_step_that_fails_while_all_live_is_not_waited_for(moe_oracle: Oracle) -> None:
    hook = functools.partial(break_once, victim=1, after=200)
    with (
        mock.patch.object(replica_mesh, "BROKEN_S", 0.3),
        running(moe_oracle, data=3, redundant=12, hook=hook) as llm,
        pytest.raises(
            ReplicaLostError,
            match=r"a step failed although every rank is alive: (.|\n)*(a peer is gone|a cable was pulled)",
        ),
    ):
        Traffic(llm.engine, moe_oracle, NUM_STREAMS).turns(500)

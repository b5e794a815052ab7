"""Requests without end against an engine, every token compared with the oracle's; and random expert placements."""

import random
import time
from collections.abc import Callable
from typing import NamedTuple

from phalanx import SamplingParams
from phalanx.moe.placement.types import LayerPlacement
from phalanx.runtime.engine import Engine
from phalanx.runtime.expert_planner import ExpertPlanner
from phalanx.runtime.frames import Place
from tests.support.oracle import NUM_TOKENS, Oracle

GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)


class _Stream(NamedTuple):
    prompt: int
    token_ids: list[int]


class Traffic:
    """A number of streams at any moment, driven by the caller's thread.

    Attributes:
        times: `time.monotonic()` of every engine step that brought tokens.
        num_done: requests answered.
    """

    def __init__(self, engine: Engine, oracle: Oracle, num_streams: int) -> None:
        self.engine, self.times, self.num_done = engine, list[float](), 0
        self._oracle, self._streams = oracle, dict[str, _Stream]()
        self._wanted, self._count = num_streams, 0

    def turn(self, timeout_s: float = 0.05) -> None:
        """One step of the engine; answered requests are followed by new ones."""
        while len(self._streams) < self._wanted:
            self._place()
        rows = self.engine.step(timeout_s, now=time.monotonic())
        if rows:
            self.times.append(time.monotonic())
        for row in rows:
            assert row.error is None, row.error
            prompt, token_ids = self._streams[row.job]
            token_ids += row.token_ids
            expected = self._oracle.outputs[prompt]
            assert token_ids == expected[: len(token_ids)], f"{row.job} differs at token {len(token_ids) - 1}"
            if row.finish is not None:
                assert row.finish == "length"
                assert len(token_ids) == NUM_TOKENS
                del self._streams[row.job]
                self.num_done += 1

    def turns(self, count: int) -> None:
        for _ in range(count):
            self.turn()

    def until(self, condition: Callable[[], bool], limit_s: float = 20.0) -> None:
        """Steps until something is so."""
        deadline = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < deadline, f"it is not so after {limit_s} s"
            self.turn()

    def finish(self, limit_s: float = 30.0) -> None:
        """Answer what is open, then look whether everything is back."""
        self._wanted, deadline = 0, time.monotonic() + limit_s
        while self._streams or self.engine.has_work or self.engine.mesh.is_busy:
            assert time.monotonic() < deadline, f"{len(self._streams)} streams have not ended after {limit_s} s"
            self.turn()
        self.engine.check()
        if self.engine.mesh.planner is not None:
            self.engine.mesh.planner.check()

    @property
    def gaps(self) -> list[float]:
        """Seconds between steps that brought tokens."""
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]

    def _place(self) -> None:
        name, prompt = f"stream-{self._count}", self._count % len(self._oracle.prompts)
        self._count += 1
        packed = b"".join(token.to_bytes(4, "little") for token in self._oracle.prompts[prompt])
        self._streams[name] = _Stream(prompt, [])
        self.engine.place(Place(name, 0, packed, [b""], GREEDY, seed=self._count))


def planner_of(engine: Engine) -> ExpertPlanner:
    assert engine.mesh.planner is not None
    return engine.mesh.planner


def random_placement(rng: random.Random, layer: LayerPlacement, slots_per_rank: int) -> LayerPlacement:
    """Any valid placement of the same experts on the same ranks, drawn rank by rank."""
    num_experts, num_ranks = layer.num_experts, layer.num_slots // slots_per_rank
    order = rng.sample(range(num_experts), num_experts)
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    for position, expert in enumerate(order):  # each expert once, evenly
        ranks[position % num_ranks].append(expert)
    rng.shuffle(ranks)
    for experts in ranks:
        others = [expert for expert in range(num_experts) if expert not in experts]
        experts += rng.sample(others, slots_per_rank - len(experts))
        rng.shuffle(experts)
    return LayerPlacement(layer.version, tuple(expert for experts in ranks for expert in experts))

"""Step time while experts move in every step, beside the same steps without: p50, p99 and their ratio.

    benchmarks/migration.py [CHECKPOINT] [--data N] [--streams N] [--steps N] [--rounds N] [--rows N] [--json]

Ranks are processes on this machine. One engine serves endless random requests; it takes turns of `--steps` steps with
and without migration (quiet, moving, moving, quiet, ...). While it moves, layers exchange experts between ranks,
`--rows` rows per step; every row is checked and acknowledged, and every exchange ends in a flip. A step's time is the
time between two steps' tokens, all turns of a kind together; `cpu` is what all ranks together compute per step, which
other programs on the machine disturb less.
"""

import argparse
import itertools
import json
import random
import time

import psutil

from phalanx import LLM, SamplingParams
from phalanx.moe.placement.types import LayerPlacement
from phalanx.runtime.engine import Engine
from phalanx.runtime.expert_planner import ExpertPlanner
from phalanx.runtime.frames import Place

PROMPT_TOKENS, OUTPUT_TOKENS = 16, 128


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoint", nargs="?", default="tiny-moe")
    p.add_argument("--data", type=int, default=2)
    p.add_argument("--streams", type=int, default=16)
    p.add_argument("--steps", type=int, default=100)
    p.add_argument("--rounds", type=int, default=15)
    p.add_argument("--rows", type=float, default=1.0)
    p.add_argument("--json", action="store_true")
    a = p.parse_args()
    moe = {"dispatch": "flat", "rebalance": {"interval_steps": 0}}
    limits = {"max_sequences": a.streams, "max_batch_tokens": 256, "max_model_len": 256}
    with LLM(a.checkpoint, data=a.data, moe=moe, scheduler=limits, kv={"num_blocks": 1024}, device="cpu") as llm:
        report(measure(llm.engine, a), a)


class Load:
    """Random requests without end, so that every step holds one token of each stream or the chunk of a new one."""

    def __init__(self, engine: Engine, num_streams: int) -> None:
        self._engine, self._wanted, self._rng = engine, num_streams, random.Random(1)
        self._live = self._count = 0

    def step(self) -> float:
        """Run one step that brings tokens; returns when they came."""
        while self._live < self._wanted:
            ids = self._rng.choices(range(3, self._engine.config.model.vocab_size), k=PROMPT_TOKENS)
            packed = b"".join(token.to_bytes(4, "little") for token in ids)
            tokens = self._rng.randrange(OUTPUT_TOKENS // 2, OUTPUT_TOKENS)  # they must not all end together
            params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
            self._engine.place(Place(f"bench-{self._count}", 0, packed, [b""], params, seed=self._count))
            self._live, self._count = self._live + 1, self._count + 1
        while True:
            rows = self._engine.step(1.0, now=time.monotonic())
            if rows:
                self._live -= sum(row.finish is not None for row in rows)
                return time.monotonic()


class Movement:
    """Keeps experts on the move: exchanges between two random ranks, in layers that stand still."""

    def __init__(self, planner: ExpertPlanner) -> None:
        self._planner, self._rng, self._budget = planner, random.Random(2), 0.0

    def stir(self, rows_per_step: float) -> None:
        """Begin what a step may begin; an exchange is two rows."""
        self._budget = min(self._budget + rows_per_step, 8.0)
        for layer in self._rng.sample(range(len(self._planner.placements)), len(self._planner.placements)):
            if self._budget >= 2 and self._planner.is_still(layer):
                self._planner.migrate({layer: self._exchanged(self._planner.placements[layer])})
                self._budget -= 2

    def _exchanged(self, layer: LayerPlacement) -> LayerPlacement:
        size = self._planner.config.slots_per_rank
        while True:
            one, other = self._rng.sample(range(layer.num_slots), 2)
            table = list(layer.physical_to_logical)
            here, there = layer.experts_of(one // size, size), layer.experts_of(other // size, size)
            if one // size != other // size and table[one] not in there and table[other] not in here:
                table[one], table[other] = table[other], table[one]
                return LayerPlacement(layer.version, tuple(table))


class Kind:
    """What was measured of steps of one kind."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.cpu_s, self.num_rows = 0.0, 0

    def row(self) -> dict[str, float]:
        """Milliseconds, and rows that arrived per step."""
        ordered, count = sorted(self.seconds), len(self.seconds)
        shares = {f"p{share}": 1e3 * ordered[count * share // 100] for share in (50, 90, 99)}
        return {**shares, "cpu": 1e3 * self.cpu_s / count, "rows": self.num_rows / count}


def measure(engine: Engine, a: argparse.Namespace) -> dict[str, Kind]:
    """Steps without moves ("quiet") and with ("moving")."""
    assert engine.mesh.planner is not None
    load, movement, planner = Load(engine, a.streams), Movement(engine.mesh.planner), engine.mesh.planner
    ranks = [psutil.Process(ready.pid) for ready in engine.executor.ready.values()]
    found = {"quiet": Kind(), "moving": Kind()}
    for _ in range(100):
        load.step()
    for turn in range(2 * a.rounds):
        name = ("quiet", "moving", "moving", "quiet")[turn % 4]
        kind, num_rows, cpu_s = found[name], planner.num_moved, cpu(ranks)
        times = [load.step()]
        for _ in range(a.steps):
            if name == "moving":
                movement.stir(a.rows)
            times.append(load.step())
        kind.seconds += [after - before for before, after in itertools.pairwise(times)]
        kind.cpu_s += cpu(ranks) - cpu_s
        while planner.is_migrating:
            load.step()
        kind.num_rows += planner.num_moved - num_rows
    return found


def cpu(ranks: list[psutil.Process]) -> float:
    """Seconds they have computed."""
    return sum(times.user + times.system for times in (rank.cpu_times() for rank in ranks))


def report(found: dict[str, Kind], a: argparse.Namespace) -> None:
    """Print a row per kind, and the ratio."""
    rows = {name: kind.row() for name, kind in found.items()}
    rows["ratio"] = {name: rows["moving"][name] / rows["quiet"][name] for name in ("p50", "p90", "p99", "cpu")}
    if a.json:
        print(json.dumps(rows))
        return
    for name, row in rows.items():
        print(name.ljust(8), "  ".join(f"{what} {value:8.2f}" for what, value in row.items()))


if __name__ == "__main__":
    main()

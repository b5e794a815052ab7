"""The supervisor's loop around one replica, with Ray and the controller played (two seconds, most of them imports)."""

import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from phalanx.deploy import supervisor as supervisors
from phalanx.deploy.config import parse_config
from phalanx.deploy.plan import DeploymentPlan
from phalanx.deploy.ray_cluster import local_hardware
from phalanx.deploy.resolve import resolve
from phalanx.deploy.server.supervise import EndRanks, Reclaim, StartRanks
from phalanx.deploy.supervisor import Progress, Supervisor
from phalanx.deploy.units import GrowFailure
from phalanx.errors import ConfigError, ReplicaLostError
from phalanx.models.hf_config import read_config


class Stage:
    """Plays the controller and every incarnation; `log` is what they were told."""

    engines = "127.0.0.1:1"

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.sizes: dict[int, int | None] = {}
        self.crowded: set[int] = set()
        self.acts: dict[int, list[Any]] = {}
        monkeypatch.setattr(supervisors, "Replica", lambda *args: Incarnation(self, *args))
        monkeypatch.setattr(supervisors, "BACKOFF_S", 0.0)
        self.supervisor = Supervisor(plan(), self.report)

    def report(self, progress: Progress) -> None:
        self.log.append((progress.event, *list(progress.data.items())[:1]))

    def run(self) -> None:
        thread = threading.Thread(target=self.supervisor._keep, args=(0, self), daemon=True)
        thread.start()
        thread.join(10)
        assert not thread.is_alive()

    def replica_starting(self, replica: int, incarnation: int, stopping: threading.Event) -> int | None:
        return self.sizes.get(incarnation)

    def replica_gone(self, replica: int, incarnation: int, cause: str, error: str) -> None:
        self.log.append(("gone", incarnation, cause))

    def grow_failed(self, replica: int, incarnation: int, op_id: str, reason: str) -> None:
        self.log.append(("grow failed", incarnation, op_id, reason))

    def status(self) -> Any:
        newest = max(entry[1] for entry in self.log if entry[0] == "start")
        replica = SimpleNamespace(replica=0, incarnation=newest, state="ready", startup_s={}, ranks=["rank 0"])
        return SimpleNamespace(replicas=[replica])


class Incarnation:
    """A replica that does what the stage's acts say, one per look at it; the last one ends the deployment."""

    def __init__(self, stage: Stage, plan: DeploymentPlan, replica: int, incarnation: int, _: str, data: int) -> None:
        self.stage, self.replica, self.incarnation, self.data = stage, replica, incarnation, data
        self._acts = list(stage.acts.get(incarnation, []))

    def start(self, stopping: threading.Event) -> None:
        self.stage.log.append(("start", self.incarnation, self.data))
        if self.data in self.stage.crowded:
            raise ConfigError("no room")

    def wait(self, timeout_s: float, *, has_served: bool = True) -> str | None:
        if not has_served:
            return None
        if not self._acts:
            self.stage.supervisor._stopping.set()
            return None
        act = self._acts.pop(0)
        if isinstance(act, Exception):
            raise act
        self.stage.supervisor._on_order(act)
        return None

    def grow(self, op_id: str, units: Sequence[Sequence[int]], now: float) -> None:
        self.stage.log.append(("grow", self.incarnation, op_id, units))

    def shed(self, ranks: Sequence[int]) -> None:
        self.stage.log.append(("shed", self.incarnation, ranks))

    def failures(self, now: float) -> list[GrowFailure]:
        asked = [entry[2] for entry in self.stage.log if entry[0] == "grow"]
        told = [entry[2] for entry in self.stage.log if entry[0] == "grow failed"]
        return [GrowFailure(op_id, "no room") for op_id in asked if op_id not in told]

    def end(self) -> None:
        self.stage.log.append(("end", self.incarnation))


def plan() -> DeploymentPlan:
    text = "model: {path: tiny-moe}\ndevice: cpu\nray: {address: local, nodes: 2}\nparallel: {data: 2}\n"
    config = parse_config(text, "cluster.yaml")
    return resolve(config, local_hardware(2), read_config("tiny-moe"))


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    return Stage(monkeypatch)


def told(stage: Stage, *kinds: str) -> list[tuple[Any, ...]]:
    return [entry for entry in stage.log if entry[0] in kinds]


def test_a_restart_has_the_size_that_the_controller_says(stage: Stage) -> None:
    stage.sizes = {2: 4, 3: 3}
    stage.acts = {1: [ReplicaLostError("lost")], 2: [ReplicaLostError("lost")]}
    stage.run()
    assert told(stage, "start") == [("start", 1, None), ("start", 2, 4), ("start", 3, 3)]
    assert told(stage, "end") == [("end", 1), ("end", 2), ("end", 3)]


def test_without_room_for_that_it_has_the_size_of_the_plan(stage: Stage) -> None:
    stage.sizes, stage.crowded = dict.fromkeys((2, 3, 4), 4), {4}
    stage.acts = {1: [ReplicaLostError("lost")], 3: [ReplicaLostError("lost")]}
    stage.run()
    starts = [("start", 1, None), ("start", 2, 4), ("start", 3, None), ("start", 4, 4), ("start", 5, None)]
    assert told(stage, "start") == starts, "tried again at the next restart"


def test_orders_reach_the_incarnation_they_are_for(stage: Stage) -> None:
    stage.acts = {
        1: [StartRanks(0, 2, "early", [[9]]), StartRanks(0, 1, "a", [[2], [3]]), EndRanks(0, 1, [3])],
    }
    stage.run()
    assert told(stage, "grow", "shed") == [("grow", 1, "a", [[2], [3]]), ("shed", 1, [3])]
    assert told(stage, "grow failed") == [("grow failed", 1, "a", "no room")]
    assert [entry[1] for entry in told(stage, "scale")] == [("replica", 0), ("replica", 0)]


def test_a_reclaimed_incarnation_ends(stage: Stage) -> None:
    stage.acts = {1: [Reclaim(0, 7, "lease"), Reclaim(0, 1, "lease")]}
    stage.run()
    assert told(stage, "gone") == [("gone", 1, "exit"), ("gone", 2, "exit")]
    assert len(told(stage, "lost")) == 1

"""Scale operations in the controller core: every transition and every loss, with engines made of tuples (a second)."""

import pytest

from phalanx.errors import ConfigError, DuplicateRequestError, InvalidRequestError, UnavailableError
from phalanx.runtime.controller import events as ev
from phalanx.runtime.controller.scale import RETAINED
from phalanx.runtime.frames import AbortScale, AskScale, Failed, Scale, ScaleEstimate, ScaleState
from phalanx.runtime.scaling import Phase
from tests.runtime.controller.test_core import Bench, sent

WANTED = [[2], [3]]


class ScaleBench(Bench):
    """A core whose replica 0 is up on link 1, with one dp rank."""

    def __init__(self) -> None:
        super().__init__()
        self(ev.ReplicaStarting(0, 1))
        self.hello()

    def apply(self, op_id: str = "grow", data: int = 3, *replicas: int) -> list[ev.Effect]:
        return self(ev.ApplyScale(op_id, data, replicas))

    def tell(
        self,
        phase: Phase,
        data: int = 1,
        *,
        op_id: str = "grow",
        wanted: list[list[int]] | None = None,
        gone: list[int] | None = None,
        link: int = 1,
        detail: str = "",
    ) -> list[ev.Effect]:
        ranks = [f"rank {rank}" for rank in range(data)] if phase == "DONE" else []
        return self(ev.FrameReceived(link, ScaleState(op_id, phase, detail, data, wanted or [], gone or [], ranks)))

    def begin(self) -> None:
        """The engine prepares and wants two ranks."""
        assert sent(self.apply()) == [Scale("grow", 3)]
        assert self.tell("PREPARING", wanted=WANTED) == [ev.StartRanks(0, 1, "grow", ((2,), (3,)))]

    def phase(self, op_id: str = "grow") -> str:
        operation = self.core.scaling.find(op_id)
        assert operation is not None
        return operation.phase

    def detail(self, op_id: str = "grow", replica: int = 0) -> str:
        operation = self.core.scaling.find(op_id)
        assert operation is not None
        return operation.parts[replica].detail

    def size_of_the_next(self, incarnation: int = 2) -> int | None:
        """What a supervisor is told that starts the replica again."""
        (start,) = [e for e in self(ev.ReplicaStarting(0, incarnation)) if isinstance(e, ev.Start)]
        return start.data


def test_grow() -> None:
    bench = ScaleBench()
    bench.begin()
    assert (bench.phase(), bench.core.replicas[0].data) == ("PREPARING", 1)
    assert bench.tell("COMMITTING", wanted=WANTED) == [], "asked of the supervisor once"
    assert bench.phase() == "COMMITTING"
    assert bench.core.scaling.running is not None
    assert bench.tell("DONE", 3) == []
    assert (bench.phase(), bench.core.replicas[0].data) == ("DONE", 3)
    assert bench.core.replicas[0].ranks == ["rank 0", "rank 1", "rank 2"]
    assert bench.core.scaling.running is None
    assert bench.size_of_the_next() == 3


def test_shrink_ends_the_ranks_that_left() -> None:
    bench = ScaleBench()
    bench.begin()
    bench.tell("DONE", 3)
    assert sent(bench.apply("shrink", 2)) == [Scale("shrink", 2)]
    assert bench.tell("PREPARING", 3, op_id="shrink") == []
    assert bench.tell("DONE", 2, op_id="shrink", gone=[3]) == [ev.EndRanks(0, 1, (3,))]
    assert bench.size_of_the_next() == 2


def test_the_engine_takes_it_back() -> None:
    bench = ScaleBench()
    bench.begin()
    assert bench.tell("ABORTED", gone=[2, 3], detail="rank 2 died") == [ev.EndRanks(0, 1, (2, 3))]
    assert (bench.phase(), bench.detail(), bench.core.replicas[0].data) == ("ABORTED", "rank 2 died", 1)
    assert bench.size_of_the_next() is None


def test_the_same_id_is_the_same_operation() -> None:
    bench = ScaleBench()
    bench.begin()
    assert bench.apply() == []
    bench.tell("DONE", 3)
    assert bench.apply() == []
    assert bench.phase() == "DONE"
    with pytest.raises(DuplicateRequestError, match=r"'grow' is for data 3 of all replicas; .* data 4 of all replicas"):
        bench.apply("grow", 4)
    with pytest.raises(DuplicateRequestError, match="for data 3 of replica 0"):
        bench.apply("grow", 3, 0)


def test_another_one_is_refused_while_one_is_under_way() -> None:
    bench = ScaleBench()
    bench.begin()
    for phase in ("PREPARING", "COMMITTING"):
        bench.tell(phase, wanted=WANTED)
        with pytest.raises(ConfigError, match=rf"'grow' to data 3 is under way \({phase}\); wait"):
            bench.apply("other", 2)
    bench.tell("DONE", 3)
    assert sent(bench.apply("other", 2)) == [Scale("other", 2)]


@pytest.mark.parametrize("phase", ["asked", "PREPARING", "COMMITTING", "DONE"])
@pytest.mark.parametrize("how", ["link", "words", "lease", "processes", "successor"])
def test_a_replica_lost_on_the_way(phase: Phase, how: str) -> None:
    """At the old size until DONE was heard, then at the new one; what the dead one still says changes nothing."""
    bench = ScaleBench()
    bench.apply()
    if phase != "asked":
        bench.tell("PREPARING", wanted=WANTED)
        bench.tell(phase, 3 if phase == "DONE" else 1, wanted=WANTED)
    match how:
        case "link":
            bench(ev.LinkLost(1, "reset"))
        case "words":
            bench(ev.FrameReceived(1, Failed(-1, "", "", "rank 2 died")))
        case "lease":
            for _ in range(5):
                bench(ev.Tick(), later=0.5)
        case "processes":
            bench(ev.ReplicaGone(0, 1, "sigkill", "killed"))
        case "successor":
            assert bench.size_of_the_next() == (3 if phase == "DONE" else None)
    assert bench.phase() == ("DONE" if phase == "DONE" else "ABORTED")
    if phase != "DONE":
        assert "the replica was lost and restarts at its former size" in bench.detail()
    bench.tell("DONE", 3)  # late
    assert bench.phase() == ("DONE" if phase == "DONE" else "ABORTED")
    assert bench.size_of_the_next(3) == (3 if phase == "DONE" else None)
    bench.hello(2, incarnation=3)
    assert sent(bench.apply("next", 2), 2) == [Scale("next", 2)]


def test_ranks_that_cannot_be_started() -> None:
    bench = ScaleBench()
    bench.begin()
    failed = ev.GrowFailed(0, 1, "grow", "0 of 4 CPU free")
    assert sent(bench(failed)) == [AbortScale("grow", "0 of 4 CPU free")]
    assert bench.phase() == "PREPARING", "the engine decides"
    bench.tell("ABORTED", gone=[2, 3], detail="0 of 4 CPU free")
    for late in (failed, failed._replace(op_id="unknown"), failed._replace(replica=9)):
        assert bench(late) == []


def test_ranks_of_another_incarnation_that_cannot_be_started() -> None:
    bench = ScaleBench()
    bench.begin()
    assert bench(ev.GrowFailed(0, 2, "grow", "no room")) == []
    assert bench.phase() == "PREPARING"


def test_a_supervisor_that_comes_back_is_asked_again() -> None:
    bench = ScaleBench()
    bench.begin()
    assert bench(ev.SupervisorUp()) == [ev.StartRanks(0, 1, "grow", ((2,), (3,)))]
    bench.tell("DONE", 3)
    assert bench(ev.SupervisorUp()) == []


def test_a_supervisor_that_comes_back_hears_again_of_ranks_that_are_gone() -> None:
    bench = ScaleBench()
    bench.begin()
    bench.tell("ABORTED", gone=[2, 3])
    assert bench(ev.SupervisorUp()) == [ev.EndRanks(0, 1, (2, 3))]
    bench.apply("again")
    bench.tell("ABORTED", op_id="again", gone=[4])
    assert bench(ev.SupervisorUp()) == [ev.EndRanks(0, 1, (2, 3, 4))]
    bench(ev.ReplicaStarting(0, 2))
    assert not [effect for effect in bench(ev.SupervisorUp()) if isinstance(effect, ev.EndRanks)]


def test_a_repair_is_the_engines_own() -> None:
    """The size that an operator wanted stays: a restart has it again."""
    bench = ScaleBench()
    bench.begin()
    bench.tell("DONE", 3)
    assert bench.tell("DONE", 2, op_id="repair-3", gone=[1]) == [ev.EndRanks(0, 1, (1,))]
    assert bench.core.replicas[0].data == 2
    assert bench.core.scaling.find("repair-3") is None
    assert bench.size_of_the_next() == 3


def test_all_replicas_or_one() -> None:
    bench = ScaleBench()
    bench.hello(2, replica=1)
    effects = bench.apply()
    assert (sent(effects, 1), sent(effects, 2)) == ([Scale("grow", 3)], [Scale("grow", 3)])
    bench.tell("DONE", 3)
    assert bench.phase() == "PREPARING", "of the other one"
    bench.tell("ABORTED", link=2, detail="no room")
    assert (bench.phase(), bench.detail(replica=1)) == ("ABORTED", "no room")
    effects = bench.apply("rest", 3)
    assert (sent(effects, 1), sent(effects, 2)) == ([], [Scale("rest", 3)])
    assert bench.detail("rest") == "it has this size already"
    bench.tell("DONE", 3, op_id="rest", link=2)
    assert bench.phase("rest") == "DONE"
    effects = bench.apply("one", 1, 1)
    assert (sent(effects, 1), sent(effects, 2)) == ([], [Scale("one", 1)])


def test_nodes_to_leave_are_passed_on_and_part_of_the_operation() -> None:
    bench = ScaleBench()
    assert sent(bench(ev.AskScale(5, 0, 1, ("a",)))) == [AskScale(5, 1, ("a",))]
    order = ev.ApplyScale("leave", 1, (), ("a", "b"))
    assert sent(bench(order)) == [Scale("leave", 1, ("a", "b"))], "although it has this size"
    assert sent(bench(order)) == []
    with pytest.raises(
        DuplicateRequestError, match=r"data 1 of all replicas without a, b; .* for data 1 of all replica"
    ):
        bench(ev.ApplyScale("leave", 1))


def test_refusals() -> None:
    bench = ScaleBench()
    with pytest.raises(InvalidRequestError, match="there is no replica 4; the replicas are 0"):
        bench.apply("a", 2, 4)
    for data in (0, -1, 4097):
        with pytest.raises(InvalidRequestError, match=rf"data \({data}\) must be 1 to 4096"):
            bench.apply("a", data)
    for op_id in ("", "x" * 129):
        with pytest.raises(InvalidRequestError, match=r"op_id has .* characters; give 1 to 128"):
            bench.apply(op_id)
    bench(ev.LinkLost(1, "reset"))
    with pytest.raises(UnavailableError, match="replica 0 is lost; retry"):
        bench.apply()
    with pytest.raises(UnavailableError, match="replica 0 is lost; retry"):
        bench(ev.AskScale(1, 0, 2))
    with pytest.raises(UnavailableError, match="no replica is up yet"):
        Bench()(ev.ApplyScale("a", 2))
    assert bench.core.scaling.running is None


def estimate(call: int) -> ScaleEstimate:
    return ScaleEstimate(call, "", 0, 1, 3, 1, 1, 8, 16, [], 0, 0)


def test_a_question_is_passed_on_and_answered_once() -> None:
    bench = ScaleBench()
    assert sent(bench(ev.AskScale(5, 0, 3))) == [AskScale(5, 3)]
    assert bench(ev.FrameReceived(1, estimate(6))) == [], "nobody asked"
    assert bench(ev.FrameReceived(1, estimate(5))) == [ev.ScaleAnswer(5, estimate(5))]
    assert bench(ev.FrameReceived(1, estimate(5))) == []


def test_a_question_to_a_replica_that_is_lost() -> None:
    bench = ScaleBench()
    bench(ev.AskScale(5, 0, 3))
    assert ev.ScaleAnswer(5, None) in bench(ev.LinkLost(1, "reset"))
    bench.hello(2, incarnation=2)
    assert bench(ev.FrameReceived(2, estimate(5))) == []


def test_old_operations_are_forgotten() -> None:
    bench = ScaleBench()
    for number in range(RETAINED + 3):
        bench.apply(f"op-{number}", 1)
    assert bench.core.scaling.find("op-2") is None
    assert bench.phase("op-3") == "DONE"

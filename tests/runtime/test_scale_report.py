"""What an engine says before and while it scales, against the checkpoint file and its placement (about 2 s)."""

from math import prod
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from phalanx.models.hf_config import read_config
from phalanx.models.loading import resolve_path
from phalanx.moe.placement.types import LayerPlacement
from phalanx.parallel.mesh import MeshShape
from phalanx.runtime import scale_report
from phalanx.runtime.engine import Engine
from phalanx.runtime.executor.executor import Event, HasFileno
from phalanx.runtime.offline_config import resolve_offline
from phalanx.runtime.plan import Order, Ready, StepPlan

MODEL = Path(resolve_path("tiny-moe"))
NUM_EXPERTS, NUM_LAYERS = 16, 4


class SilentRanks:
    """Ranks that are up and say nothing."""

    def __init__(self, num_ranks: int) -> None:
        self.members = set(range(num_ranks))
        self.spare: set[int] = set()
        self.nodes = {rank: f"node {rank % 2}" for rank in range(num_ranks)}
        self.ready = {
            rank: Ready(rank, "", self.nodes[rank], 100 + rank, "cpu", "", {}, []) for rank in range(num_ranks)
        }
        self.grown: list[int] = []
        self.dropped: list[int] = []

    def submit(self, plan: StepPlan) -> None:
        raise AssertionError("nothing runs")

    def send(self, rank: int, order: Order) -> None:
        assert rank in self.members

    def poll(self, timeout_s: float, wake: HasFileno | None = None) -> list[Event]:
        return []

    def grow(self, ranks: Any) -> None:
        self.grown += ranks

    def brief(self, spec: object) -> None:
        raise AssertionError("nobody came")

    def drop(self, ranks: Any) -> None:
        self.dropped += ranks

    def close(self) -> None:
        return


def engine(data: int, model: str = str(MODEL), **moe: Any) -> Engine:
    sections: dict[str, Any] = {"scheduler": {}, "kv": {"num_blocks": 100}, "workers": {"threads": 1}, "kernels": {}}
    config = resolve_offline(
        model,
        read_config(model),
        MeshShape(dp=data),
        stage_layers=None,
        device="cpu",
        dtype="float32",
        moe=moe,
        **sections,
    )
    return Engine(config, SilentRanks(data))


def elements(*, of_experts: bool) -> int:
    """Of the checkpoint's tensors."""
    with safe_open(MODEL / "model.safetensors", "numpy") as file:
        names = [name for name in sorted(file.keys()) if (".experts." in name) == of_experts]
        return sum(prod(file.get_slice(name).get_shape()) for name in names)


def test_bytes_are_those_of_the_checkpoint() -> None:
    report = scale_report.estimate(engine(2), 7, 4)
    (stage,) = report.stages
    assert (report.call, report.refusal, report.old, report.new, report.generation) == (7, "", 2, 4, 0)
    assert (report.slots_per_rank, report.num_experts) == (8, NUM_EXPERTS)
    assert stage.dense == 4 * elements(of_experts=False)
    assert stage.experts == 4 * elements(of_experts=True) * 8 // NUM_EXPERTS
    assert (report.moved_rows, report.moved_bytes) == (0, 0), "nobody leaves"


@pytest.mark.parametrize(("target", "orphans"), [(2, 8), (3, 8), (4, 0)])
def test_rows_that_move_are_those_nobody_else_holds(target: int, orphans: int) -> None:
    """Ranks 0 to 2 hold experts 0 to 7, ranks 3 and 4 the rest."""
    under_test = engine(5, redundant_experts=24)
    planner = under_test.mesh.planner
    assert planner is not None
    table = (*range(8), *range(8), *range(8), *range(8, 16), *range(8, 16))
    planner.enter(planner.topologies, [LayerPlacement(1, table)] * NUM_LAYERS)
    report = scale_report.estimate(under_test, 1, target)
    assert report.moved_rows == orphans * NUM_LAYERS
    assert report.moved_bytes == orphans * 4 * elements(of_experts=True) // NUM_EXPERTS


def test_a_refusal_has_no_figures() -> None:
    report = scale_report.estimate(engine(2), 1, 1)
    assert report.refusal == "data 1: 1 ranks of 8 expert slots hold 8 of 16 experts; use 2 or more"
    assert (report.stages, report.moved_rows) == ([], 0)
    local = scale_report.estimate(engine(1, dispatch="local"), 1, 2)
    assert local.refusal == "data 2: moe.dispatch local is for an expert group of one rank; use auto"


def test_nodes_are_left() -> None:
    """Even ranks are on node 0, odd ones on node 1; ranks 1 and 3 hold what nobody else has."""
    under_test = engine(4, redundant_experts=16)
    planner = under_test.mesh.planner
    assert planner is not None
    planner.enter(planner.topologies, [LayerPlacement(1, (*range(8), *range(8, 16)) * 2)] * NUM_LAYERS)
    assert scale_report.estimate(under_test, 1, 2).moved_rows == 0
    report = scale_report.estimate(under_test, 1, 2, ["node 1"])
    assert (report.refusal, report.moved_rows) == ("", 8 * NUM_LAYERS)
    op = under_test.scale("leave", 2, 0.0, ("node 1",))
    assert (op.goal.new, op.goal.removed) == ((0, 2), (1, 3))


def test_nodes_that_cannot_be_left() -> None:
    report = scale_report.estimate(engine(4, redundant_experts=16), 1, 3, ["node 1"])
    assert report.refusal == (
        "data 3: only 2 of 4 data-parallel ranks are not on node 1; use 2 or less, or scale up before"
    )
    report = scale_report.estimate(engine(4), 1, 2, ["node 7"])
    assert "hold 8 of 16" in report.refusal, "the size is refused first"
    report = scale_report.estimate(engine(4, redundant_experts=16), 1, 2, ["node 0", "node 1"])
    assert report.refusal == ("data 2: only 0 of 4 data-parallel ranks are not on node 0, node 1; scale up before")
    report = scale_report.estimate(engine(4, redundant_experts=16), 1, 2, ["node 7"])
    assert (report.refusal, report.nodes) == ("", ["node 0", "node 1"]), "another replica may be there"


def test_a_dense_model_is_refused() -> None:
    report = scale_report.estimate(engine(2, str(resolve_path("tiny"))), 1, 3)
    assert report.refusal == "only replicas of a mixture-of-experts model can be scaled; raise replicas instead"


def test_states() -> None:
    under_test = engine(2)
    op = under_test.scale("grow", 4, 0.0)
    state = scale_report.state(under_test, op)
    assert (state.op_id, state.phase, state.data, state.wanted, state.gone) == ("grow", "PREPARING", 2, [[2], [3]], [])
    under_test.abort_scale("another", "no", 1.0)
    assert op.phase == "PREPARING"
    under_test.abort_scale("grow", "no room", 1.0)
    state = scale_report.state(under_test, op)
    assert (state.phase, state.detail, state.wanted, state.gone) == ("ABORTED", "no room", [], [2, 3])
    assert under_test.executor.dropped == [2, 3]
    assert scale_report.state(under_test, under_test.scale("again", 3, 2.0)).wanted == [[4]], "numbers are used once"


def test_rank_lines() -> None:
    assert scale_report.rank_lines(engine(2)) == [
        "rank 0 (pp 0, dp 0, tp 0) node node 0 pid 100 cpu",
        "rank 1 (pp 0, dp 1, tp 0) node node 1 pid 101 cpu",
    ]

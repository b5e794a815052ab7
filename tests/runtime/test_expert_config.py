"""How the `moe` section becomes the expert groups of a replica, and what is refused; the load that status shows."""

import dataclasses
import re

import numpy as np
import pytest

from phalanx.errors import ConfigError
from phalanx.models.qwen3_moe import TINY, decoder_config
from phalanx.moe.placement.types import LayerPlacement
from phalanx.parallel.mesh import MeshShape
from phalanx.runtime.expert_config import ExpertConfig, ExpertOptions, resolve_experts, slots_per_rank
from phalanx.runtime.expert_load import rank_loads
from phalanx.runtime.offline_config import resolve_offline

MODEL = decoder_config({**TINY, "num_experts": 6})


def resolved(shape: MeshShape, **options: object) -> ExpertConfig | None:
    stages = [(0, len(MODEL.layers))]
    return resolve_experts(MODEL, shape, stages, 4, ExpertOptions(**options))  # type: ignore[arg-type]


def test_slots_hold_all_experts_and_the_redundant_ones() -> None:
    assert [slots_per_rank(MODEL, size, 0) for size in (1, 2, 4, 6, 8)] == [6, 3, 2, 1, 1]
    assert [slots_per_rank(MODEL, size, 2) for size in (2, 4, 6)] == [4, 2, 2]
    with pytest.raises(ConfigError, match=r"redundant_experts \(1\): 7 slots per rank on 1 ranks, .* only 6 experts"):
        slots_per_rank(MODEL, 1, 1)


def test_an_accepted_section() -> None:
    experts = resolved(MeshShape(dp=2, tp=2), exact=True, node_size=2)
    assert experts is not None
    assert experts.num_experts == (6,) * len(MODEL.moe_layers)
    assert set(experts.stage_of) == {0}
    assert experts.node_names(["a", "b", "c", "d"]) == ["group 0", "group 0", "group 1", "group 1"]
    assert dataclasses.replace(experts, node_size=0).node_names(["a", "b"]) == ["a", "b"]


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        (MeshShape(), {"dispatch": "ring"}, r"moe.dispatch \('ring'\) is unknown; use one of auto, local"),
        (MeshShape(dp=2), {"dispatch": "local"}, "needs an expert group of one rank, not 2"),
        (MeshShape(dp=2, tp=2), {"on_rank_loss": "shrink"}, "needs tensor 1 and pipeline 1, not 2 and 1"),
        (MeshShape(dp=2), {"redundant_experts": 7}, r"redundant_experts \(7\): 7 slots per rank .*; use 6 or less"),
    ],
)
def test_refused(shape: MeshShape, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolved(shape, **options)


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        ({"dispach": "flat"}, "unknown field `dispach`.*valid keys: dispatch, exact"),
        ({"dispatch": "ring"}, "Invalid enum value 'ring'"),
        ({"redundant_experts": -1}, r"moe.redundant_experts \(-1\) must be an integer from 0"),
        ({"rebalance": {"max_moved": 0}}, r"max_moved \(0.0\) must be a number in \(0, 1\]"),
        ({"capacity": {"factor": -1.0}}, r"factor \(-1.0\) must be a positive number"),
    ],
)
def test_offline_keys_are_checked(moe: dict[str, object], message: str) -> None:
    sections: dict[str, dict[str, object]] = {name: {} for name in ("scheduler", "kv", "workers", "kernels")}
    with pytest.raises(ConfigError, match=re.compile(message, re.DOTALL)):
        resolve_offline("x", MODEL, MeshShape(), stage_layers=None, device="cpu", dtype="float32", moe=moe, **sections)  # type: ignore[arg-type]


def test_load_is_that_of_the_experts_a_rank_holds() -> None:
    experts = resolved(MeshShape(dp=2))
    assert experts is not None
    layers = len(experts.num_experts)
    placements = [LayerPlacement(0, (0, 1, 2, 3, 4, 5))] * layers
    loads = [np.array([10, 0, 0, 1, 2, 3])] * layers
    assert rank_loads(experts, placements, loads) == [10 * layers, 6 * layers]

"""Pyramid-residual mixture of experts beyond what every family is tested for: other configs, and what is refused."""

import re
import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from phalanx.errors import CheckpointError, ConfigError
from phalanx.models.checkpoint import SINGLE
from phalanx.models.decoder import Decoder
from phalanx.models.hf_config import read_config
from phalanx.models.pr_moe import TINY, decoder_config, locate
from phalanx.models.sizes import parameter_count
from phalanx.models.spec import MlpSpec
from phalanx.moe.spec import MoeSpec
from phalanx.parallel.mesh import MeshShape
from phalanx.parallel.rendezvous import single
from tests.models import drive
from tests.support import tiny

ALONE = single(torch.device("cpu"))


def test_the_pyramid_as_it_is_read() -> None:
    mlps = [layer.mlp for layer in decoder_config(TINY).layers]
    assert [mlp.router.num_experts if isinstance(mlp, MoeSpec) else 0 for mlp in mlps] == [3, 0, 5, 8]
    assert all(mlp.residual and mlp.shared is not None for mlp in mlps if isinstance(mlp, MoeSpec))
    assert isinstance(mlps[1], MlpSpec)


@pytest.mark.parametrize(
    "overrides",
    [
        {"num_experts": 4},
        {"residual_mlp": False},
        {"num_experts": [0, 0, 0, 6], "norm_topk_prob": False},
        {"num_experts": 0},
    ],
    ids=str,
)
def test_other_configs_equal_the_reference(overrides: dict[str, Any], oracle_of: Any) -> None:
    oracle = oracle_of("pr_moe", **overrides)
    got = drive.logits_of(ALONE, str(oracle.path), oracle.sequences, "chunked")
    torch.testing.assert_close(got, oracle.logits, atol=5e-5, rtol=0)


def test_a_decoder_alone_holds_layers_of_different_sizes() -> None:
    """Without an expert group given, as `tests/models/test_families.py` builds them."""
    config = decoder_config(TINY)
    decoder = Decoder(
        config, ALONE, device=torch.device("cpu"), dtype=torch.float32, layer_range=(0, 4), max_model_len=8
    )
    held = {name.split(".")[1] + "." + name.split(".")[4] for name in decoder.parameters() if ".experts." in name}
    assert held == {f"{layer}.{e}" for layer, count in enumerate([3, 0, 5, 8]) for e in range(count)}


@pytest.mark.parametrize("value", [None, -1, [3, 0, 5], [3, 0, 5, 8, 8], [3, 0, 5, "8"], [3, 0, 5, True], 2.5, "8"])
def test_a_list_of_experts_that_is_none(value: object) -> None:
    message = f"num_experts must be a number, or one for each of 4 layers, not {value!r}"
    with pytest.raises(CheckpointError, match=re.escape(message)):
        decoder_config({**TINY, "num_experts": value})


def test_a_layer_with_fewer_experts_than_a_token_visits() -> None:
    with pytest.raises(ConfigError, match=r"top_k \(2\) must be 1 to 1"):
        decoder_config({**TINY, "num_experts": [3, 0, 1, 8]})


TASKS = [[[0, 1], [4, 0], [7, 2]], [[2, 1], [3, 1], [0, 5]]]


def test_tasks_as_they_are_read() -> None:
    config = decoder_config({**TINY, "task_experts": TASKS})
    assert config.num_tasks == 2
    assert decoder_config(TINY).num_tasks == 0
    tables = [spec.tasks.experts for spec in config.moe_specs((0, 4)) if spec.tasks is not None]
    assert tables == [((0, 1), (2, 1)), ((4, 0), (3, 1)), ((7, 2), (0, 5))]


def test_a_model_with_tasks_has_no_gate(oracle_of: Any) -> None:
    """Nor does the planner count one; without an engine all tokens are of task 0."""
    oracle = oracle_of("pr_moe", task_experts=TASKS)
    got = drive.logits_of(ALONE, str(oracle.path), oracle.sequences, "chunked")
    torch.testing.assert_close(got, oracle.logits, atol=5e-5, rtol=0)
    config, model = read_config(oracle.path), tiny.load_hf(oracle.path)
    counted = parameter_count(config, MeshShape(), (0, 4), True, True)
    assert counted == sum(parameter.numel() for parameter in model.parameters())
    router = {"model.layers.0.mlp.gate.weight": torch.zeros(3, 64)}
    tensors = load_file(oracle.path / SINGLE)
    assert not any(name.endswith("mlp.gate.weight") for name in tensors)
    other = shutil.copytree(oracle.path, oracle.path.with_name("with-router"))
    save_file(tensors | router, other / SINGLE)
    with pytest.raises(CheckpointError, match=r"'model.layers.0.mlp.gate.weight' has no place in this model"):
        drive.load_stage(str(other), ALONE)


SHAPE = "must be a list of tasks, each of 3 lists (one for each layer with experts) of 2 numbers"
BAD_TASKS: dict[str, tuple[dict[str, Any], str]] = {
    "no list": ({"task_experts": 5}, f"task_experts {SHAPE}"),
    "no task": ({"task_experts": []}, f"task_experts {SHAPE}"),
    "a layer missing": ({"task_experts": [TASKS[0], TASKS[1][:2]]}, f"task_experts {SHAPE}"),
    "a choice missing": ({"task_experts": [[[0], [4, 0], [7, 2]]]}, f"task_experts {SHAPE}"),
    "half an expert": ({"task_experts": [[[0.5, 1], [4, 0], [7, 2]]]}, f"task_experts {SHAPE}"),
    "another layer's expert": (
        {"task_experts": [TASKS[0], [[2, 3], [3, 1], [0, 5]]]},
        "task_experts[1][0] ([2, 3]) must be 2 different experts from 0 to 2",
    ),
    "an expert twice": (
        {"task_experts": [[[0, 1], [4, 4], [7, 2]]]},
        "task_experts[0][1] ([4, 4]) must be 2 different experts from 0 to 4",
    ),
    "weights alone": ({"task_weights": [[[1, 1]] * 3]}, f"task_experts {SHAPE}"),
    "weights of a task missing": (
        {"task_experts": TASKS, "task_weights": [[[1, 1]] * 3]},
        "task_weights are of 1 tasks, task_experts of 2",
    ),
    "no layer for them": ({"task_experts": [5], "num_experts": 0}, "need layers with experts; there are none"),
    "a weight beyond all floats": ({"task_experts": TASKS, "task_weights": [[[1, 10**400]] * 3] * 2}, SHAPE),
    "a weight that is none": ({"task_experts": TASKS, "task_weights": [[[1, float("nan")]] * 3] * 2}, SHAPE),
}


@pytest.mark.parametrize("case", BAD_TASKS)
def test_tables_of_tasks_that_are_none(case: str) -> None:
    fields, message = BAD_TASKS[case]
    with pytest.raises(CheckpointError, match=re.escape(message)):
        decoder_config({**TINY, **fields})


@pytest.mark.parametrize(
    "name", ["mlp.coefficients.weight", "mlp.residual_mlp.w1.weight", "mlp.residual.up_proj.weight"]
)
def test_unknown_names(name: str) -> None:
    with pytest.raises(CheckpointError, match="has no place in this model"):
        locate(f"model.layers.0.{name}")

"""Rope tables against transformers' own functions. Runs in 3 s (importing transformers)."""

import copy
from typing import Any

import pytest
import torch

from phalanx.errors import CheckpointError, ConfigError
from phalanx.models.hf_config import read_rope
from phalanx.models.rope import cos_sin_table, inverse_frequencies

BASE = {"max_position_embeddings": 512, "hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "old spelling": {"type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {**LLAMA3, "original_max_position_embeddings": 64},
    "llama3 without original": LLAMA3,
    "llama3 wide": {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 128, "high_freq_factor": 16.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn betas": {
        "rope_type": "yarn",
        "factor": 16.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 8.0,
        "beta_slow": 2.0,
    },
    "yarn mscale": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 64,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
    },
    "yarn attention factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.25,
        "truncate": False,
    },
}


def oracle(rope: dict[str, Any], theta: float) -> tuple[torch.Tensor, float]:
    """transformers' frequencies and attention factor."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    spelled = {"rope_scaling": copy.deepcopy(rope)} if rope else {}
    config = LlamaConfig(**BASE, rope_theta=theta, **spelled)
    kind = config.rope_parameters["rope_type"]
    compute = LlamaRotaryEmbedding.compute_default_rope_parameters if kind == "default" else ROPE_INIT_FUNCTIONS[kind]
    frequencies, factor = compute(config)
    return frequencies, factor


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_equal_transformers(name, theta):
    rope = SCALINGS[name]
    expected, factor = oracle(rope, theta)
    for hf in (
        {**BASE, "rope_theta": theta, "rope_scaling": rope or None},
        {**BASE, "rope_parameters": {**rope, "rope_theta": theta}},
    ):
        spec = read_rope(hf, 24)
        torch.testing.assert_close(inverse_frequencies(spec), expected, atol=0, rtol=2e-7)
        assert spec.attention_factor == pytest.approx(factor, rel=1e-12)


def test_scalings_differ():
    specs = [read_rope({**BASE, "rope_theta": 10000.0, "rope_scaling": rope}, 24) for rope in SCALINGS.values()]
    tables = [cos_sin_table(spec, 512, torch.device("cpu")) for spec in specs]
    same = [(i, j) for i in range(len(tables)) for j in range(i) if torch.equal(tables[i], tables[j])]
    assert same == [(3, 0)]  # dynamic changes nothing up to the original length


def test_table_layout():
    spec = read_rope({**BASE, "rope_scaling": SCALINGS["yarn attention factor"]}, 24)
    table = cos_sin_table(spec, 100, torch.device("cpu"))
    angles = torch.arange(100)[:, None].double() * inverse_frequencies(spec).double()
    expected = 1.25 * torch.cat([angles.cos(), angles.sin()], dim=1)
    assert table.dtype == torch.float32
    torch.testing.assert_close(table.double(), expected, atol=1e-5, rtol=0)


def test_dynamic_scaling_refuses_what_it_cannot_do():
    spec = read_rope({**BASE, "rope_scaling": SCALINGS["dynamic"]}, 24)
    assert cos_sin_table(spec, 512, torch.device("cpu")).shape == (512, 24)
    with pytest.raises(ConfigError, match=r"max_model_len \(513\).* use max_model_len: 512 or less"):
        cos_sin_table(spec, 513, torch.device("cpu"))


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "rope_type 'longrope' is not supported; default,"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {**LLAMA3, "factor": "8"}}, "factor must be a positive number, not '8'"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": None}}, "low_freq_factor is missing"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported; 1.0 can be served"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "one flat set of rope parameters"),
        ({"rope_theta": -1}, "rope_theta must be a positive number, not -1"),
    ],
)
def test_unsupported_rope_is_named(hf, message):
    with pytest.raises(CheckpointError, match=message):
        read_rope({**BASE, **hf}, 24)

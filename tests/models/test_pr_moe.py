"""Pyramid-residual mixture of experts beyond what every family is tested for: other configs, and what is refused."""

import re
from typing import Any

import pytest
import torch

from phalanx.errors import CheckpointError, ConfigError
from phalanx.models.decoder import Decoder
from phalanx.models.pr_moe import TINY, decoder_config, locate
from phalanx.models.spec import MlpSpec
from phalanx.moe.spec import MoeSpec
from phalanx.parallel.rendezvous import single
from tests.models import drive

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


@pytest.mark.parametrize(
    "name", ["mlp.coefficients.weight", "mlp.residual_mlp.w1.weight", "mlp.residual.up_proj.weight"]
)
def test_unknown_names(name: str) -> None:
    with pytest.raises(CheckpointError, match="has no place in this model"):
        locate(f"model.layers.0.{name}")

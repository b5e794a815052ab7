"""The planner's arithmetic against tensors that were really allocated. Runs in 1 s."""

import dataclasses

import pytest
import torch

from phalanx import plugins
from phalanx.errors import ConfigError
from phalanx.models.decoder import Decoder
from phalanx.models.hf_config import FAMILY
from phalanx.models.sizes import expert_parameter_count, kv_bytes_per_token, parameter_count
from phalanx.moe.group import ExpertGroup
from phalanx.moe.placement.linear import linear
from phalanx.parallel.group import Group
from phalanx.parallel.mesh import Mesh, MeshShape
from phalanx.parallel.pipeline import split_layers
from phalanx.parallel.topology import EpTopology
from tests.support import tiny

CPU = torch.device("cpu")
SHAPES = [MeshShape(), MeshShape(tp=2), MeshShape(dp=2, tp=2), MeshShape(tp=4), MeshShape(pp=2), MeshShape(pp=2, tp=4)]


def config_of(family):
    module = plugins.load("models", family, FAMILY)
    return module.decoder_config(module.TINY)


def build(config, shape, stage, tp_rank, slots_per_rank=None):
    mesh = Mesh(shape=shape, rank=shape.rank(stage, 0, tp_rank), device=CPU, tp=Group(tp_rank, shape.tp))
    layer_range = split_layers(len(config.layers), shape.pp)[stage]
    num_experts = [spec.router.num_experts for spec in config.moe_specs(layer_range)]
    experts = None
    if num_experts:
        num_ranks = shape.dp * shape.tp
        slots = slots_per_rank or -(-max(num_experts) // num_ranks)
        layers = linear(num_experts, num_ranks, slots).layers
        experts = ExpertGroup(EpTopology.uniform(1, num_ranks), tp_rank, layers, slots, exact=True, device=CPU)
    return Decoder(
        config,
        mesh,
        device=CPU,
        dtype=torch.bfloat16,
        layer_range=layer_range,
        max_model_len=32,
        choose={},
        experts=experts,
    )


def held_by(decoder):
    tensors = {id(parameter): parameter.tensor for parameter in decoder.parameters().values()}
    return sum(tensor.numel() for tensor in tensors.values())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("family", tiny.family_names())
def test_parameter_count(family, shape):
    config = config_of(family)
    for stage in range(shape.pp):
        for tp_rank in {0, shape.tp - 1}:
            decoder = build(config, shape, stage, tp_rank)
            counted = parameter_count(config, shape, decoder.layer_range, decoder.is_first, decoder.is_last)
            assert counted == held_by(decoder)


@pytest.mark.parametrize("slots", [3, 4, 6])
def test_redundant_slots_count(slots):
    config, shape = config_of("qwen3_moe"), MeshShape(dp=2)
    decoder = build(config, shape, 0, 0, slots)
    counted = parameter_count(config, shape, decoder.layer_range, True, True, slots)
    assert counted == held_by(decoder)
    fewest = parameter_count(config, shape, decoder.layer_range, True, True)
    one = expert_parameter_count(config.layers[0].mlp.experts, config.hidden_size)
    assert counted - fewest == (slots - 3) * len(config.moe_layers) * one


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("family", tiny.family_names())
def test_kv_bytes(family, shape):
    config = config_of(family)
    for stage in range(shape.pp):
        decoder = build(config, shape, stage, 0)
        pool = torch.empty(decoder.kv_shape(3, 4), dtype=torch.bfloat16)
        per_token = kv_bytes_per_token(config, shape.tp, decoder.layer_range, pool.itemsize)
        assert per_token * 3 * 4 == pool.nbytes


def test_the_whole_is_what_transformers_counts():
    for family in tiny.family_names():
        config, model = config_of(family), tiny.hf_model(family)
        counted = parameter_count(config, MeshShape(), (0, len(config.layers)), True, True)
        biases = [buffer for name, buffer in model.named_buffers() if name.endswith("correction_bias")]
        assert counted == sum(tensor.numel() for tensor in [*model.parameters(), *biases]), family


def test_one_pool_needs_equal_layers():
    config = config_of("llama")
    wide = dataclasses.replace(config.layers[0].attention, head_dim=32)
    layers = (dataclasses.replace(config.layers[0], attention=wide), *config.layers[1:])
    with pytest.raises(ConfigError, match=r"different kv heads or head sizes \[\(2, 24\), \(2, 32\)\]"):
        kv_bytes_per_token(dataclasses.replace(config, layers=layers), 1, (0, 3), 2)

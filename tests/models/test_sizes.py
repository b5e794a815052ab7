"""The planner's arithmetic against tensors that were really allocated. Runs in 1 s."""

import dataclasses

import pytest
import torch

from phalanx import plugins
from phalanx.errors import ConfigError
from phalanx.models.decoder import Decoder
from phalanx.models.hf_config import FAMILY
from phalanx.models.sizes import kv_bytes_per_token, parameter_count
from phalanx.parallel.group import Group
from phalanx.parallel.mesh import Mesh, MeshShape
from phalanx.parallel.pipeline import split_layers
from tests.support import tiny

CPU = torch.device("cpu")
SHAPES = [MeshShape(), MeshShape(tp=2), MeshShape(tp=4), MeshShape(pp=2), MeshShape(pp=2, tp=4)]


def config_of(family):
    module = plugins.load("models", family, FAMILY)
    return module.decoder_config(module.TINY)


def build(config, shape, stage, tp_rank):
    group = Group(tp_rank, shape.tp)
    mesh = Mesh(shape=shape, rank=shape.rank(stage, 0, tp_rank), device=CPU, tp=group, stage=group)
    layer_range = split_layers(len(config.layers), shape.pp)[stage]
    return Decoder(config, mesh, device=CPU, dtype=torch.bfloat16, layer_range=layer_range, max_model_len=32, choose={})


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("family", tiny.family_names())
def test_parameter_count(family, shape):
    config = config_of(family)
    for stage in range(shape.pp):
        for tp_rank in {0, shape.tp - 1}:
            decoder = build(config, shape, stage, tp_rank)
            tensors = {id(parameter): parameter.tensor for parameter in decoder.parameters().values()}
            held = sum(tensor.numel() for tensor in tensors.values())
            counted = parameter_count(config, shape, decoder.layer_range, decoder.is_first, decoder.is_last)
            assert counted == held


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
        config = config_of(family)
        counted = parameter_count(config, MeshShape(), (0, len(config.layers)), True, True)
        assert counted == sum(parameter.numel() for parameter in tiny.hf_model(family).parameters()), family


def test_one_pool_needs_equal_layers():
    config = config_of("llama")
    wide = dataclasses.replace(config.layers[0].attention, head_dim=32)
    layers = (dataclasses.replace(config.layers[0], attention=wide), *config.layers[1:])
    with pytest.raises(ConfigError, match=r"different kv heads or head sizes \[\(2, 24\), \(2, 32\)\]"):
        kv_bytes_per_token(dataclasses.replace(config, layers=layers), 1, (0, 3), 2)

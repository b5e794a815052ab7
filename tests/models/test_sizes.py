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


# Config fields as on the Hugging Face Hub, and the parameters its model cards state, in billions.
PUBLISHED = {
    "Mixtral-8x7B": (
        46.7,
        "mixtral",
        {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
        | {"num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8},
    ),
    "Qwen1.5-MoE-A2.7B": (
        14.3,
        "qwen2_moe",
        {"vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24}
        | {"num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 60, "num_experts_per_tok": 4}
        | {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "mlp_only_layers": []},
    ),
    "Qwen3-30B-A3B": (
        30.5,
        "qwen3_moe",
        {"vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48}
        | {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128}
        | {"num_experts_per_tok": 8, "moe_intermediate_size": 768, "mlp_only_layers": []},
    ),
    "OLMoE-1B-7B": (
        6.92,
        "olmoe",
        {"vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16}
        | {"num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8},
    ),
    "gpt-oss-20b": (
        20.9,
        "gpt_oss",
        {"vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24}
        | {"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32},
    ),
    "DeepSeek-V2-Lite": (
        15.7,
        "deepseek_v2",
        {"vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944, "num_hidden_layers": 27}
        | {"num_attention_heads": 16, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64}
        | {"v_head_dim": 128, "moe_intermediate_size": 1408, "n_routed_experts": 64, "num_experts_per_tok": 6}
        | {"n_shared_experts": 2, "topk_method": "greedy", "attention_bias": False},
    ),
    "DeepSeek-V3": (
        671.0,
        "deepseek_v3",
        {"vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61}
        | {"num_attention_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128}
        | {"qk_rope_head_dim": 64, "v_head_dim": 128, "moe_intermediate_size": 2048, "n_routed_experts": 256}
        | {"num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "first_k_dense_replace": 3}
        | {"attention_bias": False},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    billions, family, fields = PUBLISHED[name]
    module = plugins.load("models", family, FAMILY)
    config = module.decoder_config({**module.TINY, **fields})
    counted = parameter_count(config, MeshShape(), (0, len(config.layers)), True, True)
    assert counted / 1e9 == pytest.approx(billions, rel=0.005)


def test_latent_attention_keeps_one_row_per_token():
    """DeepSeek-V3 in bf16: 576 channels x 61 layers x 2 bytes, on every tensor rank."""
    module = plugins.load("models", "deepseek_v3", FAMILY)
    config = module.decoder_config({**module.TINY, **PUBLISHED["DeepSeek-V3"][2]})
    assert kv_bytes_per_token(config, 8, (0, 61), 2) == 576 * 61 * 2


def test_one_pool_needs_equal_layers():
    config = config_of("llama")
    wide = dataclasses.replace(config.layers[0].attention, head_dim=32)
    layers = (dataclasses.replace(config.layers[0], attention=wide), *config.layers[1:])
    with pytest.raises(ConfigError, match=r"different kv heads or head sizes \[\(2, 24\), \(2, 32\)\]"):
        kv_bytes_per_token(dataclasses.replace(config, layers=layers), 1, (0, 3), 2)

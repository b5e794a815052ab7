"""Reading config.json: what is refused, and that the message names the field. Runs in 0.2 s."""

import json
import subprocess
import sys

import pytest

from phalanx import plugins
from phalanx.errors import CheckpointError
from phalanx.models.hf_config import FAMILY, read_config, resolve_path
from tests.support import tiny


def write(folder, fields, generation=None):
    folder.joinpath("config.json").write_text(json.dumps(fields))
    if generation is not None:
        folder.joinpath("generation_config.json").write_text(json.dumps(generation))
    return folder


def fields_of(family, **changes):
    return {**plugins.load("models", family, FAMILY).TINY, **changes}


REFUSED = [
    ("llama", {"model_type": "mamba"}, r"model_type 'mamba' is not supported; use one of deepseek_v2, .*, qwen3_moe"),
    ("llama", {"model_type": None}, "model_type None is not supported"),
    ("llama", {"model_type": "os.path"}, r"model_type 'os.path' is not supported"),
    ("llama", {"model_type": "decoder"}, r"model_type 'decoder' is not supported"),
    ("llama", {"quantization_config": {"quant_method": "awq"}}, "quantization_config .*awq.* is not supported"),
    ("llama", {"hidden_act": "relu"}, "hidden_act 'relu' is not supported; silu or gelu_pytorch_tanh can be served"),
    ("llama", {"hidden_size": None}, "hidden_size is missing"),
    ("llama", {"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer, not 0"),
    ("llama", {"vocab_size": True}, "vocab_size must be a positive integer, not True"),
    ("llama", {"attention_bias": "yes"}, "attention_bias must be true or false, not 'yes'"),
    ("llama", {"dtype": "float64"}, "dtype 'float64' is not supported; float32, bfloat16, float16"),
    ("llama", {"eos_token_id": "</s>"}, "eos_token_id must be an id or a list of ids"),
    ("llama", {"head_dim": None, "hidden_size": 66}, "hidden_size 66 is not a multiple of 4 heads"),
    ("mistral", {"layer_types": ["full_attention"] * 3}, "layer_types .* is not supported; mistral with one window"),
    ("qwen2", {"layer_types": ["full_attention"] * 3}, "layer_types must name one type for each of 4 layers"),
    ("qwen2", {"layer_types": ["chunked_attention"] * 4}, "layer_types 'chunked_attention' is not supported"),
    (
        "qwen3",
        {"layer_types": ["sliding_attention"] * 3, "use_sliding_window": False},
        "'sliding_attention' is not supported; without use_sliding_window",
    ),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention True is not supported"),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0 is not supported"),
    ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob True is not supported; false can be served"),
    ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc' is not supported; greedy and group_limited"),
    ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func 'sigmoid' is not supported"),
    ("deepseek_v2", {"mlp_bias": True}, "mlp_bias True is not supported"),
    ("deepseek_v2", {"moe_layer_freq": 2}, "moe_layer_freq 2 is not supported"),
    ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func 'softmax' is not supported; sigmoid can be served"),
    ("deepseek_v3", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config .*fp8.* is not supported"),
    (
        "deepseek_v3",
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 0]}},
        r"quantization_config .*\[128, 0\].* is not supported",
    ),
    ("deepseek_v3", {"first_k_dense_replace": -1}, "first_k_dense_replace must be a number of layers, not -1"),
    ("gpt_oss", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config .*gptq.* is not supported"),
    ("gpt_oss", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; silu"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv 8.0 is not supported; null can be served"),
    ("qwen3_moe", {"mlp_only_layers": "1"}, "mlp_only_layers '1' is not supported; a list of layer indices"),
    ("qwen3_moe", {"num_experts": None}, "num_experts is missing"),
    ("phi3", {"rope_scaling": {"type": "longrope"}}, "rope_type 'longrope' is not supported"),
    ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear' is not supported; phi3 without rope"),
]


@pytest.mark.parametrize(("family", "changes", "message"), REFUSED)
def test_refused_by_name(family, changes, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        read_config(write(tmp_path, fields_of(family, **changes)))


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "cannot be read"), ("[1]", "must hold a JSON object, not list"), ("[" * 100000, "cannot be read")],
)
def test_damaged_json(text, message, tmp_path):
    tmp_path.joinpath("config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_config(tmp_path)


def test_paths(tmp_path):
    with pytest.raises(CheckpointError, match=r"model.path '.*nowhere' is not a folder"):
        resolve_path(str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match=r"config.json cannot be read: .*No such file"):
        read_config(tmp_path)
    assert resolve_path(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    ("own", "generation", "expected"),
    [(2, None, (2,)), ([1, 2], None, (1, 2)), (None, None, ()), (2, {"eos_token_id": [7, 8]}, (7, 8)), (2, {}, (2,))],
)
def test_end_of_sequence_ids(own, generation, expected, tmp_path):
    config = read_config(write(tmp_path, fields_of("llama", eos_token_id=own), generation))
    assert config.eos_token_ids == expected


def test_null_head_dim_counts_as_missing(tmp_path):
    config = read_config(write(tmp_path, fields_of("llama", head_dim=None)))
    assert config.layers[0].attention.head_dim == 16


def test_qwen2_windows_need_the_switch(tmp_path):
    """A non-null `sliding_window` alone means nothing."""
    config = read_config(write(tmp_path, fields_of("qwen2", use_sliding_window=False)))
    assert [layer.attention.window for layer in config.layers] == [None] * 4
    config = read_config(write(tmp_path, fields_of("qwen2")))
    assert [layer.attention.window for layer in config.layers] == [None, None, 9, 9]


def test_gemma3_layers_have_their_own_rope(tmp_path):
    layers = read_config(write(tmp_path, fields_of("gemma3_text"))).layers
    assert [layer.attention.window for layer in layers] == [9, None, 9, None]
    assert [(layer.attention.rope.theta, layer.attention.rope.factor) for layer in layers[:2]] == [
        (1e4, 1.0),
        (1e6, 8.0),
    ]


def test_a_planner_reads_configs_without_torch(tmp_path):
    for family in tiny.family_names():
        folder = tmp_path / family
        folder.mkdir()
        write(folder, fields_of(family))
    code = (
        "import sys, pathlib; from phalanx.models.hf_config import read_config; import phalanx.models.sizes\n"
        "for folder in pathlib.Path(sys.argv[1]).iterdir(): read_config(folder)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60)

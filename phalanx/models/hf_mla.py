"""Read multi-head latent attention from a Hugging Face config, and its tensor names; for the DeepSeek families."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from phalanx.models.hf_config import (
    flag,
    integer,
    mscale,
    optional_integer,
    optional_number,
    read_rope,
    rope_parameters,
)
from phalanx.models.hf_moe import MOE, Names
from phalanx.models.spec import MlaSpec
from phalanx.models.weights import WHOLE

MODULES: Mapping[str, str] = {
    "q_proj": "q_proj",
    "q_a_proj": "q_a_proj",
    "q_a_layernorm": "q_a_norm",
    "q_b_proj": "q_b_proj",
    "kv_a_proj_with_mqa": "kv_a_proj",
    "kv_a_layernorm": "kv_a_norm",
    "kv_b_proj": "kv_b_proj",
    "o_proj": "o_proj",
}
LATENT_MOE: Names = {
    **{name: place for name, place in MOE.items() if not name.startswith("self_attn.")},
    **{f"self_attn.{name}": (f"attention.{module}", WHOLE) for name, module in MODULES.items()},
}
"""Names of a layer with latent attention and experts."""


def read_mla(hf: Mapping[str, Any], interleaved: bool) -> MlaSpec:
    """Latent attention; `head_dim` of the file is the rotated width and not read.

    Args:
        hf: the whole config.
        interleaved: pairs of the rotated channels are (2i, 2i + 1).
    """
    nope_dim, rope_dim = integer(hf, "qk_nope_head_dim"), integer(hf, "qk_rope_head_dim")
    rope = dataclasses.replace(read_rope(hf, rope_dim), interleaved=interleaved)
    scale: float = (nope_dim + rope_dim) ** -0.5
    weight = optional_number(rope_parameters(hf), "mscale_all_dim")
    if weight is not None and rope.scaling != "default":
        scale *= mscale(rope.factor, weight) ** 2
    return MlaSpec(
        num_heads=integer(hf, "num_attention_heads"),
        q_lora_rank=optional_integer(hf, "q_lora_rank"),
        kv_lora_rank=integer(hf, "kv_lora_rank"),
        nope_dim=nope_dim,
        rope_dim=rope_dim,
        value_dim=integer(hf, "v_head_dim"),
        scale=scale,
        rope=rope,
        bias=flag(hf, "attention_bias"),
    )

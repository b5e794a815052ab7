"""Read a Hugging Face `config.json`: the shared readers of the family files, and the entry point.

A field of the wrong type, a missing field without a default, or a value that would change the result in a way the
decoder does not know is a `CheckpointError` that names the field. No torch here: the planner reads configs, too.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from phalanx import plugins
from phalanx.errors import CheckpointError, ConfigError
from phalanx.models.spec import Activation, DecoderConfig, LayerSpec, RopeSpec

FAMILY = ("decoder_config", "locate", "TINY")
"""What a module of this folder exports when it is a model family."""

ACTIVATIONS: Mapping[str, Activation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
DTYPES = ("float32", "bfloat16", "float16")
EMBEDDED = ("tiny", "tiny-moe")
MAX_JSON_BYTES = 64 << 20
_REQUIRED = object()


def resolve_path(path: str) -> Path:
    """The folder of a checkpoint; the names in `EMBEDDED` mean the models that come with the package.

    Raises:
        CheckpointError: there is no such folder.
    """
    folder = Path(__file__).parents[1] / "assets" / path if path in EMBEDDED else Path(path).expanduser()
    if not folder.is_dir():
        raise CheckpointError(f"model.path {path!r} is not a folder; give a folder with config.json and *.safetensors")
    return folder


def read_config(path: str | Path) -> DecoderConfig:
    """Translate a checkpoint's `config.json`; end-of-sequence ids come from `generation_config.json` if it has them.

    Raises:
        CheckpointError: a file is missing or damaged, the model type is unknown, or a field is not supported.
    """
    folder = resolve_path(str(path))
    hf = read_json(folder / "config.json")
    read_quantization(hf)
    config: DecoderConfig = family(hf).decoder_config(hf)
    generation = folder / "generation_config.json"
    eos = read_json(generation).get("eos_token_id") if generation.is_file() else None
    return dataclasses.replace(config, eos_token_ids=read_eos({"eos_token_id": eos})) if eos is not None else config


class Quantization(NamedTuple):
    """How a checkpoint's quantized weights are stored: "mxfp4", or "fp8" in blocks of (rows, columns)."""

    method: str
    block: tuple[int, int] = (1, 1)


def read_quantization(hf: Mapping[str, Any]) -> Quantization | None:
    """What is to be dequantized when the weights are read; None = nothing.

    Raises:
        CheckpointError: a way to store weights that is not read.
    """
    value = hf.get("quantization_config")
    if value is None:
        return None
    method = value.get("quant_method") if isinstance(value, dict) else None
    block = value.get("weight_block_size") if isinstance(value, dict) else None
    if method == "mxfp4":
        return Quantization("mxfp4")
    if method == "fp8" and isinstance(block, list) and [type(n) is int and n > 0 for n in block] == [True, True]:
        return Quantization("fp8", (block[0], block[1]))
    raise unsupported("quantization_config", value, "mxfp4, and fp8 with a weight_block_size; or a plain checkpoint")


def family(hf: Mapping[str, Any]) -> Any:
    """The family module of a config.

    Raises:
        CheckpointError: its model type is not supported; the message lists those that are.
    """
    model_type = hf.get("model_type")
    try:
        # No dots, so that a checkpoint cannot name a module outside this folder.
        return plugins.load("models", str(model_type).replace("-", "_").replace(".", "_"), FAMILY)
    except ConfigError as error:
        known = ", ".join(plugins.names("models", FAMILY))
        raise CheckpointError(f"config.json: model_type {model_type!r} is not supported; use one of {known}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: the file is missing, too big, or not a JSON object.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} is larger than {MAX_JSON_BYTES} bytes; this is no configuration file")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def unsupported(field: str, value: object, supported: str) -> CheckpointError:
    """The error for a field that would change the result; `supported` says what is."""
    return CheckpointError(f"config.json: {field} {value!r} is not supported; {supported} can be served")


def integer(hf: Mapping[str, Any], field: str, default: Any = _REQUIRED) -> int:
    """A positive integer field; null counts as missing."""
    value = _field(hf, field, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"config.json: {field} must be a positive integer, not {value!r}")
    return value


def number(hf: Mapping[str, Any], field: str, default: Any = _REQUIRED) -> float:
    """A positive finite number field; null counts as missing."""
    value = _field(hf, field, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise CheckpointError(f"config.json: {field} must be a positive number, not {value!r}")
    return float(value)


def optional_number(hf: Mapping[str, Any], field: str, default: float | None = None) -> float | None:
    """A positive finite number field that null switches off."""
    value = hf.get(field, default)
    return None if value is None else number({field: value}, field)


def optional_integer(hf: Mapping[str, Any], field: str, default: int | None = None) -> int | None:
    """A positive integer field that null switches off."""
    value = hf.get(field, default)
    return None if value is None else integer({field: value}, field)


def flag(hf: Mapping[str, Any], field: str, default: bool = False) -> bool:
    """A boolean field; null counts as missing."""
    value = _field(hf, field, default)
    if not isinstance(value, bool):
        raise CheckpointError(f"config.json: {field} must be true or false, not {value!r}")
    return value


def read_activation(hf: Mapping[str, Any], field: str = "hidden_act", default: str = "silu") -> Activation:
    """The activation of the gated feed-forward."""
    name = _field(hf, field, default)
    if name not in ACTIVATIONS:
        raise unsupported(field, name, " or ".join(ACTIVATIONS))
    return ACTIVATIONS[name]


def read_head_dim(hf: Mapping[str, Any], default: int | None = None) -> int:
    """The width of a head; without one in the file (or null), the family's default or `hidden / heads`."""
    hidden_size, num_heads = integer(hf, "hidden_size"), integer(hf, "num_attention_heads")
    if hf.get("head_dim") is None and default is None and hidden_size % num_heads:
        raise CheckpointError(f"config.json: hidden_size {hidden_size} is not a multiple of {num_heads} heads")
    return integer(hf, "head_dim", default or hidden_size // num_heads)


def read_layer_types(hf: Mapping[str, Any], num_layers: int, default: Sequence[str]) -> tuple[str, ...]:
    """`full_attention` or `sliding_attention` for each layer; `default` where the file has no `layer_types`."""
    types = hf.get("layer_types")
    types = default if types is None else types
    if not isinstance(types, Sequence) or len(types) != num_layers:
        raise CheckpointError(f"config.json: layer_types must name one type for each of {num_layers} layers")
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            raise unsupported("layer_types", kind, "full_attention and sliding_attention")
    return tuple(types)


def read_eos(hf: Mapping[str, Any]) -> tuple[int, ...]:
    """`eos_token_id`: an integer, a list of integers, or null."""
    value = hf.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids):
        raise CheckpointError(f"eos_token_id must be an id or a list of ids, not {value!r}")
    return tuple(ids)


def read_rope(
    hf: Mapping[str, Any],
    head_dim: int,
    *,
    parameters: Mapping[str, Any] | None = None,
    partial: bool = False,
    default_theta: float = 10_000.0,
) -> RopeSpec:
    """The rotary embedding, in both spellings: `rope_theta` + `rope_scaling`, and `rope_parameters`.

    Args:
        hf: the whole config.
        head_dim: width of a head.
        parameters: already chosen by the family (one layer kind of gemma3); None = from the config.
        partial: whether the family can rotate only a part of a head.
        default_theta: where neither spelling has one.

    Raises:
        CheckpointError: the kind of scaling is not supported, or a parameter of it is missing.
    """
    rope = dict(parameters if parameters is not None else rope_parameters(hf))
    theta = number(rope, "rope_theta", hf.get("rope_theta") or default_theta)
    factor = rope.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    if factor not in (None, 1.0) and not partial:
        raise unsupported("partial_rotary_factor", factor, "1.0")
    rotary_dim = int(head_dim * number({"partial_rotary_factor": factor}, "partial_rotary_factor", 1.0))
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise unsupported("partial_rotary_factor", factor, f"an even part of head_dim {head_dim}")
    kind = rope.get("rope_type", rope.get("type")) or "default"
    if kind == "default":
        return RopeSpec(theta=theta, rotary_dim=rotary_dim)
    max_position = integer(hf, "max_position_embeddings")
    if kind == "linear":
        return RopeSpec(theta=theta, rotary_dim=rotary_dim, scaling="linear", factor=number(rope, "factor"))
    if kind == "dynamic":
        return RopeSpec(
            theta=theta,
            rotary_dim=rotary_dim,
            scaling="dynamic",
            factor=number(rope, "factor"),
            original_max_position=max_position,
        )
    original = hf.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    original = integer({"original_max_position_embeddings": original}, "original_max_position_embeddings", max_position)
    if kind == "llama3":
        return RopeSpec(
            theta=theta,
            rotary_dim=rotary_dim,
            scaling="llama3",
            factor=number(rope, "factor"),
            original_max_position=original,
            low_freq_factor=number(rope, "low_freq_factor"),
            high_freq_factor=number(rope, "high_freq_factor"),
        )
    if kind == "yarn":
        return _yarn(rope, theta, rotary_dim, original, max_position)
    raise unsupported("rope_scaling.rope_type", kind, "default, linear, dynamic, llama3 and yarn")


def assemble(
    hf: Mapping[str, Any],
    layers: Sequence[LayerSpec],
    *,
    unit_offset: bool = False,
    tied: bool = False,
    embed_scale: float | None = None,
    logit_softcap: float | None = None,
) -> DecoderConfig:
    """The decoder of a config, given its layers and the family's own values; `tied` is the family's default."""
    dtype = hf.get("dtype") or hf.get("torch_dtype") or "float32"
    if dtype not in DTYPES:
        raise unsupported("dtype", dtype, ", ".join(DTYPES))
    return DecoderConfig(
        model_type=str(hf["model_type"]),
        vocab_size=integer(hf, "vocab_size"),
        hidden_size=integer(hf, "hidden_size"),
        layers=tuple(layers),
        max_position=integer(hf, "max_position_embeddings"),
        norm_eps=layers[0].norms.eps,
        norm_unit_offset=unit_offset,
        tied_head=flag(hf, "tie_word_embeddings", tied),
        embed_scale=embed_scale,
        logit_softcap=logit_softcap,
        dtype=dtype,
        eos_token_ids=read_eos(hf),
    )


def _field(hf: Mapping[str, Any], field: str, default: Any) -> Any:
    value = hf.get(field)
    value = default if value is None else value
    if value is _REQUIRED:
        raise CheckpointError(f"config.json: {field} is missing")
    return value


def rope_parameters(hf: Mapping[str, Any]) -> Mapping[str, Any]:
    """The rope parameters of either spelling, empty if there are none."""
    field = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    rope = hf.get(field) or {}
    if not isinstance(rope, Mapping) or any(isinstance(value, Mapping) for value in rope.values()):
        raise unsupported(field, rope, "one flat set of rope parameters")
    return rope


def _yarn(rope: Mapping[str, Any], theta: float, rotary_dim: int, original: int, max_position: int) -> RopeSpec:
    """Source: YaRN (arXiv:2309.00071) sec. 3.4; the mscale pair is DeepSeek's."""
    factor = number(rope, "factor", max_position / original)
    weight, weight_all = optional_number(rope, "mscale"), optional_number(rope, "mscale_all_dim")
    attention_factor = mscale(factor)
    if weight and weight_all:
        attention_factor = mscale(factor, weight) / mscale(factor, weight_all)
    return RopeSpec(
        theta=theta,
        rotary_dim=rotary_dim,
        scaling="yarn",
        factor=factor,
        original_max_position=original,
        beta_fast=number(rope, "beta_fast", 32.0),
        beta_slow=number(rope, "beta_slow", 1.0),
        attention_factor=number(rope, "attention_factor", attention_factor),
        truncate=flag(rope, "truncate", True),
    )


def mscale(factor: float, weight: float = 1.0) -> float:
    """YaRN's correction of the scores for a context `factor` times as long; `weight` is DeepSeek's."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

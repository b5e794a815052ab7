"""From a checkpoint folder to a decoder that runs: each rank reads its own slices and nothing else."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from phalanx.errors import CheckpointError
from phalanx.models.checkpoint import Checkpoint
from phalanx.models.decoder import Decoder
from phalanx.models.hf_config import family, read_config, read_json, read_quantization, resolve_path
from phalanx.models.quantized import PlainTensor, plain
from phalanx.models.spec import DecoderConfig
from phalanx.models.weights import EVERY, Stacking, Target, split_layer, unknown
from phalanx.moe.group import ExpertGroup
from phalanx.moe.spec import CapacitySpec, MoeSpec
from phalanx.parallel.mesh import Mesh
from phalanx.parallel.parameter import Parameter

__all__ = ["fill", "load_model", "read_config", "resolve_path"]

OUTSIDE_LAYERS = ("embedding.weight", "norm.weight", "head.weight")


def load_model(
    path: str | Path,
    mesh: Mesh,
    *,
    device: torch.device,
    dtype: torch.dtype,
    layer_range: tuple[int, int],
    max_model_len: int,
    choose: Mapping[str, str] | None = None,
    experts: ExpertGroup | None = None,
    capacity: CapacitySpec | None = None,
) -> Decoder:
    """Build one rank's stage and fill it from a Hugging Face checkpoint.

    Args:
        path: the folder, or the name of an embedded model.
        mesh: of this rank.
        device: where the weights go.
        dtype: of weights and activations, whatever the file's is.
        layer_range: this stage's layers [start, stop).
        max_model_len: longest sequence, tokens.
        choose: kernel name -> implementation name.
        experts: this rank's place in the expert group of its stage; only the experts of its slots are read.
        capacity: limit of tokens per expert; None = dropless.

    Raises:
        CheckpointError: the checkpoint is damaged, incomplete, or not what its config says.
        ConfigError: the mesh does not fit the model.
    """
    folder = resolve_path(str(path))
    config = read_config(folder).limited(capacity)
    decoder = Decoder(
        config,
        mesh,
        device=device,
        dtype=dtype,
        layer_range=layer_range,
        max_model_len=max_model_len,
        choose=choose,
        experts=experts,
    )
    hf = read_json(folder / "config.json")
    with Checkpoint(folder) as checkpoint:
        fill(decoder, plain(checkpoint, read_quantization(hf)), family(hf))
    decoder.finalize()
    return decoder


def fill(decoder: Decoder, tensors: Iterable[PlainTensor], names: Any) -> None:
    """Fill every parameter of a stage; `names` is the family module whose `locate` places each tensor.

    Raises:
        CheckpointError: a tensor has no place or another shape, or a parameter is left unfilled.
    """
    parameters = decoder.parameters()
    for stored in tensors:
        if _is_extra(stored.key, decoder.config):
            continue
        target: Target | None = names.locate(stored.key)
        if target is None or _of_another_stage(target, decoder):
            continue
        if target.stacking is not None:
            _fill_experts(parameters, target, target.stacking, _num_experts(target, decoder.config), stored)
        elif target.name in parameters:
            _fill_one(parameters[target.name], target, stored)
        elif not _is_elsewhere(target, parameters, decoder.config):
            raise unknown(stored.key)
    missing = [f"{name} ({', '.join(value.missing)})" for name, value in parameters.items() if value.missing]
    if missing:
        rest = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise CheckpointError(f"the checkpoint holds no tensor for {'; '.join(missing[:5])}{rest}")


def _is_extra(key: str, config: DecoderConfig) -> bool:
    layer, _ = split_layer(key)
    return layer is not None and 0 <= layer - len(config.layers) < config.num_extra_layers


def _of_another_stage(target: Target, decoder: Decoder) -> bool:
    if target.layer is not None:
        start, stop = decoder.layer_range
        return target.layer < len(decoder.config.layers) and not start <= target.layer < stop
    return target.param in OUTSIDE_LAYERS and target.param not in decoder.parameters()


def _is_elsewhere(target: Target, parameters: Mapping[str, Parameter], config: DecoderConfig) -> bool:
    """Whether the target is a part of an expert that other ranks hold."""
    if target.expert is None or target.expert >= _num_experts(target, config):
        return False
    return f"layers.{target.layer}.mlp.experts.{target.expert}.down_proj.weight" not in parameters


def _num_experts(target: Target, config: DecoderConfig) -> int:
    """Of the target's layer; 0 if that has none, or does not exist."""
    for layer in config.layers[target.layer : target.layer + 1] if target.layer is not None else ():
        if isinstance(layer.mlp, MoeSpec):
            return layer.mlp.router.num_experts
    return 0


def _fill_one(parameter: Parameter, target: Target, stored: PlainTensor) -> None:
    shapes = _segment_shapes(parameter, target, stored)
    _check_shape(stored, (sum(shape[0] for shape in shapes), *shapes[0][1:]))
    base = 0
    for name, shape in zip(target.segments, shapes, strict=True):
        segment = parameter.segments[name]
        if segment.part.size and not parameter.fill(name, stored.read(segment.index(base))):
            raise CheckpointError(
                f"{stored.path}: tensor {stored.key!r} is tied to another one by config.json but has other values; "
                "set tie_word_embeddings to false"
            )
        base += shape[0]


def _fill_experts(
    parameters: Mapping[str, Parameter], target: Target, stacking: Stacking, num_experts: int, stored: PlainTensor
) -> None:
    """A tensor of all experts: of each one that this rank holds its own block is read, the others are not."""
    names = {target.name.replace(EVERY, str(expert)): expert for expert in range(num_experts)}
    held = {expert: parameters[name] for name, expert in names.items() if name in parameters}
    if not held:
        raise unknown(stored.key)
    for expert, parameter in held.items():
        shapes = _segment_shapes(parameter, target, stored)
        rows, columns = sum(shape[0] for shape in shapes), shapes[0][1:]
        inner = (*columns, rows) if stacking.transposed else (rows, *columns)
        _check_shape(stored, (num_experts, *inner))
        block = stored.read((slice(expert, expert + 1), *(slice(0, length) for length in inner)))[0]
        block = block.movedim(-1, 0) if stacking.transposed else block
        count = len(target.segments)
        split = [block[i::count] for i in range(count)] if stacking.interleaved else block.chunk(count)
        for name, part in zip(target.segments, split, strict=True):
            if not parameter.fill(name, part):
                raise CheckpointError(f"{stored.path}: expert {expert} of {stored.key!r} is stored twice, and differs")


def _segment_shapes(parameter: Parameter, target: Target, stored: PlainTensor) -> list[tuple[int, ...]]:
    if any(name not in parameter.segments for name in target.segments):
        raise unknown(stored.key)
    return [parameter.segments[name].shape for name in target.segments]


def _check_shape(stored: PlainTensor, expected: tuple[int, ...]) -> None:
    if stored.shape != expected:
        raise CheckpointError(
            f"{stored.path}: tensor {stored.key!r} has shape {list(stored.shape)}, config.json says {list(expected)}"
        )

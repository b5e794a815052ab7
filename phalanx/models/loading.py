"""From a checkpoint folder to a decoder that runs: each rank reads its own slices and nothing else."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from phalanx.errors import CheckpointError
from phalanx.models.checkpoint import Checkpoint, StoredTensor
from phalanx.models.decoder import Decoder
from phalanx.models.hf_config import family, read_config, read_json, resolve_path
from phalanx.models.weights import Target, unknown
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
) -> Decoder:
    """Build one rank's stage and fill it from a Hugging Face checkpoint.

    Args:
        path: the folder, or `tiny`.
        mesh: of this rank.
        device: where the weights go.
        dtype: of weights and activations, whatever the file's is.
        layer_range: this stage's layers [start, stop).
        max_model_len: longest sequence, tokens.
        choose: kernel name -> implementation name.

    Raises:
        CheckpointError: the checkpoint is damaged, incomplete, or not what its config says.
        ConfigError: the mesh does not fit the model.
    """
    folder = resolve_path(str(path))
    config = read_config(folder)
    decoder = Decoder(
        config,
        mesh,
        device=device,
        dtype=dtype,
        layer_range=layer_range,
        max_model_len=max_model_len,
        choose=choose,
    )
    with Checkpoint(folder) as checkpoint:
        fill(decoder, checkpoint, family(read_json(folder / "config.json")))
    decoder.finalize()
    return decoder


def fill(decoder: Decoder, checkpoint: Checkpoint, names: Any) -> None:
    """Fill every parameter of a stage; `names` is the family module whose `locate` places each tensor.

    Raises:
        CheckpointError: a tensor has no place or another shape, or a parameter is left unfilled.
    """
    parameters = decoder.parameters()
    for stored in checkpoint.tensors():
        target: Target | None = names.locate(stored.key)
        if target is None or _of_another_stage(target, decoder):
            continue
        if target.name not in parameters:
            raise unknown(stored.key)
        _fill_one(parameters[target.name], target, stored)
    missing = [f"{name} ({', '.join(value.missing)})" for name, value in parameters.items() if value.missing]
    if missing:
        rest = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise CheckpointError(f"the checkpoint holds no tensor for {'; '.join(missing[:5])}{rest}")


def _of_another_stage(target: Target, decoder: Decoder) -> bool:
    if target.layer is not None:
        start, stop = decoder.layer_range
        return target.layer < len(decoder.config.layers) and not start <= target.layer < stop
    return target.param in OUTSIDE_LAYERS and target.param not in decoder.parameters()


def _fill_one(parameter: Parameter, target: Target, stored: StoredTensor) -> None:
    absent = [name for name in target.segments if name not in parameter.segments]
    if absent:
        raise unknown(stored.key)
    shapes = [parameter.segments[name].shape for name in target.segments]
    expected = (sum(shape[0] for shape in shapes), *shapes[0][1:])
    if stored.shape != expected:
        raise CheckpointError(
            f"{stored.path}: tensor {stored.key!r} has shape {list(stored.shape)}, config.json says {list(expected)}"
        )
    base = 0
    for name, shape in zip(target.segments, shapes, strict=True):
        segment = parameter.segments[name]
        if segment.part.size and not parameter.fill(name, stored.read(segment.index(base))):
            raise CheckpointError(
                f"{stored.path}: tensor {stored.key!r} is tied to another one by config.json but has other values; "
                "set tie_word_embeddings to false"
            )
        base += shape[0]

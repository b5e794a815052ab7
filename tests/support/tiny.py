"""Tiny random checkpoints written by transformers, and its logits: the oracle of the model tests.

A tiny model as transformers initialises it proves little: norm weights and most biases are constant, so a loader that
forgets them still passes, and the two best logits of a position are almost equal. Every parameter is redrawn here.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phalanx import plugins
from phalanx.models.hf_config import FAMILY

VOCABULARY_STD = 0.3
VECTOR_STD = 0.3
GAIN = 1.5  # of the other matrices: their std is GAIN / sqrt(fan in), so that fp32 noise stays small


def family_names() -> tuple[str, ...]:
    """Every model family of the package; a new file appears here by itself."""
    return plugins.names("models", FAMILY)


def moe_family_names() -> tuple[str, ...]:
    """Those of them with mixture-of-experts layers."""
    modules = {name: plugins.load("models", name, FAMILY) for name in family_names()}
    return tuple(name for name, module in modules.items() if module.decoder_config(module.TINY).moe_layers)


def make_checkpoint(
    family_name: str, directory: Path, seed: int = 0, *, max_shard_size: str = "1GB", **config_overrides: Any
) -> Path:
    """Write a redrawn tiny checkpoint of a family; returns its folder. Same arguments, same bytes.

    Args:
        family_name: module name in `phalanx.models`.
        directory: an existing folder; the checkpoint becomes a folder inside it, named after the arguments.
        seed: of the parameters.
        max_shard_size: below the model's size, the checkpoint is sharded.
        config_overrides: fields of the family's `TINY` to change.
    """
    tag = hashlib.sha256(repr((seed, max_shard_size, sorted(config_overrides.items()))).encode()).hexdigest()[:8]
    folder = directory / f"{family_name}-{tag}"
    if not (folder / "config.json").is_file():
        hf_model(family_name, seed, **config_overrides).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def hf_model(family_name: str, seed: int = 0, **config_overrides: Any) -> Any:
    """A redrawn transformers model of a family, fp32, eager attention, in eval mode."""
    transformers = _transformers()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    fields = {**plugins.load("models", family_name, FAMILY).TINY, **config_overrides}
    config = transformers.AutoConfig.for_model(**fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 3)  # some vectors, for example sinks, start as random numbers
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    redraw(model, seed)
    return model.eval()


def load_hf(folder: Path) -> Any:
    """The transformers model of a checkpoint folder, fp32, eager attention."""
    transformers = _transformers()
    transformers.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).eval()


def _transformers() -> Any:
    """The library, with our references of families it has not."""
    import transformers

    from tests.support import pr_moe_reference

    pr_moe_reference.register()
    return transformers


@torch.no_grad()
def redraw(model: Any, seed: int) -> None:
    """Draw every parameter anew, in order of their names; vectors (norms, biases) around the constant they start as."""
    generator = torch.Generator().manual_seed(seed)
    # A scaled tied embedding would make every token predict itself.
    vocabulary_std = VOCABULARY_STD / getattr(model.get_input_embeddings(), "scalar_embed_scale", 1.0)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            parameter += VECTOR_STD * noise
        elif "embed" in name or "lm_head" in name:
            parameter.copy_(vocabulary_std * noise)
        else:
            parameter.copy_(GAIN / parameter.shape[-1] ** 0.5 * noise)
    for name, buffer in sorted(model.named_buffers()):
        if name.endswith("e_score_correction_bias"):  # starts as 0, and would then be no part of any choice
            buffer.copy_(VECTOR_STD * torch.randn(buffer.shape, generator=generator))


@torch.inference_mode()
def hf_logits(model: Any, token_ids: list[int]) -> Tensor:
    """(T, vocab) fp32 logits of every position."""
    logits: Tensor = model(torch.tensor([token_ids])).logits[0].float()
    return logits


def greedy(model: Any, prompt: list[int], num_tokens: int) -> tuple[list[int], float]:
    """`num_tokens` greedy tokens after a prompt (ties to the lowest id), and the smallest margin of their logits.

    A comparison of tokens means something only if the margin is far above the error of the logits (1e-5 or so).
    """
    ids, margin = list(prompt), float("inf")
    for _ in range(num_tokens):
        last = hf_logits(model, ids)[-1:]
        margin = min(margin, smallest_margin(last))
        ids.append(int(last.argmax()))
    return ids[len(prompt) :], margin


def smallest_margin(logits: Tensor) -> float:
    """Smallest distance between the best and the second logit of any row."""
    best = logits.topk(2, dim=-1).values
    return float((best[:, 0] - best[:, 1]).min())

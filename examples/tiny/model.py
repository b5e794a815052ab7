"""The two tiny models: a dense Qwen3, and a mixture of experts that starts from the dense one's weights."""

import copy
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from text import CHAT_TEMPLATE, END_OF_TEXT, IM_END, VOCAB_SIZE
from tokenizers import Tokenizer
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

DENSE_LAYERS_KEPT = (0, 1, 4, 5)
"""Layers of the dense model that the mixture of experts continues."""

# Heads, KV heads and layers divide by tensor 4 and pipeline 2.
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
    "initializer_range": 0.06,  # about 1 / sqrt(hidden_size); 0.02 is meant for wide models and starts slowly
    "bos_token_id": None,
}


def new_dense(tokenizer: Tokenizer) -> Qwen3ForCausalLM:
    """An untrained dense model."""
    return Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=6, **special_tokens(tokenizer), **SHAPE))


def new_moe(tokenizer: Tokenizer, dense: Qwen3ForCausalLM) -> Qwen3MoeForCausalLM:
    """A mixture of experts made of four layers of the dense model: each expert begins as an eighth of its layer's MLP.

    Experts e and e + 8 begin equal; their routers differ, so they part. After 90 steps the loss is 3.52 nats, with new
    experts 4.10. Source: "Sparse Upcycling", arXiv 2212.05055, which copies the whole MLP into every expert.
    """
    config = Qwen3MoeConfig(
        num_hidden_layers=len(DENSE_LAYERS_KEPT),
        num_experts=16,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        moe_intermediate_size=64,
        **special_tokens(tokenizer),
        **SHAPE,
    )
    model = Qwen3MoeForCausalLM(config)
    model.set_experts_implementation("grouped_mm")  # a step takes 0.31 s; "eager" 0.40 s, "batched_mm" 4.4 s
    model.model.embed_tokens.load_state_dict(dense.model.embed_tokens.state_dict())
    model.model.norm.load_state_dict(dense.model.norm.state_dict())
    for layer, number in zip(model.model.layers, DENSE_LAYERS_KEPT, strict=True):
        source = dense.model.layers[number]
        layer.load_state_dict(source.state_dict(), strict=False)  # all but the MLP, whose names differ
        layer.mlp.experts.load_state_dict(experts_of(source.mlp, config))
    return model


def experts_of(mlp: Qwen3MLP, config: Qwen3MoeConfig) -> dict[str, torch.Tensor]:
    """The parameters of a layer's experts, cut from a dense MLP and repeated until there are enough."""
    width = config.moe_intermediate_size
    rows = torch.cat([mlp.gate_proj.weight.unflatten(0, (-1, width)), mlp.up_proj.weight.unflatten(0, (-1, width))], 1)
    columns = mlp.down_proj.weight.unflatten(1, (-1, width)).transpose(0, 1)
    repeats = (config.num_experts // len(rows), 1, 1)
    return {"gate_up_proj": rows.repeat(repeats), "down_proj": columns.repeat(repeats)}


def special_tokens(tokenizer: Tokenizer) -> dict[str, Any]:
    """Ids of the tokens that end a chat turn and fill up a batch."""
    return {"eos_token_id": tokenizer.token_to_id(IM_END), "pad_token_id": tokenizer.token_to_id(END_OF_TEXT)}


def imbalance(router_logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """Load-balancing loss of one layer's `router_logits` [tokens, experts]: 1 when even, more when not.

    Source: Switch Transformer, arXiv 2101.03961, equation 4, for `top_k` choices. `transformers` adds up the layers
    before it multiplies, which lets one layer's excess hide another's.
    """
    probabilities = router_logits.float().softmax(-1)
    choices = probabilities.topk(top_k).indices
    load = torch.bincount(choices.flatten(), minlength=probabilities.shape[1]) / choices.numel()
    return probabilities.shape[1] * (load * probabilities.mean(0)).sum()


def loss_of(model: PreTrainedModel, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean next-token cross entropy in nats of `rows` [num_rows, length + 1], and mean imbalance of the MoE layers."""
    is_moe = isinstance(model, Qwen3MoeForCausalLM)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(input_ids=rows[:, :-1], use_cache=False, **({"output_router_logits": True} if is_moe else {}))
    cross_entropy = F.cross_entropy(output.logits.flatten(0, 1).float(), rows[:, 1:].flatten())
    if not is_moe:
        return cross_entropy, torch.zeros(())
    losses = [imbalance(logits, model.config.num_experts_per_tok) for logits in output.router_logits]
    return cross_entropy, torch.stack(losses).mean()


@torch.inference_mode()
def expert_load(model: Qwen3MoeForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    """Fraction of the choices that goes to each expert, [layers, experts], over token ids `rows` [num_rows, length]."""
    counts = []
    for chunk in rows.split(8):
        logits = torch.stack(model(input_ids=chunk, use_cache=False, output_router_logits=True).router_logits)
        choices = logits.topk(model.config.num_experts_per_tok).indices.flatten(1)
        counts.append(F.one_hot(choices, model.config.num_experts).sum(1))
    total = torch.stack(counts).sum(0)
    return total / total.sum(1, keepdim=True)


def write_checkpoint(model: PreTrainedModel, tokenizer: Tokenizer, out: Path) -> None:
    """Write `model`, which stays as it is, in bf16; each file is replaced whole: readers never see half of one."""
    out.mkdir(parents=True, exist_ok=True)
    special = special_tokens(tokenizer)
    generation = GenerationConfig(do_sample=False, **special)  # type: ignore[no-untyped-call]
    generation.eos_token_id = [special["eos_token_id"], special["pad_token_id"]]
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": IM_END,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": model.config.max_position_embeddings,
        "chat_template": CHAT_TEMPLATE,
    }
    rounded = copy.deepcopy(model).bfloat16()
    rounded.generation_config = generation
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        rounded.save_pretrained(folder)
        tokenizer.save(f"{folder}/tokenizer.json", pretty=False)
        Path(folder, "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
        for path in sorted(Path(folder).iterdir()):
            path.chmod(0o644)  # the weights come out readable by their owner only
            os.replace(path, out / path.name)

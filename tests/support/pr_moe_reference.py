"""PR-MoE in plain torch, written from the formulas: what `phalanx/models/pr_moe.py` is compared with.

transformers has no such class. This one is its Qwen3 with other feed-forward layers, so that attention, the cache and
`generate` stay those of transformers; experts run one by one over all tokens, with weight 0 where they were not chosen.
"""

from typing import Any

import torch
import transformers
from torch import Tensor, nn


class PrMoeConfig(transformers.Qwen3Config):  # type: ignore[misc]
    """Qwen3's and the fields of experts; `num_experts` is an int or one per layer."""

    model_type = "pr_moe"
    num_experts: Any = 0
    num_experts_per_tok: int = 1
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False
    residual_mlp: bool = False
    task_experts: Any = None
    task_weights: Any = None


class Mlp(nn.Module):
    """`down(silu(gate(x)) * up(x))`."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        y: Tensor = self.down_proj(gate * torch.sigmoid(gate) * self.up_proj(x))
        return y


class PrMoeBlock(nn.Module):
    """A feed-forward layer with experts, the `index`-th of them; with tasks, `task` is the one of all its input."""

    def __init__(self, config: Any, num_experts: int, index: int) -> None:
        super().__init__()
        self.top_k, self.normalise = config.num_experts_per_tok, config.norm_topk_prob
        self.task, self.by_task = 0, None
        if config.task_experts is None:
            self.gate = nn.Linear(config.hidden_size, num_experts, bias=False)
        else:
            self.by_task = []
            for task, table in enumerate(config.task_experts):
                equal = [1 / self.top_k] * self.top_k
                weights = equal if config.task_weights is None else config.task_weights[task][index]
                self.by_task.append(dict(zip(table[index], weights, strict=True)))
        self.experts = nn.ModuleList(Mlp(config.hidden_size, config.moe_intermediate_size) for _ in range(num_experts))
        if config.residual_mlp:
            self.residual_mlp = Mlp(config.hidden_size, config.intermediate_size)
            self.coefficient = nn.Linear(config.hidden_size, 2, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        weights = self._weights(x)
        y = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            y = y + weights[..., index : index + 1] * expert(x)
        if hasattr(self, "coefficient"):
            c = torch.exp(self.coefficient(x))
            y = (c[..., :1] * y + c[..., 1:] * self.residual_mlp(x)) / c.sum(-1, keepdim=True)
        return y

    def _weights(self, x: Tensor) -> Tensor:
        """(..., experts), 0 for those not chosen."""
        if self.by_task is not None:
            chosen = [self.by_task[self.task].get(expert, 0.0) for expert in range(len(self.experts))]
            return torch.tensor(chosen, dtype=x.dtype).expand(*x.shape[:-1], -1)
        scores = torch.exp(self.gate(x).double())
        probabilities = scores / scores.sum(-1, keepdim=True)
        least = probabilities.sort(dim=-1, descending=True).values[..., self.top_k - 1 : self.top_k]
        weights = torch.where(probabilities >= least, probabilities, 0.0)
        if self.normalise:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights.to(x.dtype)


class PrMoeForCausalLM(transformers.Qwen3ForCausalLM):  # type: ignore[misc]
    """Qwen3 with these layers."""

    config_class = PrMoeConfig

    def __init__(self, config: PrMoeConfig) -> None:
        super().__init__(config)
        counts = config.num_experts
        counts = counts if isinstance(counts, list) else [counts] * config.num_hidden_layers
        for number, count in enumerate(counts):
            if count:
                index = sum(1 for before in counts[:number] if before)
                self.model.layers[number].mlp = PrMoeBlock(config, count, index)
        self.post_init()

    def use_task(self, task: int) -> None:
        """Everything from now on is of this task."""
        for layer in self.model.layers:
            layer.mlp.task = task


def register() -> None:
    """Make transformers' Auto classes know it; again is no harm."""
    transformers.AutoConfig.register("pr_moe", PrMoeConfig, exist_ok=True)
    transformers.AutoModelForCausalLM.register(PrMoeConfig, PrMoeForCausalLM, exist_ok=True)

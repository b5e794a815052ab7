"""Task-level routing: all tokens of a task visit the same experts, so a worker loads only its tasks' experts.

Shapes: T tokens, N tasks, L layers, K experts per token.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from phalanx.errors import ConfigError, InvalidRequestError
from phalanx.moe.routers.topk import Routing


class TaskRouter:
    """Experts per task and layer, from a table instead of a gate.

    Args:
        ids_NLK: (N, L, K) logical experts, any integer dtype, distinct within a task and layer, on the rank's device.
        num_experts: logical experts per layer.
        weights_NLK: (N, L, K) of the experts; default: equal, 1 / K.

    Raises:
        ConfigError: a table that is not one.

    Source: task-level mixture of experts, Kudugunta 2021 (arXiv:2110.03742).
    """

    def __init__(self, ids_NLK: Tensor, num_experts: int, weights_NLK: Tensor | None = None) -> None:
        if ids_NLK.ndim != 3 or ids_NLK.is_floating_point() or 0 in ids_NLK.shape:
            raise ConfigError(
                f"task router: the table has shape {tuple(ids_NLK.shape)} and {ids_NLK.dtype}; "
                "it must be integers of (tasks, layers, top_k), none of them 0"
            )
        if weights_NLK is None:
            weights_NLK = torch.full(ids_NLK.shape, 1 / ids_NLK.shape[2], device=ids_NLK.device)
        if weights_NLK.shape != ids_NLK.shape:
            raise ConfigError(
                f"task router: weights have shape {tuple(weights_NLK.shape)} and the table {tuple(ids_NLK.shape)}; "
                "give one weight per entry"
            )
        if int(ids_NLK.min()) < 0 or int(ids_NLK.max()) >= num_experts:
            raise ConfigError(
                f"task router: the table names experts {int(ids_NLK.min())} to {int(ids_NLK.max())}; "
                f"use 0 to {num_experts - 1}"
            )
        sorted_NLK = ids_NLK.sort(dim=-1).values
        if bool((sorted_NLK[..., 1:] == sorted_NLK[..., :-1]).any()):
            raise ConfigError("task router: a task names the same expert twice in one layer; give distinct experts")
        self._ids_NLK = ids_NLK.int()
        self._weights_NLK = weights_NLK.float()
        self.num_tasks, self.num_layers, self.top_k = ids_NLK.shape

    def route(self, task_T: Tensor, layer: int) -> Routing:
        """The experts of every token's task in a layer.

        Args:
            task_T: (T) int64 task of each token, which `load` has checked at admission; -1 = none: ids -1, weight 0.
            layer: index among the MoE layers.
        """
        has_task_T1 = (task_T >= 0)[:, None]
        task_T = task_T.clamp(min=0)
        ids_TK = self._ids_NLK[:, layer][task_T].masked_fill(~has_task_T1, -1)
        return Routing(ids_TK, self._weights_NLK[:, layer][task_T].masked_fill(~has_task_T1, 0.0))

    def load(self, tasks: Iterable[int]) -> tuple[tuple[int, ...], ...]:
        """Per layer, the experts that these tasks need, ascending: what a worker serving only them must load.

        Raises:
            InvalidRequestError: a task the table has not.
        """
        wanted = sorted(set(tasks))
        for task in wanted:
            if not 0 <= task < self.num_tasks:
                raise InvalidRequestError(f"task ({task}) is unknown; use 0 to {self.num_tasks - 1}")
        experts = self._ids_NLK[wanted].transpose(0, 1).reshape(self.num_layers, -1).tolist()
        return tuple(tuple(sorted(set(row))) for row in experts)

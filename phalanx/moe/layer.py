"""The routed experts of one layer: route -> choose replicas -> dispatch -> experts -> combine."""

from collections.abc import Callable

import torch
from torch import Tensor

from phalanx.kernels.experts import Experts
from phalanx.moe.capacity import assign
from phalanx.moe.group import ALONE, EpStep, ExpertGroup
from phalanx.moe.replicas import select
from phalanx.moe.routers.task import TaskRouter
from phalanx.moe.routers.topk import Routing, route
from phalanx.moe.spec import MoeSpec
from phalanx.parallel.group import Group

# Shape suffixes: T tokens of the dp rank, t this rank's share of them, D hidden, E experts, K choices.


class MoeLayer:
    """Maps (T, D) to (T, D), `x` and the result whole on every tensor rank, the work shared by them.

    After attention every tensor rank holds the same tokens; dispatching them all would multiply the traffic, so rank i
    takes rows `[i * ceil(T / tp), ...)` and the results are gathered at the end.

    Args:
        spec: of the block; its shared expert is the caller's.
        layer: index among the MoE layers of the stage.
        gate: (t, D) -> (t, E) router logits; or the table of experts by task, of this layer alone.
        correction_bias: [E] fp32, or None.
        experts: this rank's slots, filled by the caller.
        group: the expert group.
        tp: the tensor axis.
    """

    def __init__(
        self,
        spec: MoeSpec,
        layer: int,
        gate: Callable[[Tensor], Tensor] | TaskRouter,
        correction_bias: Tensor | None,
        experts: Experts,
        group: ExpertGroup,
        tp: Group,
    ) -> None:
        self._spec, self._layer, self._gate, self._bias = spec, layer, gate, correction_bias
        self._experts, self._group, self._tp = experts, group, tp
        self.num_dropped = torch.zeros((), dtype=torch.int64, device=group.device)

    def __call__(self, x_TD: Tensor, step: EpStep, shared: Callable[[], None] | None = None) -> Tensor:
        """Run the routed experts; `shared` is called once while tokens travel.

        Every rank of the group must call it for the same step, with no rows too.
        """
        share = -(-x_TD.shape[0] // self._tp.size)
        rows = slice(self._tp.rank * share, (self._tp.rank + 1) * share)
        x_tD = x_TD[rows]
        routing = self._route(x_tD, step, rows)
        group = self._group
        key_t = None if step.key_T is None else step.key_T[rows]
        if step.kind == ALONE:
            slots_tK = routing.topk_ids_TK % group.slots_of(self._layer)  # nothing is dropped without scopes
        else:
            slots_tK = select(routing.topk_ids_TK, group.tables[self._layer], group.rank, key_t)
        dispatcher = group.dispatcher(step.kind, self._layer, self._spec.router.top_k, x_TD.shape[1], x_TD.dtype)
        got = group.run(dispatcher.dispatch(x_tD, slots_tK, routing.topk_weights_TK, step.padded_T), shared)
        if group.exact:
            y = self._experts.forward_pairs(got.x_RD, got.slots_RK)
        else:
            y = self._experts.forward(got.x_RD, got.slots_RK, got.weights_RK)
        out_tD = group.run(dispatcher.combine(y, got.handle))
        return self._gather(out_tD, x_TD.shape[0], share)

    def _route(self, x_tD: Tensor, step: EpStep, rows: slice) -> Routing:
        spec, logits_tE = self._spec, None
        if isinstance(self._gate, TaskRouter):
            task_t = x_tD.new_zeros(len(x_tD), dtype=torch.int64) if step.task_T is None else step.task_T[rows]
            routing = self._gate.route(task_t, 0)
        else:
            logits_tE = self._gate(x_tD)
            routing = route(
                logits_tE, spec.router, correction_bias_E=self._bias, model_dtype=x_tD.dtype, op=self._group.route_op
            )
        if step.kind != ALONE:  # a warm-up's tokens are nobody's
            self._group.load.record(self._layer, routing.topk_ids_TK)
        if spec.capacity is not None and step.scope_T is not None:
            surest_t = None
            if spec.capacity.priority == "bpr" and logits_tE is not None:
                surest_t = logits_tE.float().softmax(-1).amax(-1)
            routing, dropped = assign(
                routing,
                spec.capacity,
                step.scope_T[rows],
                spec.router.num_experts,
                importance_T=surest_t,
                scores_TE=logits_tE,
            )
            self.num_dropped += dropped
        return routing

    def _gather(self, out_tD: Tensor, num_rows: int, share: int) -> Tensor:
        if self._tp.size == 1:
            return out_tD
        padded = torch.nn.functional.pad(out_tD, (0, 0, 0, share - out_tD.shape[0]))
        return self._tp.all_gather(padded, dim=0)[:num_rows]

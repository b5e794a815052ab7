"""A mixture of experts as the feed-forward of a layer: routed experts spread over a group of ranks, and a shared one.

The way of a layer's input:

    gate -> route -> dispatch -> routed experts -> combine -> (+)      `phalanx.moe.layer.MoeLayer`
                        shared expert, meanwhile ------------->        `Mlp`, sharded over the tensor axis
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from phalanx.errors import ConfigError
from phalanx.kernels.experts import Experts, ExpertShape, build
from phalanx.models.batch import ForwardBatch
from phalanx.models.build import BuildContext
from phalanx.models.mlp import Mlp
from phalanx.models.spec import MlpSpec
from phalanx.moe.group import EpStep, ExpertGroup
from phalanx.moe.layer import MoeLayer
from phalanx.moe.placement.linear import linear
from phalanx.moe.residual import mix
from phalanx.moe.routers.task import TaskRouter
from phalanx.moe.spec import ExpertSpec, MoeSpec, SharedSpec, TaskSpec
from phalanx.parallel.linear import ColumnParallelLinear
from phalanx.parallel.mesh import Mesh
from phalanx.parallel.parameter import WHOLE, Parameter, replicated
from phalanx.parallel.partition import whole
from phalanx.parallel.topology import EpTopology


def alone(
    specs: Sequence[MoeSpec], mesh: Mesh, device: torch.device, choose: Mapping[str, str] | None = None
) -> ExpertGroup:
    """The expert group of a stage of one rank, which holds every expert of its layers; `choose` as for its kernels.

    Raises:
        ConfigError: the stage has several ranks.
    """
    num_ranks = mesh.shape.dp * mesh.shape.tp
    if num_ranks > 1:
        raise ConfigError(f"experts are spread over the {num_ranks} ranks of a stage; give their expert group")
    num_experts = [spec.router.num_experts for spec in specs]
    placement = linear(num_experts, 1, max(num_experts))
    topology = EpTopology.uniform(1, 1)
    return ExpertGroup(
        topology, 0, placement.layers, placement.slots_per_rank, exact=True, device=device, choose=choose
    )


class MoeBlock:
    """Routed experts of this rank's slots, the router, and the shared expert; the same face as `Mlp`.

    Args:
        spec: of this layer.
        layer: index among the mixture-of-experts layers of the stage.
        context: what all parts of a decoder share, with the expert group.
    """

    def __init__(self, spec: MoeSpec, layer: int, context: BuildContext) -> None:
        assert context.experts is not None, "a model with experts has an expert group"
        router, hidden_size = spec.router, context.hidden_size
        self._spec, self._index, self._context, self._group = spec, layer, context, context.experts
        self._gate_dtype = torch.float32 if router.gate_dtype == "float32" else context.linear["dtype"]
        self._gate: ColumnParallelLinear | None = None
        if spec.tasks is None:
            self._gate = self._replicated_linear(router.num_experts, router.gate_bias, self._gate_dtype)
        self._correction_bias: Parameter | None = None
        if router.use_bias and spec.tasks is None:
            self._correction_bias = replicated((router.num_experts,), dtype=torch.float32, device=context.device)
        # Plain weights by logical expert; `finalize` packs them into slots.
        self._plain = {expert: self._expert_parameters(hidden_size) for expert in self._group.experts_of(layer)}
        self._shared: Mlp | None = None
        self._shared_gate: ColumnParallelLinear | None = None
        self._coefficients: ColumnParallelLinear | None = None
        if spec.shared is not None:
            self._shared = Mlp(_shared_mlp(spec.shared, spec.experts), context)
            if spec.shared.gated:
                self._shared_gate = self._replicated_linear(1)
        if spec.residual:
            self._coefficients = self._replicated_linear(2, bias=True)
        self._experts: Experts | None = None
        self._layer: MoeLayer | None = None

    @property
    def experts(self) -> Experts:
        """This rank's slots; only after `finalize`."""
        assert self._experts is not None, "finalize() first"
        return self._experts

    def take_num_dropped(self) -> Tensor:
        """Choices dropped by a capacity limit since the last call, a 0-dim int64 tensor on the device."""
        assert self._layer is not None, "finalize() first"
        counted = self._layer.num_dropped.clone()
        self._layer.num_dropped.zero_()
        return counted

    def parameters(self) -> dict[str, Parameter]:
        """What the checkpoint must fill, experts by their logical number."""
        modules = {
            "gate": self._gate,
            "shared": self._shared,
            "shared_gate": self._shared_gate,
            "coefficients": self._coefficients,
        }
        parameters = {
            f"{module}.{name}": parameter
            for module, part in modules.items()
            if part is not None
            for name, parameter in part.parameters().items()
        }
        if self._correction_bias is not None:
            parameters["correction_bias"] = self._correction_bias
        for expert, plain in self._plain.items():
            parameters |= {f"experts.{expert}.{name}": parameter for name, parameter in plain.items()}
        return parameters

    def finalize(self) -> None:
        """Pack the weights and drop the plain ones, slot by slot; call once, after loading."""
        if self._layer is not None:
            return
        for part in (self._gate, self._shared, self._shared_gate, self._coefficients):
            if part is not None:
                part.finalize()
        self._experts = self._pack_experts()
        bias = self._correction_bias.tensor if self._correction_bias else None
        gate = self._router_logits if self._spec.tasks is None else self._task_router(self._spec.tasks)
        self._layer = MoeLayer(self._spec, self._index, gate, bias, self._experts, self._group, self._context.mesh.tp)

    def __call__(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """Map (T, hidden) to (T, hidden); every rank of the expert group must call it, with T = 0 too."""
        assert self._layer is not None, "finalize() first"
        step = batch.ep
        if step is None:
            if self._group.topology.num_ranks > 1:
                raise ConfigError("a step over several expert ranks needs ForwardBatch.ep; the engine must fill it")
            step = EpStep("local", batch.num_tokens)
        if self._shared is None:
            return self._layer(x, step)
        shared: list[Tensor] = []
        routed = self._layer(x, step, lambda: shared.append(self._shared_output(x)))
        if self._coefficients is not None:
            return mix(routed, shared[0], self._coefficients(x))
        return routed + shared[0]

    def _router_logits(self, x: Tensor) -> Tensor:
        assert self._gate is not None, "tokens choose their experts"
        return self._gate(x.to(self._gate_dtype))

    def _task_router(self, tasks: TaskSpec) -> TaskRouter:
        ids_NK = torch.tensor(tasks.experts, device=self._context.device)
        weights_NK = None if tasks.weights is None else torch.tensor(tasks.weights, device=self._context.device)
        num_experts = self._spec.router.num_experts
        return TaskRouter(ids_NK[:, None], num_experts, None if weights_NK is None else weights_NK[:, None])

    def _shared_output(self, x: Tensor) -> Tensor:
        assert self._shared is not None
        y = self._shared(x)
        if self._shared_gate is None:
            return y
        # fp32 sigmoid of torch has other bits where a row falls behind the last whole vector of the batch.
        return y * torch.sigmoid(self._shared_gate(x).double()).to(y.dtype)

    def _pack_experts(self) -> Experts:
        spec, context = self._spec.experts, self._context
        shape = ExpertShape(
            num_slots=self._group.slots_of(self._index),
            hidden_size=context.hidden_size,
            intermediate_size=spec.intermediate_size,
            activation=spec.activation,
            bias=spec.bias,
            alpha=spec.alpha,
            limit=spec.limit,
        )
        experts = build(shape, **context.linear, batch_invariant=self._group.exact)
        for slot, expert in enumerate(self._group.experts_of(self._index)):
            plain = {name: parameter.tensor for name, parameter in self._plain.pop(expert).items()}
            experts.load(
                slot,
                plain["gate_up_proj.weight"],
                plain["down_proj.weight"],
                plain.get("gate_up_proj.bias"),
                plain.get("down_proj.bias"),
            )
        return experts

    def _expert_parameters(self, hidden_size: int) -> dict[str, Parameter]:
        """An expert is never sharded: one rank holds all of it, as two linear layers stored whole."""
        spec, options = self._spec.experts, self._context.linear
        inner, bias = whole(spec.intermediate_size), spec.bias
        gate_up = ColumnParallelLinear(hidden_size, {"gate": inner, "up": inner}, bias=bias, **options)
        down = ColumnParallelLinear(inner.total, {WHOLE: whole(hidden_size)}, bias=bias, **options)
        parameters = {f"gate_up_proj.{name}": parameter for name, parameter in gate_up.parameters().items()}
        return parameters | {f"down_proj.{name}": parameter for name, parameter in down.parameters().items()}

    def _replicated_linear(
        self, out_features: int, bias: bool = False, dtype: torch.dtype | None = None
    ) -> ColumnParallelLinear:
        options = self._context.linear
        return ColumnParallelLinear(
            self._context.hidden_size,
            {WHOLE: whole(out_features)},
            bias=bias,
            dtype=dtype or options["dtype"],
            device=options["device"],
            choose=options["choose"],
        )


def _shared_mlp(spec: SharedSpec, experts: ExpertSpec) -> MlpSpec:
    if experts.activation == "swiglu_clamped":
        raise ConfigError("a shared expert beside experts with a clamped activation is not supported")
    return MlpSpec(intermediate_size=spec.intermediate_size, activation=experts.activation)

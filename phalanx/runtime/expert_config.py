"""How a replica runs its experts: resolved from the `moe` section, nothing in it is "auto" but the dispatcher."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from phalanx.errors import ConfigError
from phalanx.models.spec import DecoderConfig
from phalanx.moe.placement.types import slots_of
from phalanx.moe.spec import CapacitySpec, MoeSpec
from phalanx.parallel.costmodel import ExpertTraffic
from phalanx.parallel.mesh import MeshShape

STAGING_ROWS = 4
"""Experts that may be on their way to a rank at once; memory for them is part of the plan."""

DISPATCHERS = ("auto", "local", "allgather", "flat", "two_hop")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertConfig:
    """The expert groups of a replica.

    Attributes:
        dispatch: "auto" = the engine chooses per step; else a file of `moe/dispatch`.
        exact: bits of the result depend neither on the placement nor on the dispatcher.
        num_experts: of each MoE layer of the model, in order.
        stage_of: pipeline stage of each MoE layer.
        row_bytes: rough size of one expert's weights, for plans.
        slots_per_rank: physical slots s of a rank, whatever the size of the group; see `slots_of`.
        node_size: ranks that count as one node; 0 = Ray's nodes.
        staging_rows: experts that may be on their way to a rank at once.
        rebalance_interval: steps between looks at the load; 0 = never.
        max_moved: share of the slots that one rebalancing may move.
        on_rank_loss: a lost rank ends the replica, or the group goes on without it.
        capacity: a limit of tokens per expert; None = dropless.
    """

    dispatch: str
    exact: bool
    num_experts: tuple[int, ...]
    stage_of: tuple[int, ...]
    row_bytes: int
    slots_per_rank: int
    node_size: int = 0
    staging_rows: int = STAGING_ROWS
    rebalance_interval: int = 3000
    max_moved: float = 0.1
    on_rank_loss: Literal["restart", "shrink"] = "restart"
    capacity: CapacitySpec | None = None

    @property
    def min_replicas(self) -> int:
        """Copies every expert should have: with a second one, the group can go on without any one rank."""
        return 2 if self.on_rank_loss == "shrink" else 1

    def slots_of(self, layer: int) -> int:
        """Physical slots of a rank in a MoE layer, counted over the MoE layers of the model."""
        return slots_of(self.num_experts[layer], self.slots_per_rank)

    def layers_of(self, stage: int) -> tuple[int, ...]:
        """MoE layers of a stage, counted over the MoE layers of the model."""
        return tuple(layer for layer, where in enumerate(self.stage_of) if where == stage)

    def node_names(self, names: Sequence[str]) -> list[str]:
        """Nodes of an expert group as the dispatchers see them, from those its ranks run on."""
        return [f"group {rank // self.node_size}" for rank in range(len(names))] if self.node_size else list(names)


def moe_specs(model: DecoderConfig) -> list[MoeSpec]:
    """Of the model's MoE layers, in order."""
    return [layer.mlp for layer in model.layers if isinstance(layer.mlp, MoeSpec)]


def expert_traffic(model: DecoderConfig, itemsize: int, *, exact: bool) -> ExpertTraffic:
    """What the tokens of the MoE layer with the most experts make travel; the others are alike."""
    router = max((spec.router for spec in moe_specs(model)), key=lambda router: router.num_experts)
    return ExpertTraffic.of(model.hidden_size, itemsize, router.num_experts, router.top_k, exact=exact)


def slots_per_rank(model: DecoderConfig, group_size: int, redundant_experts: int) -> int:
    """Physical slots of a rank so that a group of `group_size` ranks holds all experts and the redundant ones.

    A layer with fewer experts than that has one slot for each on every rank.

    Raises:
        ConfigError: a rank would have to hold an expert twice.
    """
    most = max(spec.router.num_experts for spec in moe_specs(model))
    slots = max(1, -(-(most + redundant_experts) // group_size))
    if slots > most:
        raise ConfigError(
            f"moe.redundant_experts ({redundant_experts}): {slots} slots per rank on {group_size} ranks, but a layer "
            f"has only {most} experts and no rank holds one twice; use {(group_size - 1) * most} or less"
        )
    return slots


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertOptions:
    """The `moe` section as a user writes it; keys and defaults are those of the cluster file, `node_size` 0 = auto."""

    dispatch: str = "auto"
    exact: bool = False
    redundant_experts: int = 0
    node_size: int = 0
    on_rank_loss: Literal["restart", "shrink"] = "restart"
    rebalance_interval: int = 3000
    max_moved: float = 0.1
    capacity: CapacitySpec | None = None


def resolve_experts(
    model: DecoderConfig, shape: MeshShape, stages: Sequence[tuple[int, int]], itemsize: int, options: ExpertOptions
) -> ExpertConfig | None:
    """Decide how the experts run; None for a dense model.

    Args:
        model: of the checkpoint.
        shape: of the mesh.
        stages: half-open layer range per stage.
        itemsize: bytes of a weight.
        options: what the user wants.

    Raises:
        ConfigError: the options do not go with the model or the mesh.
    """
    if options.dispatch not in DISPATCHERS:
        raise ConfigError(f"moe.dispatch ({options.dispatch!r}) is unknown; use one of {', '.join(DISPATCHERS)}")
    specs = moe_specs(model)
    if not specs:
        if options != ExpertOptions():
            raise ConfigError(f"moe: a {model.model_type} checkpoint has no experts; leave the section out")
        return None
    group_size = shape.dp * shape.tp
    if options.dispatch == "local" and group_size > 1:
        raise ConfigError(f"moe.dispatch local needs an expert group of one rank, not {group_size}; use auto")
    if options.on_rank_loss == "shrink" and (shape.tp > 1 or shape.pp > 1):
        raise ConfigError(
            f"moe.on_rank_loss shrink needs tensor 1 and pipeline 1, not {shape.tp} and {shape.pp}; use restart"
        )
    if model.num_tasks and options.capacity is not None and options.capacity.overflow == "next":
        raise ConfigError(
            f"moe.capacity.overflow next needs the scores of a router, but {model.model_type} chooses experts by task; "
            "use drop"
        )
    layers = [index for index, layer in enumerate(model.layers) if isinstance(layer.mlp, MoeSpec)]
    return ExpertConfig(
        dispatch=options.dispatch,
        exact=options.exact,
        num_experts=tuple(spec.router.num_experts for spec in specs),
        stage_of=tuple(
            next(stage for stage, (start, stop) in enumerate(stages) if start <= layer < stop) for layer in layers
        ),
        row_bytes=max(3 * model.hidden_size * spec.experts.intermediate_size for spec in specs) * itemsize,
        slots_per_rank=slots_per_rank(model, group_size, options.redundant_experts),
        node_size=options.node_size,
        rebalance_interval=options.rebalance_interval,
        max_moved=options.max_moved,
        on_rank_loss=options.on_rank_loss,
        capacity=options.capacity,
    )

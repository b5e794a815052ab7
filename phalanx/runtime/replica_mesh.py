"""The ranks of a replica as they come and go: units, generations of the expert groups, scaling. Called by the engine.

A unit is the pp x tp ranks of one dp rank. A dense replica is a mesh that never changes.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from phalanx.errors import ConfigError, ReplicaLostError
from phalanx.moe.placement.types import LayerPlacement
from phalanx.moe.resize import add_ranks, drop_ranks, shrink_target
from phalanx.parallel.costmodel import ExpertTraffic, costs_from
from phalanx.parallel.mesh import Coordinate
from phalanx.parallel.topology import EpTopology
from phalanx.runtime.dispatch_policy import DispatchPolicy
from phalanx.runtime.engine_config import EngineConfig
from phalanx.runtime.executor.executor import Came, Event, Executor, Lost
from phalanx.runtime.expert_config import ExpertConfig, moe_specs
from phalanx.runtime.expert_planner import ExpertPlanner
from phalanx.runtime.memory import ITEMSIZE
from phalanx.runtime.plan import Discard, Enter, ExpertLoad, MovesDone, Prepare, Prepared, Ready, StepPlan
from phalanx.runtime.rank_spec import RankSpec
from phalanx.runtime.scaling import Build, Commit, Effect, Evacuate, Fail, Grow, ScaleGoal, ScaleOp, Undo, next_units


class Rearrange(NamedTuple):
    """What a commit means for the scheduler: the old dp rank of each new one, None = a new one."""

    keep: tuple[int | None, ...]
    reset: bool


class ReplicaMesh:
    """Units, expert planner and the scaling operation under way.

    Args:
        config: of the replica.
        executor: its ranks, up already.
        store: address of the rendezvous store, for ranks that come later.
        interface: network interface of collectives.
        rearrange: changes the scheduler's domains; called when no step is in flight. Returns (next step, hash).
    """

    def __init__(
        self,
        config: EngineConfig,
        executor: Executor,
        store: str,
        interface: str,
        rearrange: Callable[[Rearrange], tuple[int, int]],
    ) -> None:
        self.config, self.executor = config, executor
        self._store, self._interface, self._rearrange = store, interface, rearrange
        shape = config.shape
        self.generation = 0
        self.units = tuple(range(shape.dp))
        self.op: ScaleOp | None = None
        self.planner: ExpertPlanner | None = None
        self._ranks_of = {
            unit: tuple(shape.rank(pp, unit, tp) for pp in range(shape.pp) for tp in range(shape.tp))
            for unit in self.units
        }
        self._next_unit, self._next_rank, self._next_generation = shape.dp, shape.world_size, 1
        self._joining: list[tuple[int, ...]] = []
        if config.experts is not None:
            topologies = self._topologies(self.units)
            fabric = next((ready.fabric for ready in executor.ready.values() if ready.fabric), [])
            costs = costs_from(fabric, self._traffic(config.experts)) if fabric else None
            policy = DispatchPolicy(config.experts.dispatch, topologies, costs, shape.tp)
            self.planner = ExpertPlanner(config.experts, topologies, config.initial_placements(), policy)
            if config.experts.on_rank_loss == "shrink":
                executor.spare |= executor.members

    @property
    def holds(self) -> bool:
        """No step may be planned now."""
        return self.op is not None and self.op.holds

    @property
    def is_busy(self) -> bool:
        """Steps are wanted although no request runs: rows migrate with them. The rest of an operation needs none."""
        return self.planner is not None and self.planner.is_migrating

    @property
    def seats(self) -> dict[int, Coordinate]:
        """Place of every member in the mesh, in dp order; it changes with the generation."""
        pp, tp = self.config.shape.pp, self.config.shape.tp
        places = [(stage, index) for stage in range(pp) for index in range(tp)]
        return {
            rank: Coordinate(pp=stage, dp=dp_rank, tp=index)
            for dp_rank, unit in enumerate(self.units)
            for rank, (stage, index) in zip(self._ranks_of[unit], places, strict=True)
        }

    def stamp(self, plan: StepPlan) -> StepPlan:
        """Add generation and expert fields to a plan."""
        if self.planner is None:
            return plan
        tokens = [sum(domain.rows[1::3]) for domain in plan.domains]
        return msgspec.structs.replace(plan, generation=self.generation, experts=self.planner.step(tokens))

    def scale(self, op_id: str, target: int, now: float) -> ScaleOp:
        """Begin an operation, or find it: the same id is the same operation.

        Raises:
            ConfigError: another one is running, or the target cannot be; with the numbers.
        """
        if self.op is not None and self.op.goal.op_id == op_id:
            return self.op
        if self.op is not None and not self.op.is_over:
            raise ConfigError(f"scale operation {self.op.goal.op_id!r} is running; wait for it, then try again")
        experts = self.check_target(target)
        units = next_units(self.units, target, self._next_unit)
        for unit in units:
            if unit not in self._ranks_of:
                size = self.config.shape.pp * self.config.shape.tp
                self._ranks_of[unit] = tuple(range(self._next_rank, self._next_rank + size))
                self._next_rank += size
        self._next_unit = max(self._next_unit, max(units) + 1)
        assert experts is not None
        return self._begin(op_id, units, now, is_repair=False)

    def abort(self, op_id: str, reason: str, now: float) -> None:
        """Take an operation back, if it is the one under way and has not been committed."""
        if self.op is not None and self.op.goal.op_id == op_id and not self.op.is_over:
            self._carry_out(self.op, self.op.abort(reason), now)

    def check_target(self, target: int) -> ExpertPlanner:
        """Whether the group could have this size.

        Raises:
            ConfigError: it could not; with the numbers and the way out.
        """
        if self.planner is None:
            raise ConfigError("only replicas of a mixture-of-experts model can be scaled; raise replicas instead")
        experts, tp = self.planner.config, self.config.shape.tp
        slots, most = target * tp * experts.slots_per_rank, max(experts.num_experts)
        if target < 1 or slots < most:
            least = -(-most // (tp * experts.slots_per_rank))
            raise ConfigError(
                f"data {target}: {max(target, 0) * tp} ranks of {experts.slots_per_rank} expert slots hold "
                f"{max(slots, 0)} of {most} experts; use {least} or more"
            )
        return self.planner

    def tick(self, num_in_flight: int, now: float) -> None:
        """Let time and the steps in flight act on the operation under way."""
        op = self.op
        if op is None or op.is_over:
            return
        self._carry_out(op, op.tick(now), now)
        if op.is_evacuating and self.planner is not None and not self.planner.is_migrating:
            if self._is_evacuated(op):
                self._carry_out(op, op.evacuated(now), now)
            else:
                self._evacuate(op.goal)
        if op.phase == "COMMITTING" and (num_in_flight == 0 or op.goal.is_repair):
            self._carry_out(op, op.drained(), now)

    def handle(self, event: Event, now: float) -> None:
        """Take what a rank said that is no step result.

        Raises:
            ReplicaLostError: a member is lost that the replica needs.
        """
        op, planner = self.op, self.planner
        match event:
            case Came() if op is not None and not op.is_over:
                self.executor.brief(self._spec_of(op.goal, event.rank))
            case Came():
                self.executor.drop([event.rank])
            case Ready() if op is not None:
                self._carry_out(op, op.ready(event.rank, now), now)
            case Prepared() if op is not None:
                self._carry_out(op, op.prepared(event.rank, event.generation, event.error, now), now)
            case Lost():
                self._lost(event, now)
            case MovesDone() if planner is not None:
                planner.on_moves(event)
            case ExpertLoad() if planner is not None:
                planner.on_load(event)
            case _:
                return

    def _traffic(self, experts: ExpertConfig) -> ExpertTraffic:
        """Of a typical MoE layer."""
        router, model = moe_specs(self.config.model)[0].router, self.config.model
        itemsize = ITEMSIZE[self.config.dtype]
        return ExpertTraffic.of(model.hidden_size, itemsize, router.num_experts, router.top_k, exact=experts.exact)

    def _lost(self, event: Lost, now: float) -> None:
        op = self.op
        if op is not None and not op.is_over:
            self._carry_out(op, op.lost(event.rank, event.reason), now)
        if event.rank not in self.executor.members:
            return
        unit = next(unit for unit in self.units if event.rank in self._ranks_of[unit])
        survivors = tuple(other for other in self.units if other != unit)
        ranks = [self.units.index(other) for other in survivors]  # tensor 1: a unit is one rank of the group
        assert self.planner is not None, "only expert ranks are spare"
        lost = [
            index
            for index, layer in enumerate(self.planner.placements)
            if any(not self._live(layer, expert, ranks) for expert in range(layer.num_experts))
        ]
        if lost:
            raise ReplicaLostError(
                f"{event.reason}; experts of MoE layers {lost[:5]} have no other replica, so the replica restarts; "
                "moe.redundant_experts would have let it go on"
            )
        self.executor.members -= set(self._ranks_of[unit])
        self._begin(f"repair-{self._next_generation}", survivors, now, is_repair=True)

    def _live(self, layer: LayerPlacement, expert: int, ranks: Sequence[int]) -> bool:
        per_rank = layer.num_slots // len(self.units)
        return any(slot // per_rank in ranks for slot in layer.logical_to_physical[expert])

    def _begin(self, op_id: str, units: tuple[int, ...], now: float, *, is_repair: bool) -> ScaleOp:
        ranks_of = {unit: self._ranks_of[unit] for unit in (*self.units, *units)}
        goal = ScaleGoal(op_id, self._next_generation, self.units, units, ranks_of, is_repair)
        self._next_generation += 1
        self._joining = self._choose_joining(goal)
        self.op = op = ScaleOp(goal)
        self._carry_out(op, op.start(now), now)
        return op

    def _carry_out(self, op: ScaleOp, effects: list[Effect], now: float) -> None:
        for effect in effects:
            match effect:
                case Grow(ranks):
                    self.executor.grow(ranks)
                case Evacuate():
                    self._evacuate(op.goal)
                case Build():
                    self._build(op.goal)
                case Commit():
                    self._commit(op.goal)
                case Undo():
                    self._undo(op.goal)
                case Fail(reason):
                    raise ReplicaLostError(reason)

    def evacuation(self, units: Sequence[int]) -> dict[int, LayerPlacement]:
        """Where each MoE layer has to go so that these of the units hold every expert.

        Raises:
            ConfigError: they have too few slots.
        """
        assert self.planner is not None
        kept, per_rank = self._ranks_kept(self.units, units), self.planner.config.slots_per_rank
        topologies = [self.planner.topologies[stage] for stage in self.planner.config.stage_of]
        return {
            layer: shrink_target(placement, topologies[layer], kept, slots_per_rank=per_rank)
            for layer, placement in enumerate(self.planner.placements)
        }

    def _evacuate(self, goal: ScaleGoal) -> None:
        assert self.planner is not None
        self.planner.migrate(self.evacuation(goal.new))

    def _is_evacuated(self, op: ScaleOp) -> bool:
        assert self.planner is not None
        kept = set(self._kept_ranks(op.goal))
        per_rank = self.planner.config.slots_per_rank
        return all(
            any(slot // per_rank in kept for slot in slots)
            for layer in self.planner.placements
            for slots in layer.logical_to_physical
        )

    def _kept_ranks(self, goal: ScaleGoal) -> list[int]:
        """Ranks of the current expert groups that stay."""
        return self._ranks_kept(goal.old, goal.new)

    def _ranks_kept(self, old: Sequence[int], new: Sequence[int]) -> list[int]:
        tp = self.config.shape.tp
        return [index * tp + i for index, unit in enumerate(old) if unit in new for i in range(tp)]

    def _build(self, goal: ScaleGoal) -> None:
        for dp_rank, unit in enumerate(goal.new):
            for rank in goal.ranks_of[unit]:
                nodes = self._nodes(self._stage_of(rank, unit), goal.new)
                self.executor.send(rank, Prepare(goal.generation, dp_rank, nodes))

    def _commit(self, goal: ScaleGoal) -> None:
        assert self.planner is not None
        placements = self._placements_of(goal)
        keep = tuple(goal.old.index(unit) if unit in goal.old else None for unit in goal.new)
        step, digest = self._rearrange(Rearrange(keep, goal.is_repair))
        for unit in goal.new:
            for rank in goal.ranks_of[unit]:
                layers = self.planner.config.layers_of(self._stage_of(rank, unit))
                tables = [list(placements[layer].physical_to_logical) for layer in layers]
                self.executor.send(rank, Enter(goal.generation, step, digest, tables, goal.is_repair))
        survives = self.planner.config.on_rank_loss == "shrink"
        self.executor.members.clear()
        self.executor.members |= set(goal.members)
        self.executor.spare -= set(goal.members)
        if survives:
            self.executor.spare |= set(goal.members)
        self.generation, self.units = goal.generation, goal.new
        self.planner.enter(self._topologies(goal.new), placements)
        self.executor.drop(goal.removed)

    def _undo(self, goal: ScaleGoal) -> None:
        for rank in self.executor.members:
            self.executor.send(rank, Discard(goal.generation))
        self.executor.drop(goal.added)

    def _placements_of(self, goal: ScaleGoal) -> list[LayerPlacement]:
        """Of the next generation: the slots of ranks that stay are untouched."""
        assert self.planner is not None
        per_rank, kept = self.planner.config.slots_per_rank, self._kept_ranks(goal)
        placements = []
        for layer, placement in enumerate(self.planner.placements):
            table = drop_ranks(placement, kept, slots_per_rank=per_rank).physical_to_logical
            placements.append(LayerPlacement(placement.version + 1, (*table, *self._joining[layer])))
        return placements

    def _choose_joining(self, goal: ScaleGoal) -> list[tuple[int, ...]]:
        """Experts of the slots that added ranks bring, per layer: fixed at the start, because they load them."""
        assert self.planner is not None
        per_rank, num_new = self.planner.config.slots_per_rank, len(goal.added) // self.config.shape.pp
        joining = []
        for layer, placement in enumerate(self.planner.placements):
            topology = EpTopology.uniform(1, placement.num_slots // per_rank + num_new)
            load = self.planner.load.load()[layer]
            grown = placement
            if num_new:
                grown = add_ranks(placement, num_new, per_rank, load, topology)
            joining.append(grown.physical_to_logical[placement.num_slots :])
        return joining

    def _spec_of(self, goal: ScaleGoal, rank: int) -> RankSpec:
        unit = next(unit for unit in goal.new if rank in goal.ranks_of[unit])
        index, tp = goal.ranks_of[unit].index(rank), self.config.shape.tp
        place = Coordinate(pp=index // tp, dp=goal.new.index(unit), tp=index % tp)
        nodes = self._nodes(place.pp, goal.new)
        orders = self.config.expert_orders(place.pp, nodes, self._placements_of(goal), goal.generation)
        return self.config.rank_spec(rank, unit, place, self._store, self._interface, orders)

    def _stage_of(self, rank: int, unit: int) -> int:
        return self._ranks_of[unit].index(rank) // self.config.shape.tp

    def _nodes(self, stage: int, units: Sequence[int]) -> list[str]:
        """Node of each rank of a stage's expert group; those of ranks that are still to come do not matter yet."""
        assert self.config.experts is not None
        tp = self.config.shape.tp
        ranks = [self._ranks_of[unit][stage * tp + i] for unit in units for i in range(tp)]
        return self.config.experts.node_names([self.executor.nodes.get(rank, "") for rank in ranks])

    def _topologies(self, units: Sequence[int]) -> list[EpTopology]:
        return [EpTopology.of_names(self._nodes(stage, units)) for stage in range(self.config.shape.pp)]

"""The ranks of a replica as they come and go: generations of the expert groups, scaling, repair. Called by the engine.

A dense replica is a mesh that never changes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import msgspec

from phalanx.errors import ConfigError, ReplicaLostError
from phalanx.moe.placement.types import LayerPlacement
from phalanx.parallel.costmodel import costs_from
from phalanx.parallel.mesh import Coordinate
from phalanx.runtime.dispatch_policy import DispatchPolicy
from phalanx.runtime.engine_config import EngineConfig
from phalanx.runtime.executor.executor import Came, Event, Executor, Lost
from phalanx.runtime.executor.link import other_rows
from phalanx.runtime.expert_config import expert_traffic
from phalanx.runtime.expert_planner import ExpertPlanner
from phalanx.runtime.memory import ITEMSIZE
from phalanx.runtime.next_generation import NextGeneration
from phalanx.runtime.plan import Discard, Enter, ExpertLoad, MovesDone, Prepare, Prepared, Ready, StepFailed, StepPlan
from phalanx.runtime.rank_spec import RankSpec
from phalanx.runtime.rebalancer import Rebalancer
from phalanx.runtime.scaling import Build, Commit, Effect, Evacuate, Fail, Grow, ScaleGoal, ScaleOp, Undo
from phalanx.runtime.units import Units

BROKEN_S = 5.0
"""An exchange broke, but no rank was found dead for so long: longer than the silence of a frozen one is borne."""

MAX_REMEMBERED = 64
"""Operations whose id is known after their end."""


class Rearrange(NamedTuple):
    """What a commit means for the scheduler: the old dp rank of each new one, None = a new one."""

    keep: tuple[int | None, ...]
    reset: bool


class ReplicaMesh:
    """Units, expert planner and the operation under way.

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
        self.generation = 0
        self.op: ScaleOp | None = None
        self.planner: ExpertPlanner | None = None
        self.rebalancer: Rebalancer | None = None
        self._units = Units(config.shape, executor.nodes)
        self._next_generation = 1
        self._next: NextGeneration | None = None
        self._ops: dict[str, ScaleOp] = {}
        self._broken: tuple[float, str] | None = None
        if config.experts is not None:
            topologies = self._units.topologies(self.units, config.experts)
            fabric = next((ready.fabric for ready in executor.ready.values() if ready.fabric), [])
            traffic = expert_traffic(config.model, ITEMSIZE[config.dtype], exact=config.experts.exact)
            costs = costs_from(fabric, traffic) if fabric else None
            policy = DispatchPolicy(config.experts.dispatch, topologies, costs, config.shape.tp)
            self.planner = ExpertPlanner(config.experts, topologies, config.initial_placements(), policy)
            self.rebalancer = Rebalancer(self.planner)
            if config.experts.on_rank_loss == "shrink":
                executor.spare |= executor.members

    @property
    def units(self) -> tuple[int, ...]:
        """Of the generation in use, in dp order."""
        return self._units.current

    @property
    def seats(self) -> dict[int, Coordinate]:
        """Place of every rank in use."""
        ranks = (rank for unit in self.units for rank in self._units.ranks_of[unit])
        return {rank: self._units.place_of(rank, self.units) for rank in ranks}

    @property
    def nodes(self) -> list[str]:
        """Names of the nodes with ranks in use."""
        return self._units.names

    @property
    def holds(self) -> bool:
        """No step may be planned now."""
        return self.op is not None and self.op.holds

    @property
    def is_busy(self) -> bool:
        """Steps are wanted although no request runs: rows travel beside them."""
        return self.planner is not None and self.planner.is_migrating

    def stamp(self, plan: StepPlan) -> StepPlan:
        """Add generation and expert fields to a plan."""
        if self.planner is None:
            return plan
        tokens = [sum(domain.rows[1::3]) for domain in plan.domains]
        return msgspec.structs.replace(plan, generation=self.generation, experts=self.planner.step(tokens))

    def note_step(self, seconds: float) -> None:
        """A step of the generation in use took so long on a rank."""
        if self.rebalancer is not None:
            self.rebalancer.note_step(seconds)

    def scale(self, op_id: str, target: int, now: float, leave: Sequence[str] = ()) -> ScaleOp:
        """Begin an operation, or find it: the same id is the same operation. Ranks on the nodes to `leave` go first.

        Raises:
            ConfigError: another one is running, or the target cannot be; with the numbers.
        """
        if op_id in self._ops:
            return self._ops[op_id]
        if self.op is not None and not self.op.is_over:
            raise ConfigError(f"scale operation {self.op.goal.op_id!r} is running; wait for it, then try again")
        self.check_target(target)
        return self._begin(op_id, self._units.of_size(target, leave), now, is_repair=False)

    def abort(self, op_id: str, reason: str, now: float) -> None:
        """Undo an operation if it is still running. A repair cannot be: there is no size to go back to."""
        if self.op is not None and self.op.goal.op_id == op_id and not self.op.goal.is_repair:
            self._carry_out(self.op, self.op.abort(reason), now)

    def rebalance(self) -> None:
        """Solve the placement of every layer now and move what cools it; nothing while an operation runs."""
        if self.rebalancer is not None and (self.op is None or self.op.is_over):
            self.rebalancer.force()

    def check_target(self, target: int) -> ExpertPlanner:
        """Whether the group could have this size.

        Raises:
            ConfigError: it could not; with the numbers and the way out.
        """
        if self.planner is None:
            raise ConfigError("only replicas of a mixture-of-experts model can be scaled; raise replicas instead")
        experts, tp = self.planner.config, self.config.shape.tp
        if experts.dispatch == "local" and target * tp > 1:
            raise ConfigError(f"data {target}: moe.dispatch local is for an expert group of one rank; use auto")
        slots, most = target * tp * experts.slots_per_rank, max(experts.num_experts)
        if target < 1 or slots < most:
            least = -(-most // (tp * experts.slots_per_rank))
            raise ConfigError(
                f"data {target}: {max(target, 0) * tp} ranks of {experts.slots_per_rank} expert slots hold "
                f"{max(slots, 0)} of {most} experts; use {least} or more"
            )
        return self.planner

    def evacuation(self, target: int, leave: Sequence[str] = ()) -> Mapping[int, LayerPlacement]:
        """What must move, by MoE layer, before the group can have another size; raises as `scale`."""
        return self._next_of(self._units.preview(target, leave)).evacuation()

    def tick(self, num_in_flight: int, now: float) -> None:
        """Let time and the steps in flight act on what is under way.

        Raises:
            ReplicaLostError: a repair, or a broken step, took too long.
        """
        op = self.op
        is_scaling = op is not None and not op.is_over
        if self.rebalancer is not None:
            self.rebalancer.tick(is_scaling=is_scaling)
        if self._broken is not None and not is_scaling and now > self._broken[0] + BROKEN_S:
            raise ReplicaLostError(f"a step failed although every rank is alive: {self._broken[1]}")
        if op is None or not is_scaling:
            return
        self._carry_out(op, op.tick(now), now)
        if op.is_evacuating and not op.is_over and not self.is_busy:
            assert self._next is not None
            if self._next.is_evacuated:
                self._carry_out(op, op.evacuated(now), now)
            else:
                self._evacuate()
        if op.phase == "COMMITTING" and (num_in_flight == 0 or op.goal.is_repair):
            self._carry_out(op, op.drained(), now)

    def handle(self, event: Event, now: float) -> None:
        """Take what a rank said that is no step result.

        Raises:
            ReplicaLostError: a member is lost that the replica needs.
        """
        op, planner = self.op, self.planner
        match event:
            case Came() if op is not None and not op.is_over and event.rank in op.goal.added:
                self.executor.brief(self._spec_of(op.goal, event.rank))
            case Came():
                self.executor.drop([event.rank])
            case Ready() if op is not None:
                stage = self._units.place_of(event.rank, op.goal.new).pp
                usual = next(self.executor.ready[rank] for rank, place in self.seats.items() if place.pp == stage)
                problem = other_rows(event, usual)
                self._carry_out(op, op.abort(problem) if problem else op.ready(event.rank, now), now)
            case Prepared() if op is not None:
                self._carry_out(op, op.prepared(event.rank, event.generation, event.error, now), now)
            case Lost():
                self._lost(event, now)
            case StepFailed() if event.generation == self.generation and self._broken is None:
                self._broken = (now, event.error)
            case MovesDone() if planner is not None:
                planner.on_moves(event)
            case ExpertLoad() if planner is not None:
                planner.on_load(event)
            case _:
                return

    def _lost(self, event: Lost, now: float) -> None:
        """What is under way ends with a rank; a lost member is then repaired."""
        op, members = self.op, self.executor.members
        is_member = event.rank in members
        if is_member:
            members.difference_update(self._units.ranks_of[self._units.unit_of(event.rank)])
        if op is not None:
            self._carry_out(op, op.lost(event.rank, event.reason), now)
        if not is_member:
            return
        survivors = tuple(unit for unit in self.units if members.issuperset(self._units.ranks_of[unit]))
        if loss := self._next_of(survivors).loss():
            raise ReplicaLostError(f"{event.reason}; {loss}")
        self._begin(f"repair-{self._next_generation}", survivors, now, is_repair=True)

    def _next_of(self, units: Sequence[int]) -> NextGeneration:
        assert self.planner is not None, "only expert groups change"
        return NextGeneration(self.units, units, self.planner, self.config.shape.tp)

    def _begin(self, op_id: str, units: tuple[int, ...], now: float, *, is_repair: bool) -> ScaleOp:
        ranks_of = {unit: self._units.ranks_of[unit] for unit in (*self.units, *units)}
        goal = ScaleGoal(op_id, self._next_generation, self.units, units, ranks_of, is_repair)
        self._next_generation += 1
        self._next = self._next_of(units)
        op = ScaleOp(goal)
        self._carry_out(op, op.start(now), now)  # may refuse: then there is no operation
        self.op = self._ops[op_id] = op
        if len(self._ops) > MAX_REMEMBERED:
            del self._ops[next(iter(self._ops))]
        return op

    def _carry_out(self, op: ScaleOp, effects: list[Effect], now: float) -> None:
        for effect in effects:
            match effect:
                case Grow(ranks):
                    self.executor.grow(ranks)
                case Evacuate():
                    self._evacuate()
                case Build():
                    self._build(op.goal)
                case Commit():
                    self._commit(op.goal)
                case Undo():
                    self._undo(op.goal)
                case Fail(reason):
                    raise ReplicaLostError(reason)

    def _evacuate(self) -> None:
        assert self.planner is not None
        assert self._next is not None
        self.planner.migrate(self._next.evacuation())

    def _build(self, goal: ScaleGoal) -> None:
        assert self.config.experts is not None
        for rank in goal.members:
            place = self._units.place_of(rank, goal.new)
            nodes = self._units.nodes(place.pp, goal.new, self.config.experts)
            self.executor.send(rank, Prepare(goal.generation, place.dp, nodes))

    def _commit(self, goal: ScaleGoal) -> None:
        assert self.planner is not None
        assert self.rebalancer is not None
        assert self._next is not None
        placements, members, experts = self._next.placements(), set(goal.members), self.planner.config
        keep = tuple(goal.old.index(unit) if unit in goal.old else None for unit in goal.new)
        step, digest = self._rearrange(Rearrange(keep, goal.is_repair))
        for rank in goal.members:
            layers = experts.layers_of(self._units.place_of(rank, goal.new).pp)
            tables = [list(placements[layer].physical_to_logical) for layer in layers]
            self.executor.send(rank, Enter(goal.generation, step, digest, tables, goal.is_repair))
        self.executor.members.clear()
        self.executor.members |= members
        self.executor.spare -= members
        if experts.on_rank_loss == "shrink":
            self.executor.spare |= members
        self.generation, self._units.current, self._broken = goal.generation, goal.new, None
        self.planner.enter(self._units.topologies(goal.new, experts), placements)
        self.rebalancer.enter()
        self.executor.drop(goal.removed)

    def _undo(self, goal: ScaleGoal) -> None:
        for rank in sorted(self.executor.members):
            self.executor.send(rank, Discard(goal.generation))
        self.executor.drop(goal.added)

    def _spec_of(self, goal: ScaleGoal, rank: int) -> RankSpec:
        assert self.config.experts is not None
        assert self._next is not None
        place = self._units.place_of(rank, goal.new)
        nodes = self._units.nodes(place.pp, goal.new, self.config.experts)
        orders = self.config.expert_orders(place.pp, nodes, self._next.placements(), goal.generation)
        unit = self._units.unit_of(rank)
        return self.config.rank_spec(rank, unit, place, self._store, self._interface, orders)

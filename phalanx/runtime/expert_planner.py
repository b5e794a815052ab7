"""What the expert groups do in each step: dispatcher, migrations under way, reports of load. Pure.

The one owner of "which expert lives where": `placement` is what the ranks have switched to with the last plan. A layer
moves in batches, each of which ends in a valid placement:

    batch planned -> moves in a step -> all acknowledged -> flip in a step -> next batch
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from phalanx.moe.load import LoadWindow
from phalanx.moe.migrate import MoveBatch, plan_moves
from phalanx.moe.placement.types import LayerPlacement
from phalanx.parallel.topology import EpTopology
from phalanx.runtime.dispatch_policy import DispatchPolicy
from phalanx.runtime.expert_config import ExpertConfig
from phalanx.runtime.plan import ExpertLoad, ExpertStep, Flip, Move, MovesDone

REPORT_STEPS = 32
"""Steps between two reports of load."""


@dataclass(slots=True)
class _Active:
    """A batch whose rows are travelling; `unfinished` maps move ids to moves."""

    batch: MoveBatch
    unfinished: dict[int, Move]
    moves: list[Move]


@dataclass(slots=True)
class _Layer:
    """One MoE layer.

    Attributes:
        placement: what the ranks use.
        pending: batches that follow.
    """

    placement: LayerPlacement
    pending: deque[MoveBatch] = field(default_factory=deque)
    active: _Active | None = None


class ExpertPlanner:
    """See the module's docstring.

    Args:
        config: of the expert groups.
        topologies: of each stage's group.
        placements: of every MoE layer of the model.
        policy: chooses the dispatcher.
    """

    def __init__(
        self,
        config: ExpertConfig,
        topologies: Sequence[EpTopology],
        placements: Sequence[LayerPlacement],
        policy: DispatchPolicy,
    ) -> None:
        self.config, self.topologies, self.policy = config, list(topologies), policy
        self.load = LoadWindow(config.num_experts)
        self.num_dropped = self.num_moved = 0
        self.rank_load: dict[int, int] = {}
        self._layers = [_Layer(placement) for placement in placements]
        self._next_id = self._steps = 0
        self._flips: list[Flip] = []
        self._retries: list[Move] = []
        self._free_staging: dict[tuple[int, int], list[int]] = {}
        self._reset_staging()

    @property
    def placements(self) -> list[LayerPlacement]:
        """Of every MoE layer, as the ranks use them."""
        return [layer.placement for layer in self._layers]

    @property
    def is_migrating(self) -> bool:
        """Some layer has not reached its target."""
        return bool(self._flips) or any(layer.pending or layer.active for layer in self._layers)

    def step(self, tokens: Sequence[int]) -> ExpertStep:
        """The next step's part; `tokens` of each dp rank. Its flips and moves count as done by the ranks."""
        self._steps += 1
        flips, self._flips = self._flips, []
        moves, self._retries = self._retries, []
        for index, layer in enumerate(self._layers):
            if layer.pending and layer.active is None and not any(flip.layer == index for flip in flips):
                moves += self._start(index, layer)
        kind = self.policy.choose(max(tokens, default=0))
        return ExpertStep(kind, max(tokens, default=0), self._steps % REPORT_STEPS == 0, moves, flips)

    def migrate(self, targets: Mapping[int, LayerPlacement]) -> None:
        """Head for other placements of some layers; what a layer was heading for before ends after its batch."""
        for index, target in targets.items():
            layer = self._layers[index]
            start = layer.placement if layer.active is None else layer.active.batch.layer
            layer.pending = deque(
                plan_moves(
                    start,
                    target,
                    self.topologies[self.config.stage_of[index]],
                    slots_per_rank=self.config.slots_per_rank,
                    staging_rows=self.config.staging_rows,
                )
            )

    def on_moves(self, done: MovesDone) -> None:
        """Take acknowledgements; a damaged row travels again."""
        for index, layer in enumerate(self._layers):
            active = layer.active
            if active is None:
                continue
            for move_id in done.ids:
                active.unfinished.pop(move_id, None)
            self._retries += [active.unfinished[move_id] for move_id in done.failed if move_id in active.unfinished]
            if not active.unfinished:
                self._finish(index, layer, active)

    def on_load(self, report: ExpertLoad) -> None:
        """Add a rank's counts."""
        counts: list[NDArray[np.int64]] = [np.frombuffer(layer, "<i8") for layer in report.counts]
        self.load.add(report.first_layer, counts)
        self.num_dropped += report.num_dropped

    def enter(self, topologies: Sequence[EpTopology], placements: Sequence[LayerPlacement]) -> None:
        """Another generation: rows under way are forgotten with the old one's groups."""
        self.topologies = list(topologies)
        self._layers = [_Layer(placement) for placement in placements]
        self._flips, self._retries = [], []
        self.policy.enter(topologies)
        self._reset_staging()

    def check(self) -> None:
        """All invariants.

        Raises:
            AssertionError: one does not hold; a bug of ours.
        """
        for layer, num_experts in zip(self._layers, self.config.num_experts, strict=True):
            layer.placement.validate(self.config.slots_per_rank, num_experts)
        flying = sum(len(layer.active.moves) for layer in self._layers if layer.active is not None)
        waiting = sum(len(flip.copies) // 2 for flip in self._flips)
        free = sum(map(len, self._free_staging.values()))
        assert free + flying == len(self._free_staging) * self.config.staging_rows, f"staging rows {free} + {flying}"
        assert waiting <= self.num_moved

    def _reset_staging(self) -> None:
        self._free_staging = {
            (stage, rank): list(range(self.config.staging_rows))
            for stage, topology in enumerate(self.topologies)
            for rank in range(topology.num_ranks)
        }

    def _start(self, index: int, layer: _Layer) -> list[Move]:
        """The next batch's moves, if all its targets have staging rows free."""
        batch, stage, per_rank = layer.pending[0], self.config.stage_of[index], self.config.slots_per_rank
        places = [(stage, move.dst_slot // per_rank) for move in batch.moves]
        if any(places.count(place) > len(self._free_staging[place]) for place in places):
            return []
        layer.pending.popleft()
        moves = []
        for move, place in zip(batch.moves, places, strict=True):
            staging = self._free_staging[place].pop()
            moves.append(Move(self._next_id, index, move.src_slot, move.dst_slot, staging))
            self._next_id += 1
        layer.active = _Active(batch, {move.id: move for move in moves}, moves)
        if not moves:  # a change of versions only
            self._finish(index, layer, layer.active)
        return moves

    def _finish(self, index: int, layer: _Layer, active: _Active) -> None:
        stage, per_rank = self.config.stage_of[index], self.config.slots_per_rank
        copies: list[int] = []
        for move in active.moves:
            copies += (move.staging, move.target)
            # Free at once: the flip goes out with the same plan as, or before, the next move into the row.
            self._free_staging[stage, move.target // per_rank].append(move.staging)
        new = active.batch.layer
        self._flips.append(Flip(index, new.version, list(new.physical_to_logical), copies))
        self.num_moved += len(active.moves)
        layer.placement, layer.active = new, None

"""What the expert groups do in each step: dispatcher, migrations under way, reports of load. Pure.

The one owner of "which expert lives where": `placements` is what the ranks have switched to with the last plan. A layer
moves in batches, each of which ends in a valid placement:

    batch planned -> moves in steps -> all acknowledged -> flip in a step, with moves of the next batch

A step carries only as many rows as it can without being late itself.
"""

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from phalanx.moe.load_window import LoadWindow
from phalanx.moe.migrate import MoveBatch, plan_moves
from phalanx.moe.placement.types import LayerPlacement
from phalanx.parallel.topology import EpTopology
from phalanx.runtime.dispatch_policy import DispatchPolicy
from phalanx.runtime.expert_config import ExpertConfig
from phalanx.runtime.plan import ExpertLoad, ExpertStep, Flip, Move, MovesDone

STEP_BYTES = 8 << 20
"""What a rank sends, and what it receives, in one step; a single row may be larger. A CPU seals it in about 2 ms."""

REPORT_STEPS = 32
"""Steps between two reports of load."""


@dataclass(slots=True)
class _Active:
    """A batch whose rows are travelling, or staged when `unfinished`, by move id, is empty."""

    batch: MoveBatch
    moves: list[Move]
    unfinished: dict[int, Move]


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
        self.num_dropped = self.num_moved = self.num_flips = 0
        self.rank_load: dict[int, int] = {}
        self._layers = [_Layer(placement) for placement in placements]
        self._next_id = self.num_steps = 0
        self._waiting: list[Move] = []
        self._free_staging: dict[tuple[int, int], list[int]] = {}
        self._reset_staging()

    @property
    def placements(self) -> list[LayerPlacement]:
        """Of every MoE layer, as the ranks use them."""
        return [layer.placement for layer in self._layers]

    @property
    def is_migrating(self) -> bool:
        """Some layer has not reached its target."""
        return any(layer.pending or layer.active for layer in self._layers)

    def is_still(self, layer: int) -> bool:
        """A layer is where it should be."""
        return not self._layers[layer].pending and self._layers[layer].active is None

    def step(self, tokens: Sequence[int]) -> ExpertStep:
        """The next step's part; `tokens` of each dp rank. Its flips and moves count as done by the ranks."""
        self.num_steps += 1
        # First all flips, which free staging rows; a rank, too, flips before it moves.
        flips = [
            self._flip(index, layer, layer.active)
            for index, layer in enumerate(self._layers)
            if layer.active is not None and not layer.active.unfinished
        ]
        for index, layer in enumerate(self._layers):
            if layer.pending and layer.active is None:
                self._waiting += self._start(index, layer)
        kind = self.policy.choose(max(tokens, default=0))
        is_report = self.num_steps % REPORT_STEPS == 0
        return ExpertStep(kind, max(tokens, default=0), is_report, self._take_moves(), flips)

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
                    slots_per_rank=self.config.slots_of(index),
                    staging_rows=self.config.staging_rows,
                    min_replicas=self.config.min_replicas,
                )
            )

    def on_moves(self, done: MovesDone) -> None:
        """Take acknowledgements; a damaged row travels again."""
        for active in (layer.active for layer in self._layers if layer.active is not None):
            for move_id in done.ids:
                active.unfinished.pop(move_id, None)
            damaged = [active.unfinished[move_id] for move_id in done.failed if move_id in active.unfinished]
            self._waiting += [move for move in damaged if move not in self._waiting]

    def on_load(self, report: ExpertLoad) -> None:
        """Add a rank's counts."""
        counts: list[NDArray[np.int64]] = [np.frombuffer(layer, "<i8") for layer in report.counts]
        self.load.add(report.first_layer, counts)
        self.num_dropped += report.num_dropped

    def enter(self, topologies: Sequence[EpTopology], placements: Sequence[LayerPlacement]) -> None:
        """Another generation: rows under way are forgotten with the old one's groups."""
        self.topologies = list(topologies)
        self._layers = [_Layer(placement) for placement in placements]
        self._waiting = []
        self.policy.enter(topologies)
        self._reset_staging()

    def check(self) -> None:
        """All invariants.

        Raises:
            AssertionError: one does not hold; a bug of ours.
        """
        for index, (layer, num_experts) in enumerate(zip(self._layers, self.config.num_experts, strict=True)):
            layer.placement.validate(self.config.slots_of(index), num_experts)
        staged = {place: list(rows) for place, rows in self._free_staging.items()}
        for layer in (layer for layer in self._layers if layer.active is not None):
            assert layer.active is not None
            assert layer.active.batch.layer.version == layer.placement.version + 1, "a batch of an older placement"
            for move in layer.active.moves:
                staged[self._place(move)].append(move.staging)
        rows = list(range(self.config.staging_rows))
        assert all(sorted(used) == rows for used in staged.values()), f"every staging row has one owner: {staged}"

    def _reset_staging(self) -> None:
        self._free_staging = {
            (stage, rank): list(range(self.config.staging_rows))
            for stage, topology in enumerate(self.topologies)
            for rank in range(topology.num_ranks)
        }

    def _start(self, index: int, layer: _Layer) -> list[Move]:
        """The next batch's moves, if all its targets have staging rows free."""
        batch, stage, per_rank = layer.pending[0], self.config.stage_of[index], self.config.slots_of(index)
        places = [(stage, move.dst_slot // per_rank) for move in batch.moves]
        if any(places.count(place) > len(self._free_staging[place]) for place in places):
            return []
        layer.pending.popleft()
        moves = []
        for move, place in zip(batch.moves, places, strict=True):
            staging = self._free_staging[place].pop()
            moves.append(Move(self._next_id, index, move.src_slot, move.dst_slot, staging))
            self._next_id += 1
        layer.active = _Active(batch, moves, {move.id: move for move in moves})
        return moves

    def _take_moves(self) -> list[Move]:
        """Those that wait, first come first served, until an end of one has enough for this step."""
        rows = max(1, STEP_BYTES // self.config.row_bytes)
        sent: Counter[tuple[int, int]] = Counter()
        received: Counter[tuple[int, int]] = Counter()
        taken, left = [], []
        for move in self._waiting:
            source = self.config.stage_of[move.layer], move.source // self.config.slots_of(move.layer)
            target = self._place(move)
            if sent[source] < rows and received[target] < rows:
                sent[source] += 1
                received[target] += 1
                taken.append(move)
            else:
                left.append(move)
        self._waiting = left
        return taken

    def _flip(self, index: int, layer: _Layer, active: _Active) -> Flip:
        """All rows of a layer's batch are staged: they become slots with the next plan."""
        copies: list[int] = []
        for move in active.moves:
            copies += (move.staging, move.target)
            self._free_staging[self._place(move)].append(move.staging)
        layer.placement, layer.active = active.batch.layer, None
        self.num_moved += len(active.moves)
        self.num_flips += 1
        return Flip(index, layer.placement.version, list(layer.placement.physical_to_logical), copies)

    def _place(self, move: Move) -> tuple[int, int]:
        """(stage, rank) whose staging row a move fills."""
        return self.config.stage_of[move.layer], move.target // self.config.slots_of(move.layer)

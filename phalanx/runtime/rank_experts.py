"""A rank's expert weights on the move and its expert groups: what `ExpertStep`, `Prepare`, `Enter` and `Discard` do.

Make before break: rows travel beside steps (`row_transfers.py`), and a flip between two steps makes them slots. Groups
of the next generation are built in a thread while the current one serves.
"""

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from phalanx.errors import PhalanxError
from phalanx.kernels.experts import Experts
from phalanx.models.loading import read_config
from phalanx.moe.group import ExpertGroup
from phalanx.moe.placement.types import LayerPlacement
from phalanx.moe.probe import Probe
from phalanx.parallel import calibration, membership, rendezvous
from phalanx.parallel.membership import Membership
from phalanx.parallel.mesh import Mesh
from phalanx.parallel.topology import EpTopology
from phalanx.runtime.expert_config import expert_traffic
from phalanx.runtime.memory import ITEMSIZE
from phalanx.runtime.plan import (
    Enter,
    ExpertLoad,
    ExpertStep,
    Flip,
    Move,
    MovesDone,
    PlanError,
    Prepare,
    Prepared,
    RankMessage,
)
from phalanx.runtime.rank_spec import ExpertOrders, RankSpec
from phalanx.runtime.row_transfers import RowTask, RowTransfers


class RankExperts:
    """The expert side of one rank.

    Args:
        spec: of the rank; its `experts` are set.
        mesh: of the rank.
        first_layer: the stage's first MoE layer, counted over the MoE layers of the model.
        send: takes messages for the engine, from any thread.

    Raises:
        ReplicaLostError: the other ranks are not there in time.
    """

    def __init__(self, spec: RankSpec, mesh: Mesh, first_layer: int, send: Callable[[RankMessage], None]) -> None:
        assert spec.experts is not None
        orders: ExpertOrders = spec.experts
        self._spec, self._orders, self._mesh, self._send = spec, orders, mesh, send
        self._first_layer = first_layer
        self._lock = threading.Lock()
        self._prepared: dict[int, Membership] = {}
        self._discarded = -1
        self._current: Membership | None = None
        self._rows: list[Tensor] = []
        self._kinds: list[str] = []
        self._transfers = RowTransfers(orders.staging_rows, 0, mesh.device)
        topology = EpTopology.of_names(orders.nodes)
        self.group = ExpertGroup(
            topology,
            self._rank_of(mesh.coordinate.dp),
            [LayerPlacement(0, tuple(table)) for table in orders.placements],
            orders.slots_per_rank,
            exact=orders.exact,
            device=mesh.device,
            choose=spec.choose,
        )
        self.fabric: list[float] = []
        if topology.num_ranks > 1 and not orders.joins_later:
            self._current = self._build(orders.generation, topology, self.group.rank)
            self.group.enter(self._current.transport, self.group.placements)
            if orders.calibrate:
                model = read_config(spec.model_path)
                traffic = expert_traffic(model, ITEMSIZE[spec.dtype], exact=orders.exact)
                probe = Probe(traffic, model.hidden_size, getattr(torch, spec.dtype), mesh.device)
                self.fabric = calibration.measure(self._current.transport, traffic, probe.layer, mesh.device)

    def attach(self, experts: Sequence[Experts]) -> None:
        """Take the weights of the stage's MoE layers, loaded already; they are moved from and into."""
        self._rows = [one.rows for one in experts]
        self._kinds = sorted({f"{one.impl}:{one.rows.shape[1]}" for one in experts})
        widest = max((rows.shape[1] for rows in self._rows), default=0)  # a stage may have dense layers only
        self._transfers = RowTransfers(self._orders.staging_rows, widest, self._mesh.device)

    def describe_rows(self) -> str:
        """Back end and bytes per row of each layer's experts; ranks with other rows cannot take them."""
        return " ".join(self._kinds)

    def begin(self, step: ExpertStep) -> None:
        """Before a step's forward: switch the layers that flip, and let rows travel.

        Raises:
            PlanError: a layer, slot or staging row out of range.
        """
        self.flip(step)
        if step.moves:
            self._move([move for move in step.moves if self._is_mine(move.layer)])

    def flip(self, step: ExpertStep) -> None:
        """Switch the layers that flip in a step, whether it runs or not: other ranks may have run it."""
        for flip in step.flips:
            if self._is_mine(flip.layer):
                self._flip(flip)

    def report(self, num_dropped: int) -> None:
        """Send the loads counted since the last report."""
        counts = [layer.astype("<i8").tobytes() for layer in self.group.load.drain()]
        self._send(ExpertLoad(self._spec.rank, self._first_layer, counts, num_dropped))

    def prepare(self, order: Prepare) -> None:
        """Build the groups of another generation in a thread; the answer goes out when they are there."""
        threading.Thread(target=self._prepare, args=(order,), name="expert-group", daemon=True).start()

    def enter(self, order: Enter) -> int:
        """Switch to a prepared generation; returns this rank's dp rank in it.

        Raises:
            PlanError: it was not prepared.
        """
        with self._lock:
            new = self._prepared.pop(order.generation, None)
        if new is None:
            raise PlanError(f"rank {self._spec.rank} has no groups of generation {order.generation}")
        old, self._current = self._current, new
        self._transfers.clear()
        self.group.enter(new.transport, [LayerPlacement(0, tuple(table)) for table in order.placements])
        if old is not None:  # closing connections takes longer than a step
            threading.Thread(target=old.destroy, name="expert-group-end", daemon=True).start()
        return self.group.rank // self._mesh.shape.tp

    def discard(self, generation: int) -> None:
        """Give up a generation, built or not."""
        with self._lock:
            self._discarded = max(self._discarded, generation)
            prepared = self._prepared.pop(generation, None)
        if prepared is not None:
            prepared.destroy()

    def leave(self) -> None:
        """Close the current groups at once, so that a peer which still waits in them wakes up."""
        self._transfers.clear()
        old, self._current = self._current, None
        if old is not None:
            old.destroy()

    def close(self) -> None:
        """Leave all groups."""
        self.leave()
        for generation in list(self._prepared):
            self.discard(generation)

    def _rank_of(self, dp_rank: int) -> int:
        return dp_rank * self._mesh.shape.tp + self._mesh.coordinate.tp

    def _build(self, generation: int, topology: EpTopology, rank: int) -> Membership:
        return membership.build(
            rendezvous.connect_store(self._spec.store, self._spec.timeout_s),
            prefix=f"experts/{self._mesh.coordinate.pp}",
            generation=generation,
            topology=topology,
            rank=rank,
            device=self._mesh.device,
            timeout_s=self._spec.timeout_s,
            interface=self._spec.interface or None,
        )

    def _prepare(self, order: Prepare) -> None:
        error = ""
        try:
            built = self._build(order.generation, EpTopology.of_names(order.nodes), self._rank_of(order.dp_rank))
        except (PhalanxError, RuntimeError, OSError) as failure:  # unanswered, it would only end by a deadline
            error = str(failure)
        else:
            with self._lock:
                keep = order.generation > self._discarded
                if keep:
                    self._prepared[order.generation] = built
            if not keep:
                built.destroy()
                error = "discarded"
        self._send(Prepared(self._spec.rank, order.generation, error))

    def _is_mine(self, layer: int) -> bool:
        return 0 <= layer - self._first_layer < len(self._rows)

    def _flip(self, flip: Flip) -> None:
        layer = flip.layer - self._first_layer
        rows, per_rank = self._rows[layer], self.group.slots_of(layer)
        for staging, slot in zip(flip.copies[::2], flip.copies[1::2], strict=True):
            if slot // per_rank == self.group.rank:
                rows[slot % per_rank].copy_(self._transfers.staged(staging, rows.shape[1]))
        self._transfers.flipped(flip.layer)
        self.group.flip(layer, LayerPlacement(flip.version, tuple(flip.physical_to_logical)))

    def _move(self, moves: list[Move]) -> None:
        """Begin this rank's part; sources are not overwritten before their layer flips.

        Raises:
            PlanError: a staging row out of range.
        """
        me, tasks = self.group.rank, []
        for move in moves:
            layer = move.layer - self._first_layer
            per_rank = self.group.slots_of(layer)
            source, target = move.source // per_rank, move.target // per_rank
            if me not in (source, target):
                continue
            if not 0 <= move.staging < self._transfers.num_staging_rows:
                raise PlanError(
                    f"move {move.id}: staging row {move.staging} is not one of {self._transfers.num_staging_rows}"
                )
            expert = self.group.placements[layer].physical_to_logical[move.source]
            row = self._rows[layer][(move.source if me == source else move.target) % per_rank]
            tasks.append(RowTask(move, expert, row, target if me == source else source, me == source))
        if tasks:
            assert self._current is not None, "rows move between ranks"
            self._transfers.begin(tasks, self._current.mover)

    def acknowledge(self) -> None:
        """Tell the engine which rows have arrived: with a step's end, for which it wakes up anyway."""
        done, failed = self._transfers.finished()
        if done or failed:
            self._send(MovesDone(self._spec.rank, done, failed))

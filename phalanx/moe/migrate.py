"""How a placement becomes another one while it serves: batches of moves with a valid placement after each. Pure.

A batch copies rows into the staging rows of the receiving ranks, and then all its slots flip together: reads are over
before a slot is overwritten, so two ranks may exchange experts. Slots inside a rank are never permuted.
"""

from collections import Counter, deque
from collections.abc import Iterable
from typing import NamedTuple

from phalanx.errors import ConfigError
from phalanx.moe.placement.types import LayerPlacement
from phalanx.parallel.topology import EpTopology


class Move(NamedTuple):
    """Copy one expert's row: source slot -> staging row of the destination's rank -> destination slot at the flip."""

    expert: int
    src_slot: int
    dst_slot: int
    staging_row: int


class MoveBatch(NamedTuple):
    """Moves that flip together.

    Attributes:
        moves: in a fixed order; each rank receives from one rank and sends to one rank at most.
        layer: the valid placement after the flip; its version is one above that of the placement before.
    """

    moves: tuple[Move, ...]
    layer: LayerPlacement


def plan_moves(
    old: LayerPlacement,
    new: LayerPlacement,
    topology: EpTopology,
    *,
    slots_per_rank: int,
    staging_rows: int,
    min_replicas: int = 1,
) -> list[MoveBatch]:
    """Batches that put the same experts on the same ranks as `new`.

    The number of moves is the least possible: one per (rank, expert) of `new` that `old` has not. Which slot of its
    rank an expert takes is decided here, so the last batch's table may differ from `new` by the order inside ranks.
    A copy comes from the own node when the node has one; otherwise one copy per batch crosses into the node, and later
    batches spread it there.

    Args:
        old: valid, now serving.
        new: valid, of the same experts and ranks.
        topology: the P ranks.
        slots_per_rank: s.
        staging_rows: rows a rank may receive in one batch, >= 1.
        min_replicas: live copies that an expert keeps on the way, wherever some move is possible without taking one.

    Raises:
        ConfigError: the placements do not fit each other, or there is no staging row.
    """
    if staging_rows < 1:
        raise ConfigError(f"staging_rows ({staging_rows}) must be at least 1 to move an expert")
    num_slots = topology.num_ranks * slots_per_rank
    if not old.num_slots == new.num_slots == num_slots or old.num_experts != new.num_experts:
        raise ConfigError(
            f"cannot move from {old.num_slots} slots of {old.num_experts} experts to {new.num_slots} of "
            f"{new.num_experts} on {topology.num_ranks} ranks of {slots_per_rank} slots: they must be the same"
        )
    old.validate(slots_per_rank, name="placement to move from")
    new.validate(slots_per_rank, name="placement to move to")
    state = _State(old, new, topology, slots_per_rank)
    batches: list[MoveBatch] = []
    version = old.version
    while any(state.missing):
        version += 1
        batches.append(_next_batch(state, staging_rows, version, min_replicas))
    return batches


class _State:
    """The placement after the batches planned so far, and what is still to do.

    Attributes:
        table: physical_to_logical.
        missing: per rank, experts it must get.
        leaving: per rank, slots whose expert it must lose; as many as `missing`.
        wanted: per expert, ranks that miss it.
        slots: live slots of each expert.
    """

    def __init__(self, old: LayerPlacement, new: LayerPlacement, topology: EpTopology, slots_per_rank: int) -> None:
        self.topology, self.slots_per_rank = topology, slots_per_rank
        self.table = list(old.physical_to_logical)
        self.slots = [list(slots) for slots in old.logical_to_physical]
        self.missing: list[list[int]] = []
        self.leaving: list[list[int]] = []
        self.wanted: list[list[int]] = [[] for _ in self.slots]
        for rank in range(topology.num_ranks):
            have, want = old.experts_of(rank, slots_per_rank), new.experts_of(rank, slots_per_rank)
            self.missing.append([expert for expert in want if expert not in have])
            self.leaving.append([rank * slots_per_rank + i for i, e in enumerate(have) if e not in want])
            for expert in self.missing[rank]:
                self.wanted[expert].append(rank)

    def rank(self, slot: int) -> int:
        return slot // self.slots_per_rank

    def node(self, slot: int) -> int:
        return self.topology.node_of[self.rank(slot)]

    def flip(self, moves: Iterable[Move]) -> None:
        moves = list(moves)
        for move in moves:
            self.slots[self.table[move.dst_slot]].remove(move.dst_slot)
            self.table[move.dst_slot] = move.expert
        for move in moves:
            self.slots[move.expert].append(move.dst_slot)


class _Batch:
    """Moves chosen for one batch, and the peers they occupy."""

    def __init__(self, state: _State, staging_rows: int) -> None:
        self.state, self.staging_rows = state, staging_rows
        self.moves: list[Move] = []
        self.lost: Counter[int] = Counter()
        self.receives_from: dict[int, int] = {}
        self.sends_to: dict[int, int] = {}
        self.rows: Counter[int] = Counter()
        self.entered: set[tuple[int, int]] = set()

    def copies_left(self, expert: int) -> int:
        """Live copies after the flip of what is chosen so far, new ones not counted."""
        return len(self.state.slots[expert]) - self.lost[expert]

    def source(self, expert: int, rank: int) -> int | None:
        """The slot to copy from, or None when none can send to `rank` in this batch."""
        state, node = self.state, self.state.topology.node_of[rank]
        if self.rows[rank] == self.staging_rows:
            return None
        near = [slot for slot in state.slots[expert] if state.node(slot) == node]
        if not near and (expert, node) in self.entered:
            return None
        for slot in near or state.slots[expert]:
            sender = state.rank(slot)
            if self.sends_to.get(sender, rank) == rank and self.receives_from.get(rank, sender) == sender:
                return slot
        return None

    def add(self, expert: int, src_slot: int, dst_slot: int) -> None:
        state, rank, sender = self.state, self.state.rank(dst_slot), self.state.rank(src_slot)
        self.moves.append(Move(expert, src_slot, dst_slot, self.rows[rank]))
        self.rows[rank] += 1
        self.receives_from[rank], self.sends_to[sender] = sender, rank
        if state.node(src_slot) != state.node(dst_slot):
            self.entered.add((expert, state.node(dst_slot)))
        self.lost[state.table[dst_slot]] += 1
        state.missing[rank].remove(expert)
        state.wanted[expert].remove(rank)
        state.leaving[rank].remove(dst_slot)


def _next_batch(state: _State, staging_rows: int, version: int, min_replicas: int) -> MoveBatch:
    """Fill one batch; it has at least one move, if need be at the price of all copies of an expert but one.

    Without a safe move every leaving expert is the last copy and goes to exactly one rank: what is left to do is a
    permutation, in which every rank lies on a cycle whose sources are its members.
    """
    batch = _Batch(state, staging_rows)
    for kept in range(min_replicas, 0, -1):
        while _add_safe_moves(batch, kept) or _add_cycles(batch):
            pass
        if batch.moves:
            break
    state.flip(batch.moves)
    return MoveBatch(tuple(batch.moves), LayerPlacement(version, tuple(state.table)))


def _add_safe_moves(batch: _Batch, kept: int) -> bool:
    """Overwrite copies whose expert has `kept` others."""
    state, before = batch.state, len(batch.moves)
    for rank, missing in enumerate(state.missing):
        for expert in list(missing):
            safe = [slot for slot in state.leaving[rank] if batch.copies_left(state.table[slot]) > kept]
            source = batch.source(expert, rank) if safe else None
            if source is not None:
                # A copy that others still want is the better kept one: it may be the only one of its node.
                batch.add(expert, source, min(safe, key=lambda slot: len(state.wanted[state.table[slot]])))
    return len(batch.moves) > before


def _add_cycles(batch: _Batch) -> bool:
    """Exchange experts around closed ways of ranks: nothing is lost, however few the copies."""
    before = len(batch.moves)
    for rank, missing in enumerate(batch.state.missing):
        if missing:
            _add_cycle(batch, _shortest_cycle(batch, rank))
    return len(batch.moves) > before


def _shortest_cycle(batch: _Batch, start: int) -> list[tuple[int, int]]:
    """[(slot, rank its expert goes to)] from `start` back to it, each rank once; [] = none fits into the batch."""
    state = batch.state
    came_from: dict[int, tuple[int, int]] = {}
    queue = deque([start])
    while queue and start not in came_from:
        rank = queue.popleft()
        for slot in state.leaving[rank]:
            for target in state.wanted[state.table[slot]]:
                if target not in came_from and batch.source(state.table[slot], target) is not None:
                    came_from[target] = (slot, rank)
                    queue.append(target)
    if start not in came_from:
        return []
    cycle = [came_from[start]]
    while cycle[-1][1] != start:
        cycle.append(came_from[cycle[-1][1]])
    slots, senders = zip(*cycle, strict=True)
    return list(zip(slots, (start, *senders), strict=False))


def _add_cycle(batch: _Batch, cycle: list[tuple[int, int]]) -> None:
    """All of the cycle's moves, or none when two of them need the same sender or bring one expert into a node."""
    state = batch.state
    freed = {state.rank(slot): slot for slot, _ in cycle}
    moves: dict[int, tuple[int, int, int]] = {}
    for slot, rank in cycle:
        expert = state.table[slot]
        source = batch.source(expert, rank)
        if source is None or state.rank(source) in moves or expert in (move[0] for move in moves.values()):
            return
        moves[state.rank(source)] = (expert, source, freed[rank])
    for move in moves.values():
        batch.add(*move)

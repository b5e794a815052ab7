"""Which node each rank sits on. Pure arithmetic on counts; Ray carries the result out.

The unit is a tensor group: the `tp` ranks of one (replica, pp, dp), which are never split over nodes. Groups are taken
in the order of their ranks, so that a replica's neighbours are neighbours on the machines too.
"""

from dataclasses import dataclass

from phalanx.parallel.mesh import Coordinate, MeshShape


@dataclass(frozen=True, slots=True)
class Seat:
    """Where a rank runs: `slot` counts the ranks of a node from 0 (its GPU on CUDA)."""

    replica: int
    rank: int
    coordinate: Coordinate
    node: int
    slot: int


def seat_ranks(shape: MeshShape, replicas: int, capacity: list[int], *, spread: bool) -> list[Seat]:
    """Seat every rank of every replica, replica by replica.

    Args:
        shape: of each replica's mesh.
        replicas: how many.
        capacity: tensor groups that each node has room for; together at least `replicas * pp * dp`.
        spread: share the groups evenly over the nodes (CPU: memory bandwidth is what counts); otherwise keep each
            replica on as few nodes as possible (GPU: links inside a node are the fast ones).
    """
    groups = shape.pp * shape.dp
    free = _even_shares(replicas * groups, capacity) if spread else list(capacity)
    used = [0] * len(capacity)
    seats = []
    for replica in range(replicas):
        whole = next((node for node, room in enumerate(free) if room >= groups), None)
        for group in range(groups):
            node = next(node for node, room in enumerate(free) if room > 0) if whole is None else whole
            for rank in range(group * shape.tp, (group + 1) * shape.tp):
                seats.append(Seat(replica, rank, shape.coordinate(rank), node, used[node]))
                used[node] += 1
            free[node] -= 1
    return seats


def _even_shares(groups: int, capacity: list[int]) -> list[int]:
    """Groups per node: one more for the emptiest node that has room, until all are given."""
    shares = [0] * len(capacity)
    for _ in range(groups):
        open_nodes = [node for node, room in enumerate(capacity) if shares[node] < room]
        shares[min(open_nodes, key=shares.__getitem__)] += 1
    return shares

"""Which expert-parallel ranks share a node. Pure; the engine makes it from Ray's node ids and sends it to the ranks."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class EpTopology:
    """The P ranks of an expert group (0 ... P-1) as (node, local).

    Attributes:
        nodes: ranks of each node, ascending; nodes may be of different sizes (after a loss) and ranks interleaved.
    """

    nodes: tuple[tuple[int, ...], ...]

    @classmethod
    def of_names(cls, names: Sequence[str]) -> "EpTopology":
        """From the node's name of each rank; nodes are numbered in the order in which they first appear."""
        order = list(dict.fromkeys(names))
        return cls(tuple(tuple(r for r, name in enumerate(names) if name == node) for node in order))

    @classmethod
    def uniform(cls, num_nodes: int, ranks_per_node: int) -> "EpTopology":
        """`num_nodes` nodes of consecutive ranks."""
        return cls(tuple(tuple(range(n * ranks_per_node, (n + 1) * ranks_per_node)) for n in range(num_nodes)))

    @cached_property
    def num_ranks(self) -> int:
        """P."""
        return sum(map(len, self.nodes))

    @property
    def num_nodes(self) -> int:
        """N."""
        return len(self.nodes)

    @cached_property
    def max_local(self) -> int:
        """G: ranks of the largest node."""
        return max(map(len, self.nodes))

    @cached_property
    def is_uniform(self) -> bool:
        """All nodes have G ranks."""
        return all(len(node) == self.max_local for node in self.nodes)

    @cached_property
    def node_of(self) -> tuple[int, ...]:
        """Node of each rank."""
        return self._places(0)

    @cached_property
    def local_of(self) -> tuple[int, ...]:
        """Index of each rank inside its node."""
        return self._places(1)

    def forwarder(self, source: int, node: int) -> int:
        """The rank of `node` that takes what `source` sends there: the one of equal local index, wrapped if ragged."""
        ranks = self.nodes[node]
        return ranks[self.local_of[source] % len(ranks)]

    def _places(self, which: int) -> tuple[int, ...]:
        place = {rank: (n, g) for n, ranks in enumerate(self.nodes) for g, rank in enumerate(ranks)}
        return tuple(place[rank][which] for rank in range(self.num_ranks))

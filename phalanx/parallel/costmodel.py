"""What an exchange of experts costs on a given network, so that the engine can choose a dispatcher per step. No torch.

    T_flat = o_x (P-G) + o_i (G-1) + L_x + max(inter bytes beta_x skew, intra bytes beta_i) + pack
    T_two  = [o_x (N-1) + L_x + inter bytes beta_x rail_skew] + [o_i (G-1) + L_i + intra bytes beta_i] + 2 pack
    T_ag   = the same two hops with everybody's rows, whose packing is copying alone

o is paid per message and never overlapped, L once per hop because all peers are posted at once, beta per byte; _x is
between nodes, _i inside one, _p what a rank does to the rows it sends: pack = t_p + bytes beta_p. Bytes follow from the
expected number of ranks and nodes that a token's experts lie on.

Exchanges in a row wait for the slowest rank of the one before, which no constant of single exchanges shows. So whole
layers of each kind are timed, too, and a prediction is read off the curve through (modelled, measured) seconds of its
kind. `phalanx/parallel/calibration.py` measures, `phalanx/parallel/cost_fit.py` finds constants and curves.

Source: LogGP (Alexandrov et al. 1995) with o as the occupancy of the sender; the rest is ours.
"""

from bisect import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from typing import Literal, NamedTuple

from phalanx.errors import ConfigError
from phalanx.parallel.topology import EpTopology

Kind = Literal["flat", "two_hop", "allgather"]
Phase = Literal["counts", "dispatch", "combine"]
KINDS: tuple[Kind, ...] = ("flat", "two_hop", "allgather")
PHASES: tuple[Phase, ...] = ("counts", "dispatch", "combine")
COUNT_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertTraffic:
    """What a layer's tokens make travel.

    Attributes:
        num_experts, top_k: of the layer.
        row_bytes: of a dispatched row.
        return_bytes: of a row on the way back.
        reduce_bytes: per token in the reduce-scatter of `allgather`.
        exact: outputs return one per (token, expert), not reduced on their way.
    """

    num_experts: int
    top_k: int
    row_bytes: int
    return_bytes: int
    reduce_bytes: int
    exact: bool = False

    @classmethod
    def of(cls, hidden_size: int, itemsize: int, num_experts: int, top_k: int, *, exact: bool) -> "ExpertTraffic":
        """Of unquantized rows of `hidden_size` values of `itemsize` bytes; slots and weights travel beside them."""
        payload = hidden_size * itemsize
        return cls(
            num_experts=num_experts,
            top_k=top_k,
            row_bytes=-(-(payload + 8 * top_k) // 16) * 16,
            return_bytes=payload,
            reduce_bytes=payload * top_k if exact else 4 * hidden_size,
            exact=exact,
        )


class Volume(NamedTuple):
    """Bytes that one rank sends in one phase, to other nodes and inside its own, and those it gathers for that."""

    inter: float
    intra: float
    packed: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LogGP:
    """Constants of a network in seconds and seconds per byte; `_x` between nodes, `_i` inside one, `_p` in a rank.

    Attributes:
        o_x, o_i: per message.
        L_x, L_i: per hop.
        beta_x, beta_i: per byte.
        t_p: to find out which rows go where in a hop.
        beta_p: per byte gathered into a send buffer.
    """

    o_x: float
    o_i: float
    L_x: float
    L_i: float
    beta_x: float
    beta_i: float
    t_p: float = 0.0
    beta_p: float = 0.0

    def predict(
        self,
        kind: Kind,
        topology: EpTopology,
        num_tokens: int,
        traffic: ExpertTraffic,
        *,
        phase: Phase | None = None,
        skew: float = 1.0,
        rail_skew: float = 1.0,
    ) -> float:
        """Seconds of one phase of a layer; None = counts, dispatch and combine together.

        Args:
            kind: of the dispatcher.
            topology: of the expert group; ragged nodes count as P / N ranks each.
            num_tokens: that each rank dispatches.
            traffic: of the layer.
            phase: one of them alone.
            skew: bytes that the busiest rank receives from other nodes over the mean, of `flat`: `receive_skew`.
            rail_skew: the same of `two_hop`, where it is that of a node.
        """
        if phase is None:
            return sum(
                self.predict(kind, topology, num_tokens, traffic, phase=each, skew=skew, rail_skew=rail_skew)
                for each in PHASES
            )
        if kind == "allgather" and phase == "counts":
            return 0.0
        num_nodes, num_local = topology.num_nodes, topology.num_ranks / topology.num_nodes
        inter, intra, packed = _volume(kind, phase, num_nodes, num_local, num_tokens, traffic)
        packs = 0 if phase == "counts" else {"flat": 1, "two_hop": 2, "allgather": 0}[kind]
        seconds = packs * self.t_p + packed * self.beta_p
        if kind == "flat":
            seconds += self.o_x * (num_nodes - 1) * num_local + self.o_i * (num_local - 1)
            seconds += self.L_x if num_nodes > 1 else self.L_i
            return seconds + max(inter * self.beta_x * skew, intra * self.beta_i)
        if num_nodes > 1:
            seconds += self.o_x * (num_nodes - 1) + self.L_x
            seconds += inter * self.beta_x * (rail_skew if kind == "two_hop" else 1.0)
        if num_local > 1:
            seconds += self.o_i * (num_local - 1) + self.L_i + intra * self.beta_i
        return seconds


class Layer(NamedTuple):
    """Modelled and measured seconds of one layer; a curve is some of them by rising modelled seconds."""

    modelled: float
    measured: float


Curves = Mapping[Kind, Sequence[Layer]]


def on_curve(seconds: float, curve: Sequence[Layer]) -> float:
    """What modelled seconds come to in fact: between two layers in a straight line, outside in proportion."""
    if not curve:
        return seconds
    above = bisect(curve, seconds, key=lambda layer: layer.modelled)
    if above in (0, len(curve)):
        nearest = curve[max(0, above - 1)]
        return seconds * nearest.measured / nearest.modelled
    low, high = curve[above - 1], curve[above]
    part = (seconds - low.modelled) / (high.modelled - low.modelled)
    return low.measured + part * (high.measured - low.measured)


def choose(
    constants: LogGP,
    topology: EpTopology,
    num_tokens: int,
    traffic: ExpertTraffic,
    *,
    kinds: Sequence[Kind] = KINDS,
    skew: float = 1.0,
    rail_skew: float = 1.0,
) -> Kind:
    """The kind that is cheapest for a whole layer; the first of equals. Arguments as of `LogGP.predict`."""
    return min(
        kinds,
        key=lambda kind: constants.predict(kind, topology, num_tokens, traffic, skew=skew, rail_skew=rail_skew),
    )


def costs_from(fabric: Sequence[float], traffic: ExpertTraffic) -> Callable[[int, EpTopology], dict[str, float]]:
    """(tokens per rank, topology) -> seconds of a layer's exchanges per kind.

    Args:
        fabric: as `fabric_of` and so `calibration.measure` return it.
        traffic: of the model's layers.

    Raises:
        ConfigError: no such list.
    """
    names = [each.name for each in fields(LogGP)]
    num_layers, rest = divmod(len(fabric) - len(names), 2 * len(KINDS))
    if num_layers < 0 or rest:
        raise ConfigError(
            f"{len(fabric)} network constants, not the {len(names)} {', '.join(names)} and {2 * len(KINDS)} per layer; "
            "take the list from calibration.measure"
        )
    constants = LogGP(**dict(zip(names, fabric[: len(names)], strict=True)))
    pairs = [Layer(*fabric[at : at + 2]) for at in range(len(names), len(fabric), 2)]
    curves = {kind: pairs[at * num_layers : (at + 1) * num_layers] for at, kind in enumerate(KINDS)}

    def costs(num_tokens: int, topology: EpTopology) -> dict[str, float]:
        return {kind: on_curve(constants.predict(kind, topology, num_tokens, traffic), curves[kind]) for kind in KINDS}

    return costs


def fabric_of(constants: LogGP, curves: Curves | None = None) -> list[float]:
    """Constants and curves, which are equally long, as a list for the wire; the inverse is in `costs_from`."""
    layers = [value for kind in KINDS for layer in curves[kind] for value in layer] if curves else []
    return [*astuple(constants), *layers]


def expected_hits(num_groups: float, num_experts: int, top_k: int) -> float:
    """Mean number of equal groups of experts that `top_k` different experts, drawn evenly, fall into.

    g (1 - C(E - E/g, K) / C(E, K)), also for groups of less than one expert.
    """
    group = num_experts / num_groups
    missed = 1.0
    for drawn in range(top_k):
        missed *= max(0.0, num_experts - group - drawn) / (num_experts - drawn)
    return num_groups * (1.0 - missed)


def _volume(
    kind: Kind, phase: Phase, num_nodes: int, num_local: float, num_tokens: int, traffic: ExpertTraffic
) -> Volume:
    num_ranks = num_nodes * num_local
    other_nodes, other_ranks = 1 - 1 / num_nodes, 1 - 1 / num_local
    if kind == "allgather":
        row = num_tokens * (traffic.row_bytes if phase == "dispatch" else traffic.reduce_bytes)
        return Volume((num_nodes - 1) * row, (num_ranks - num_nodes) * row, (num_nodes + num_ranks) * row)
    if phase == "counts":
        inside = COUNT_BYTES * (num_local - 1)
        if kind == "flat":
            return Volume(COUNT_BYTES * (num_ranks - num_local), inside, 0.0)
        return Volume(COUNT_BYTES * (1 + num_local) * (num_nodes - 1), inside, 0.0)
    row = traffic.row_bytes if phase == "dispatch" else traffic.return_bytes
    to_ranks = row * num_tokens * expected_hits(num_ranks, traffic.num_experts, traffic.top_k)
    to_nodes = row * num_tokens * expected_hits(num_nodes, traffic.num_experts, traffic.top_k)
    if phase == "combine" and traffic.exact:
        to_ranks = to_nodes = row * num_tokens * traffic.top_k
    if kind == "flat":
        return Volume(to_ranks * other_nodes, to_ranks * (num_local - 1) / num_ranks, to_ranks)
    return Volume(to_nodes * other_nodes, to_ranks * other_ranks, to_nodes + to_ranks)

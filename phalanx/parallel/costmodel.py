"""What an exchange of experts costs on a given network, so that the engine can choose a dispatcher per step. No torch.

    T_flat = o_x (P-G) + o_i (G-1) + L_x + max(inter bytes beta_x skew, intra bytes beta_i) + pack
    T_two  = [o_x (N-1) + L_x + inter bytes beta_x rail_skew] + [o_i (G-1) + L_i + intra bytes beta_i] + 2 pack
    T_ag   = the same two hops with everybody's rows, whose packing is copying alone

o is paid per message and never overlapped, L once per hop because all peers are posted at once, beta per byte; _x is
between nodes, _i inside one, _p what a rank does to the rows it sends: pack = t_p + bytes beta_p. Bytes follow from the
expected number of ranks and nodes that a token's experts lie on.

Source: LogGP (Alexandrov et al. 1995) with o as the occupancy of the sender; the rest is ours.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from itertools import combinations
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from phalanx.errors import ConfigError
from phalanx.parallel.topology import EpTopology

Kind = Literal["flat", "two_hop", "allgather"]
Phase = Literal["counts", "dispatch", "combine"]
KINDS: tuple[Kind, ...] = ("flat", "two_hop", "allgather")
PHASES: tuple[Phase, ...] = ("counts", "dispatch", "combine")
COUNT_BYTES = 4


class Sample(NamedTuple):
    """One timed exchange, as the slowest rank saw it.

    Attributes:
        tier: between nodes, inside one, or "pack": rows gathered into a send buffer, no exchange.
        num_messages: that each rank sent.
        num_bytes: that each rank sent or gathered, all messages together.
        seconds: from its begin to the last arrival.
    """

    tier: Literal["inter", "intra", "pack"]
    num_messages: int
    num_bytes: int
    seconds: float


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
        volume = _volume(kind, phase, num_nodes, num_local, num_tokens, traffic)
        packs = 0 if phase == "counts" else {"flat": 1, "two_hop": 2, "allgather": 0}[kind]
        packing = packs * self.t_p + volume.packed * self.beta_p
        if kind == "flat":
            seconds = self.o_x * (num_nodes - 1) * num_local + self.o_i * (num_local - 1)
            seconds += self.L_x if num_nodes > 1 else self.L_i
            return seconds + max(volume.inter * self.beta_x * skew, volume.intra * self.beta_i) + packing
        seconds = packing
        if num_nodes > 1:
            seconds += self.o_x * (num_nodes - 1) + self.L_x
            seconds += volume.inter * self.beta_x * (rail_skew if kind == "two_hop" else 1.0)
        if num_local > 1:
            seconds += self.o_i * (num_local - 1) + self.L_i + volume.intra * self.beta_i
        return seconds


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
        fabric: fields of a `LogGP` in order, as `calibration.measure` returns them.
        traffic: of the model's layers.

    Raises:
        ConfigError: not the fields of a `LogGP`.
    """
    names = [each.name for each in fields(LogGP)]
    if len(fabric) != len(names):
        raise ConfigError(f"{len(fabric)} network constants, not the {len(names)} {', '.join(names)}")
    constants = LogGP(**dict(zip(names, fabric, strict=True)))
    return lambda num_tokens, topology: {kind: constants.predict(kind, topology, num_tokens, traffic) for kind in KINDS}


def fabric_of(constants: LogGP) -> list[float]:
    """The constants as a list for the wire; the inverse is in `costs_from`."""
    return list(astuple(constants))


def expected_hits(num_groups: float, num_experts: int, top_k: int) -> float:
    """Mean number of equal groups of experts that `top_k` different experts, drawn evenly, fall into.

    g (1 - C(E - E/g, K) / C(E, K)), also for groups of less than one expert.
    """
    group = num_experts / num_groups
    missed = 1.0
    for drawn in range(top_k):
        missed *= max(0.0, num_experts - group - drawn) / (num_experts - drawn)
    return num_groups * (1.0 - missed)


def calibrate(samples: Iterable[Sample]) -> LogGP:
    """Constants from timed exchanges, by least squares of the relative error, none of them negative.

    A tier without samples (one node, or nodes of one rank) gets the constants of the other one; without "pack" samples
    packing is free. Where all samples of a tier have the same number of messages, o and L cannot be told apart: then
    it is L.

    Raises:
        ConfigError: nothing was timed between ranks.
    """
    samples = list(samples)
    tiers = {tier: [sample for sample in samples if sample.tier == tier] for tier in ("inter", "intra")}
    if not any(tiers.values()):
        raise ConfigError("no exchange between ranks was timed; calibrate in a group of at least two")
    inter, intra = (_fit(tiers[tier] or tiers[other]) for tier, other in (("inter", "intra"), ("intra", "inter")))
    packs = [sample for sample in samples if sample.tier == "pack"]
    _, t_p, beta_p = _fit(packs) if packs else (0.0, 0.0, 0.0)
    return LogGP(
        o_x=inter[0],
        L_x=inter[1],
        beta_x=inter[2],
        o_i=intra[0],
        L_i=intra[1],
        beta_i=intra[2],
        t_p=t_p,
        beta_p=beta_p,
    )


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


def _fit(samples: Sequence[Sample]) -> tuple[float, float, float]:
    """(o, L, beta) of a tier: the best of all subsets of columns whose solution is nowhere negative."""
    measured = np.array([sample.seconds for sample in samples])
    columns = np.array([[sample.num_messages, 1.0, sample.num_bytes] for sample in samples])
    relative = columns / measured[:, None]
    if len({sample.num_messages for sample in samples}) == 1:
        relative[:, 0] = 0.0
    best, least = np.zeros(3), float("inf")
    for size in (1, 2, 3):
        for chosen in map(list, combinations(range(3), size)):
            solution = _solve(relative, chosen)
            error = float(((relative @ solution - 1.0) ** 2).sum())
            if (solution >= 0).all() and error < least:
                best, least = solution, error
    return float(best[0]), float(best[1]), float(best[2])


def _solve(relative: NDArray[np.float64], chosen: list[int]) -> NDArray[np.float64]:
    solution = np.zeros(3)
    scale = np.abs(relative[:, chosen]).max(axis=0)
    scale[scale == 0] = 1.0
    solution[chosen] = np.linalg.lstsq(relative[:, chosen] / scale, np.ones(len(relative)), rcond=None)[0] / scale
    return solution

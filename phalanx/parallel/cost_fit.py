"""The constants of the cost model from what was timed: least squares with a few columns. No torch."""

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from phalanx.errors import ConfigError
from phalanx.parallel.costmodel import KINDS, ExpertTraffic, Kind, Layer, LogGP
from phalanx.parallel.topology import EpTopology


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


class LayerSample(NamedTuple):
    """The exchanges of a layer, timed as a whole, as the slowest rank saw them."""

    kind: Kind
    topology: EpTopology
    num_tokens: int
    traffic: ExpertTraffic
    seconds: float


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


def curves_of(constants: LogGP, layers: Sequence[LayerSample]) -> dict[Kind, list[Layer]]:
    """The curve of every kind; `layers` are of the same sizes for all."""
    curves: dict[Kind, list[Layer]] = {kind: [] for kind in KINDS}
    for layer in layers:
        modelled = constants.predict(layer.kind, layer.topology, layer.num_tokens, layer.traffic)
        curves[layer.kind].append(Layer(modelled, layer.seconds))
    return {kind: sorted(curve) for kind, curve in curves.items()}


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

"""Dispatchers on the ranks of a lab: rounds of dispatch and combine, timed and counted. For `benchmarks/alltoall.py`.

A round is one dispatch and one combine of random rows, begun by all ranks at the same instant, and lasts until the last
rank has its result, which is checked. Ranks run at real-time priority where that is allowed, so that other load on the
machine is not what is measured.
"""

import contextlib
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import TCPStore

from phalanx import plugins
from phalanx.moe.dispatch.dispatcher import DispatchConfig, Dispatched, Dispatcher
from phalanx.moe.probe import Probe
from phalanx.parallel import calibration, membership
from phalanx.parallel.costmodel import ExpertTraffic
from phalanx.parallel.topology import EpTopology
from phalanx.parallel.traffic import CountingTransport, Traffic
from phalanx.parallel.transport import AllToAll, Exchange, Transport, run
from tests.netlab.emulator import LinkSpec
from tests.netlab.lab import Lab, Node
from tests.netlab.namespaces import DEVICE
from tests.support.ranks import run_ranks

HIDDEN = 512
STORE_PORT = 29500
AHEAD_S = 0.02
"""From the moment the last rank is ready until all begin: longer than the news of it takes."""

WARM_UP = 3
TRAFFIC_ROUNDS = 5
KINDS = ("flat", "two_hop", "allgather")


@dataclass(frozen=True)
class Setting:
    """Hosts, what joins them, and the layer: experts and how many of them a token takes."""

    num_nodes: int
    ranks_per_node: int
    link: LinkSpec
    num_experts: int = 32
    top_k: int = 4

    @property
    def topology(self) -> EpTopology:
        """Of the expert group, which is all ranks."""
        return EpTopology.uniform(self.num_nodes, self.ranks_per_node)

    @property
    def traffic(self) -> ExpertTraffic:
        """Of the layer, with rows of `HIDDEN` floats."""
        return ExpertTraffic.of(HIDDEN, 4, self.num_experts, self.top_k, exact=False)

    def __str__(self) -> str:
        parts = [f"{self.num_nodes} x {self.ranks_per_node} ranks"]
        if self.link.rate:
            parts.append(f"{self.link.rate * 8e-6:.0f} Mbit/s")
        if self.link.delay_s:
            parts.append(f"{self.link.delay_s * 1e3:g} ms")
        if self.link.packet_s:
            parts.append(f"{self.link.packet_s * 1e3:g} ms per packet")
        return ", ".join([*parts, f"{self.num_experts} experts, top {self.top_k}"])


@dataclass(frozen=True)
class Case:
    """What a round does: `tokens` per rank through one dispatcher."""

    kind: str
    tokens: int
    dedup: bool = True

    def __str__(self) -> str:
        return self.kind if self.dedup else f"{self.kind}, no de-duplication"


class Rank:
    """One member of the group: its dispatcher, its rows, and what must come back."""

    def __init__(self, setting: Setting, case: Case, rank: int, transport: Transport) -> None:
        self._transport, self._case = transport, case
        slots_per_rank = setting.num_experts // setting.topology.num_ranks
        self._first_slot = rank * slots_per_rank
        config = DispatchConfig(
            topology=setting.topology,
            rank=rank,
            slots_per_rank=slots_per_rank,
            top_k=setting.top_k,
            hidden_size=HIDDEN,
            dtype=torch.float32,
            dedup=case.dedup,
        )
        self._dispatcher: Dispatcher = plugins.load("moe/dispatch", case.kind, ("DISPATCHER",)).DISPATCHER(config)
        generator = torch.Generator().manual_seed(1000 * case.tokens + rank)
        self._x_TD = torch.randn((case.tokens, HIDDEN), generator=generator)
        order_TE = torch.rand((case.tokens, setting.num_experts), generator=generator).argsort(1)
        self._slots_TK = order_TE[:, : setting.top_k].to(torch.int32).contiguous()
        self._weights_TK = torch.rand((case.tokens, setting.top_k), generator=generator)
        # Expert e multiplies by e + 1.
        self._expected_TD = self._x_TD * (self._weights_TK * (self._slots_TK + 1)).sum(1, keepdim=True)

    def round(self) -> Tensor:
        """One dispatch and one combine; (T, D)."""
        return run(self._exchange(), self._transport)

    def check(self, out_TD: Tensor) -> None:
        """Refuse a wrong result."""
        if not torch.allclose(out_TD, self._expected_TD, rtol=1e-4, atol=1e-2):
            worst = float((out_TD - self._expected_TD).abs().max())
            raise AssertionError(f"a result is wrong by {worst:.3g}: {self._case}")

    def _exchange(self) -> Exchange[Tensor]:
        rows: Dispatched = yield from self._dispatcher.dispatch(
            self._x_TD, self._slots_TK, self._weights_TK, self._case.tokens
        )
        factor_R1 = (rows.weights_RK * (rows.slots_RK + self._first_slot + 1)).sum(1, keepdim=True)
        return (yield from self._dispatcher.combine(rows.x_RD * factor_R1, rows.handle))


def measure(
    rank: int, nodes: tuple[Node, ...], setting: Setting, cases: Sequence[Case], rounds: int, calibrated: bool
) -> tuple[list[list[float]], list[tuple[int, int]], list[float]]:
    """On one rank.

    Returns:
        Per case the seconds of each round from the common start to this rank's result; per case the messages of a
        round and the bytes that went to other nodes; the constants of the cost model if `calibrated`.
    """
    nodes[rank // setting.ranks_per_node].enter()
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))  # below the emulator
    store = TCPStore(nodes[0].address, STORE_PORT, is_master=rank == 0)
    group = membership.build(
        store,
        prefix="alltoall",
        generation=0,
        topology=setting.topology,
        rank=rank,
        device=torch.device("cpu"),
        timeout_s=60,
        interface=DEVICE,
    )
    probe = Probe(setting.traffic, HIDDEN, torch.float32, torch.device("cpu"))
    fabric = calibration.measure(group.transport, setting.traffic, probe.layer) if calibrated else []
    traffic = Traffic(setting.topology)
    counting = CountingTransport(group.transport, traffic)
    sides = [Rank(setting, case, rank, counting) for case in cases]
    seconds: list[list[float]] = [[] for _ in cases]
    sent = [(0, 0) for _ in cases]
    for _ in range(rounds):
        for index, side in enumerate(sides):
            began = common_start(group.transport)
            out_TD = side.round()
            seconds[index].append(time.monotonic() - began)
            side.check(out_TD)
            away = traffic.bytes_of(rank, "inter") + traffic.bytes_of(rank, "inter", kind="counts")
            sent[index] = (traffic.messages_of(rank), away)
            traffic.clear()
    common_start(group.transport)  # nobody leaves while another still receives
    group.destroy()
    return seconds, sent, fabric


def common_start(transport: Transport) -> float:
    """Wait until an instant that is the same for all ranks; all hosts are one machine and share its clock."""
    num_ranks = transport.topology.num_ranks
    now = torch.full((num_ranks, 1), time.monotonic(), dtype=torch.float64)
    everybody = transport.start(AllToAll("flat", now, (1,) * num_ranks, (1,) * num_ranks)).wait()
    start = float(everybody.max()) + AHEAD_S
    time.sleep(max(0.0, start - time.monotonic()))
    return start


class Measured(NamedTuple):
    """Of all ranks: per case the median seconds of a round, the busiest rank's messages, bytes per node; constants."""

    seconds: list[float]
    messages: list[int]
    node_bytes: list[float]
    fabric: list[float]


def on_ranks(lab: Lab, setting: Setting, cases: Sequence[Case], rounds: int, *, calibrated: bool = False) -> Measured:
    """`measure` on all ranks; the first rounds do not count for the time."""
    world_size = setting.topology.num_ranks
    results = run_ranks(world_size, measure, lab.nodes, setting, cases, rounds, calibrated, timeout_s=600)
    measured = Measured([], [], [], results[0][2])
    for index in range(len(cases)):
        per_round = zip(*(result[0][index] for result in results), strict=True)
        slowest = [max(of_ranks) for of_ranks in per_round][WARM_UP:]
        measured.seconds.append(statistics.median(slowest) if slowest else 0.0)
        messages, num_bytes = zip(*(result[1][index] for result in results), strict=True)
        measured.messages.append(max(messages))
        measured.node_bytes.append(sum(num_bytes) / setting.num_nodes)
    return measured


def emulated_bytes(lab: Lab, setting: Setting, case: Case) -> float:
    """Mean bytes that a node sends to others in a round: of a run with rounds, less those of a run without."""
    totals = []
    for rounds in (0, TRAFFIC_ROUNDS):
        lab.counters(reset=True)
        on_ranks(lab, setting, [case], rounds)
        totals.append(lab.counters().total_bytes)
    return (totals[1] - totals[0]) / TRAFFIC_ROUNDS / setting.num_nodes

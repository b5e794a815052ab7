"""The process groups of one generation of an expert group, built beside older generations that go on serving."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, Store  # type: ignore[attr-defined]  # not in its __all__

from phalanx.errors import ConfigError, ReplicaLostError
from phalanx.parallel.topology import EpTopology
from phalanx.parallel.torch_transport import Sending, TorchTransport
from phalanx.parallel.transport import Hop, peers

HOPS: tuple[Hop, ...] = ("flat", "rail", "node")
MakeBackend = Callable[[Store, int, int], Any]


class Transfer(NamedTuple):
    """One end of a row's way.

    Attributes:
        row: (n,) contiguous uint8, n at least 8; what is sent, which must not change meanwhile, or what is filled.
        peer: rank in the expert group, another one.
        tag: the same at both ends, of one transfer between them.
        is_send: which end this is.
    """

    row: Tensor
    peer: int
    tag: int
    is_send: bool


class Moving:
    """A row under way; keep it until the row has arrived at the other end."""

    def __init__(self, sending: Sending, is_done: Callable[[], bool]) -> None:
        self._sending, self._is_done = sending, is_done

    def is_done(self) -> bool:
        """Whether `wait` returns at once; of rows sent over gloo it is never known."""
        return self._is_done()

    def wait(self) -> Tensor:
        """The row; on CUDA the current stream waits, not the host.

        Raises:
            ReplicaLostError: the peer is gone or late.
        """
        return self._sending.wait()


class Mover:
    """Point-to-point rows on a communicator of its own, for expert migration beside the exchanges.

    gloo matches by tag and offers no way to ask whether a row has come: its last 8 bytes are `ABSENT` until then, so a
    row that ends in them is seen by `wait` alone. NCCL ignores tags and matches in order: both ends of all transfers
    must be begun in one global order, as plan items are; those of one call are one launch.
    """

    ABSENT = 0x5EED_0F_AB5E_17_C0DE
    """Unlike the end of any row that its owner seals."""

    def __init__(self, rank: int, group: dist.ProcessGroup | None) -> None:
        self.rank = rank
        self._group = group

    def begin(self, transfers: Sequence[Transfer]) -> list[Moving]:
        """Begin to send and to receive; nothing waits.

        Raises:
            ReplicaLostError: a peer is gone.
        """
        if not transfers:
            return []
        for row, *_ in transfers:
            assert row.dtype == torch.uint8, f"{row.dtype} row; view it as torch.uint8"
            assert row.is_contiguous(), f"row with strides {row.stride()}"
        if self._group is None:
            raise ReplicaLostError(f"rank {self.rank} has no group to move rows in: it is alone, or was destroyed")
        try:
            begin = self._begin_together if transfers[0].row.is_cuda else self._begin_each
            return begin(self._group, transfers)
        except RuntimeError as error:
            raise ReplicaLostError(f"rank {self.rank}: rows could not begin to move: {error}") from error

    def close(self) -> None:
        """Let go of the group; later calls raise `ReplicaLostError`."""
        self._group = None

    def _begin_each(self, group: dist.ProcessGroup, transfers: Sequence[Transfer]) -> list[Moving]:
        moving = []
        for transfer in transfers:
            row, peer, tag, is_send = transfer
            end = row.numpy()[-8:]
            if not is_send:
                end[:] = np.frombuffer(self.ABSENT.to_bytes(8, "little"), np.uint8)
            work = (group.send if is_send else group.recv)([row], peer, tag)
            sending = Sending(work.wait, f"rank {self.rank}, tag {tag}, rank {peer}", row)
            moving.append(Moving(sending, _never if is_send else partial(_has_come, end)))
        return moving

    def _begin_together(self, group: dist.ProcessGroup, transfers: Sequence[Transfer]) -> list[Moving]:
        device = transfers[0].row.device
        group._start_coalescing(device)
        for row, peer, tag, is_send in transfers:
            (group.send if is_send else group.recv)([row], peer, tag)
        work = group._end_coalescing(device)
        where = f"rank {self.rank}, tags {[transfer.tag for transfer in transfers]}"
        return [Moving(Sending(work.wait, where, transfer.row), work.is_completed) for transfer in transfers]


def _never() -> bool:
    return False


def _has_come(end: NDArray[np.uint8]) -> bool:
    return end.tobytes() != Mover.ABSENT.to_bytes(8, "little")


@dataclass(slots=True)
class Membership:
    """Who is in the expert group, and how this rank reaches them; `build` makes it.

    After a `ReplicaLostError` destroy it at once: a rank that does not exchange with the lost one itself waits for the
    survivors, and learns of the loss when their connections close.

    Attributes:
        generation: counts the sets of ranks, up.
        topology: P ranks on their nodes.
        rank: of this process, 0 ... P-1; may differ between generations.
        transport: for dispatchers.
        mover: for expert rows.
    """

    generation: int
    topology: EpTopology
    rank: int
    transport: TorchTransport
    mover: Mover
    _abort: list[Callable[[], None]]

    def destroy(self) -> None:
        """Close its connections and end its threads; other generations are not touched. May be called again.

        A `Sending` or an error of this generation that somebody keeps may keep connections open until it is dropped.
        Waits for exchanges of this rank that are still under way, at most for the timeout of the groups.
        """
        self.transport.close()
        self.mover.close()
        # gloo closes when the last reference goes; NCCL is told to, and does not wait for peers that may be gone.
        while self._abort:
            self._abort.pop()()


def build(
    store: Store,
    *,
    prefix: str,
    generation: int,
    topology: EpTopology,
    rank: int,
    device: torch.device,
    timeout_s: float,
    interface: str | None = None,
) -> Membership:
    """Meet the other ranks of a generation; returns when all have come. Any thread, beside groups in use.

    At most four groups: flat, rail, node (ranks alike share one) and one for moves. On CUDA their communicators come up
    here: later a rank alone may be the first to use one.

    Args:
        store: reached by all of them; a connection of its own is opened to it.
        prefix: of the keys, for example "ep/<incarnation>". Prefix and generation are used once, also after a failure.
        generation: of these groups.
        topology: the same on every rank.
        rank: of this process in it.
        device: a CPU device meets over gloo, a CUDA device over NCCL.
        timeout_s: of this meeting and of every later exchange.
        interface: network interface for gloo, for example "eth0"; None = `GLOO_SOCKET_IFNAME`, else from the host name.

    Raises:
        ConfigError: the rank is not in the topology, the interface does not exist, or this rank has met under this
            prefix and generation before.
        ReplicaLostError: not everybody came in time; names those who did not. Older groups are as before.
    """
    if not 0 <= rank < topology.num_ranks:
        raise ConfigError(f"rank {rank} is outside an expert group of {topology.num_ranks} ranks")
    own: dict[Hop, dist.ProcessGroup] = {}
    if topology.num_ranks == 1:
        return Membership(generation, topology, rank, TorchTransport(topology, rank, own), Mover(rank, None), [])
    deadline = time.monotonic() + timeout_s
    # Moves have an event loop of their own: reading a large row would hold up the small messages of an exchange.
    make, make_move = (_nccl(timeout_s) if device.type == "cuda" else _gloo(timeout_s, interface) for _ in range(2))
    made: dict[tuple[int, ...], dist.ProcessGroup] = {}
    where = f"{prefix}/{generation}"
    try:
        meeting = PrefixStore(where, store.clone())  # type: ignore[attr-defined]
        _arrive(meeting, topology.num_ranks, rank, where, deadline)
        for hop in HOPS:
            members = peers(topology, rank, hop)
            if len(members) > 1 and members not in made:
                made[members] = _group(meeting, f"{hop}{members[0]}", members, rank, device, make)
            if len(members) > 1:
                own[hop] = made[members]
        move = _group(meeting, "move", tuple(range(topology.num_ranks)), rank, device, make_move)
        if device.type == "cuda":
            _connect([*(group for _, group in sorted(made.items())), move], device)
    except RuntimeError as error:  # the base of all errors of torch.distributed
        # The traceback holds this frame, and through it connections that others wait on.
        made.clear()
        own.clear()
        raise ReplicaLostError(f"rank {rank} of {where}: not all groups could be made: {error}") from error
    abort = [group.abort for group in (*made.values(), move)] if device.type == "cuda" else []
    return Membership(generation, topology, rank, TorchTransport(topology, rank, own), Mover(rank, move), abort)


def _connect(groups: Sequence[dist.ProcessGroup], device: torch.device) -> None:
    """Exchange a number in each group, in the same order on every rank."""
    for group in groups:
        group.allreduce([torch.zeros(1, device=device)]).wait()
    torch.cuda.current_stream(device).synchronize()


def _arrive(meeting: Store, num_ranks: int, rank: int, where: str, deadline: float) -> None:
    """Say that this rank is here, and wait for the others: whoever is missing is known by name before gloo waits."""
    if meeting.add(f"here/{rank}", 1) > 1:
        raise ConfigError(f"rank {rank} has met under {where} before; use another prefix or generation")
    keys = [f"here/{other}" for other in range(num_ranks)]
    try:
        meeting.wait(keys, timedelta(seconds=max(0.001, deadline - time.monotonic())))
    except dist.DistStoreError as error:
        missing = [other for other, key in enumerate(keys) if not meeting.check([key])]
        raise ReplicaLostError(f"ranks {missing} of {where} did not come in time; rank {rank} gives up") from error


def _nccl(timeout_s: float) -> MakeBackend:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=timeout_s)
    return lambda store, rank, size: dist.ProcessGroupNCCL(store, rank, size, options)


def _gloo(timeout_s: float, interface: str | None) -> MakeBackend:
    """The groups that it makes share one gloo device, that is one event loop and listening socket."""
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timedelta(seconds=timeout_s)
    # Exchanges of one group follow one another: a second thread per group would only sleep.
    options._threads = 1
    try:
        if interface is None:
            options._devices = [ProcessGroupGloo.create_default_device()]
        else:
            options._devices = [ProcessGroupGloo.create_device(interface=interface)]
    except RuntimeError as error:
        raise ConfigError(f"cannot use network interface {interface!r}: {error}; name one of this machine") from error
    return lambda store, rank, size: ProcessGroupGloo(store, rank, size, options)


def _group(
    meeting: Store, name: str, members: tuple[int, ...], rank: int, device: torch.device, make: MakeBackend
) -> dist.ProcessGroup:
    """A process group that works with the functions of torch.distributed without a default group."""
    store = PrefixStore(name, meeting)
    here, size = members.index(rank), len(members)
    kind = dist.ProcessGroup.BackendType.NCCL if device.type == "cuda" else dist.ProcessGroup.BackendType.GLOO
    group = dist.ProcessGroup(store, here, size)
    group._register_backend(torch.device(device.type), kind, make(store, here, size))
    group._set_default_backend(kind)
    return group

"""Expert rows on their way to and from this rank, beside its steps: begun with one step, looked at after each.

    slot of another rank --(sealed copy)--> staging row here --(flip)--> slot here

Everything runs in the rank's own thread and nothing waits. A thread of its own would fight the steps for the
interpreter's lock and, on a machine without spare cores, for a core: it took five times as much of them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from phalanx.errors import ReplicaLostError
from phalanx.kernels import memory
from phalanx.kernels.row_seal import SEAL_BYTES, is_sound, seal
from phalanx.parallel.membership import Mover, Moving, Transfer
from phalanx.runtime.pending_result import to_host
from phalanx.runtime.plan import Move


class RowTask(NamedTuple):
    """This rank's end of a move.

    Attributes:
        move: of the plan.
        expert: logical number of what moves.
        row: in its slot here; or the layer's rows are so wide.
        peer: sends the row here, or receives it, as `is_source` says.
    """

    move: Move
    expert: int
    row: Tensor
    peer: int
    is_source: bool


class RowTransfers:
    """The staging rows, and what is under way.

    Args:
        staging_rows: how many.
        row_bytes: of the widest layer.
        device: of the weights.
    """

    def __init__(self, staging_rows: int, row_bytes: int, device: torch.device) -> None:
        width = -(-(row_bytes + SEAL_BYTES) // 8) * 8
        self._staging = memory.empty((staging_rows, width), torch.uint8, device)
        self._sent: dict[int, list[Moving]] = {}
        self._arriving: list[_Arrival] = []

    @property
    def num_staging_rows(self) -> int:
        """Which a move may name."""
        return len(self._staging)

    def staged(self, index: int, row_bytes: int) -> Tensor:
        """A row that has arrived."""
        return self._staging[index, :row_bytes]

    def begin(self, tasks: Sequence[RowTask], mover: Mover) -> None:
        """Begin the moves of a step, in plan order.

        Raises:
            ReplicaLostError: a peer is gone.
        """
        transfers = [Transfer(self._sealed(task), task.peer, task.move.id, task.is_source) for task in tasks]
        for task, transfer, moving in zip(tasks, transfers, mover.begin(transfers), strict=True):
            if task.is_source:
                self._sent.setdefault(task.move.layer, []).append(moving)
            else:
                self._arriving.append(_Arrival(task, transfer.row, moving))

    def finished(self) -> tuple[list[int], list[int]]:
        """Ids of moves whose row has arrived here since the last call: sound ones, damaged ones."""
        done: list[int] = []
        failed: list[int] = []
        waiting = []
        for arrival in self._arriving:
            try:
                verdict = arrival.look()
            except ReplicaLostError:
                continue  # steps fail, too, and say so
            if verdict is None:
                waiting.append(arrival)
            else:
                (done if verdict else failed).append(arrival.task.move.id)
        self._arriving = waiting
        return done, failed

    def flipped(self, layer: int) -> None:
        """A layer's rows have all arrived, those sent from here too: their copies can go."""
        self._sent.pop(layer, None)

    def clear(self) -> None:
        """Forget everything under way: the groups are closed."""
        self._sent.clear()
        self._arriving.clear()

    def _sealed(self, task: RowTask) -> Tensor:
        """What is sent, or where it is received: the seal travels with the row, a second message would cost more."""
        if task.is_source:
            return seal(task.row, task.expert, task.move.layer)
        return self._staging[task.move.staging, : task.row.shape[0] + SEAL_BYTES]


class _Arrival:
    """A row that comes; on CUDA its verdict takes a while, too."""

    def __init__(self, task: RowTask, sealed: Tensor, moving: Moving) -> None:
        self.task, self._sealed, self._moving = task, sealed, moving
        self._verdict: Tensor | None = None
        self._event: torch.cuda.Event | None = None

    def look(self) -> bool | None:
        """Whether the row is sound; None = not known yet."""
        if self._verdict is None:
            if not self._moving.is_done():
                return None
            self._moving.wait()
            self._verdict = to_host(is_sound(self._sealed, self.task.expert, self.task.move.layer))
            if self._sealed.is_cuda:
                self._event = torch.cuda.Event()
                self._event.record()
        if self._event is not None and not self._event.query():
            return None
        return bool(self._verdict)

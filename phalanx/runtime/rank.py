"""The program of a rank: dial the engine, load, then execute plans until the link ends.

Run as `python -m phalanx.runtime.rank` by the process executor (the bootstrap comes on stdin), or inside a Ray actor.
"""

import contextlib
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

import msgspec

from phalanx.errors import ReplicaLostError
from phalanx.runtime import plan, rank_link

if TYPE_CHECKING:
    from phalanx.runtime.pending_result import PendingResult
    from phalanx.runtime.worker import Worker

PING_S = 0.5


class Bootstrap(msgspec.Struct, frozen=True):
    """What a rank needs to dial its engine, and what it knows of its own machine.

    Attributes:
        interface: network interface of collectives here; "" = as the `RankSpec` says.
    """

    address: str
    key: bytes
    rank: int
    node: str = ""
    log_path: str = ""
    interface: str = ""


def serve(bootstrap: Bootstrap, started: float | None = None) -> None:
    """Be one rank; returns when the engine closes the link, raises what made the rank fail.

    Args:
        bootstrap: where the engine is.
        started: `time.monotonic()` when the process began, for the start-up breakdown.
    """
    begun = time.monotonic() if started is None else started
    connection = rank_link.connect(bootstrap.address, bootstrap.key, bootstrap.rank, _node(bootstrap))
    # The engine's end can vanish at any moment: nothing to answer then, the process just ends.
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            _run(connection, bootstrap, begun)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise
        except BaseException:
            failure = plan.RankFailed(bootstrap.rank, _node(bootstrap), bootstrap.log_path, _describe())
            connection.send_bytes(plan.encode(failure))
            raise


def _run(connection: Connection, bootstrap: Bootstrap, begun: float) -> None:
    # Imported here: torch takes seconds, and the engine should see a rank that dialled at once.
    import torch

    from phalanx.parallel import rendezvous
    from phalanx.runtime.rank_spec import decode_spec
    from phalanx.runtime.worker import Worker, warm_up

    spec = decode_spec(connection.recv_bytes(rank_link.MAX_MESSAGE_BYTES))
    spec = msgspec.structs.replace(spec, interface=bootstrap.interface or spec.interface)
    imported = time.monotonic()
    if spec.num_threads:
        torch.set_num_threads(spec.num_threads)
    device = (
        torch.device(spec.device, spec.rank % torch.cuda.device_count())
        if spec.device == "cuda"
        else torch.device("cpu")
    )
    place = spec.shape.rank(spec.pp_rank, spec.dp_rank, spec.tp_rank)
    if spec.store:
        mesh = rendezvous.join(
            spec.shape,
            place,
            spec.store,
            device=device,
            timeout_s=spec.timeout_s,
            interface=spec.interface or None,
            unit=spec.unit,
        )
    else:
        mesh = rendezvous.single(device)
    met = time.monotonic()
    sender = Sender(connection, spec.rank)
    try:
        worker = Worker(spec, mesh, lambda message: sender.send(plan.encode(message)))
        loaded = time.monotonic()
        warm_up(worker)
        warm = time.monotonic()
        phases = {"import": imported - begun, "rendezvous": met - imported, "load": loaded - met}
        phases["warm_up"] = warm - loaded
        fabric = worker.experts.fabric if worker.experts is not None else []
        rows = "" if worker.experts is None else worker.experts.describe_rows()
        where = (_node(bootstrap), os.getpid(), str(device), bootstrap.log_path)
        sender.send(plan.encode(plan.Ready(spec.rank, spec.digest, *where, phases, fabric, rows)))
        while True:
            _obey(worker, plan.decode_order(connection.recv_bytes(rank_link.MAX_MESSAGE_BYTES)), sender)
    finally:
        sender.close()


def _obey(worker: "Worker", order: plan.Order, sender: "Sender") -> None:
    """Carry out one order. A broken exchange between expert ranks is survived where the engine wants it so."""
    match order:
        case plan.StepPlan():
            if worker.is_broken:  # planned before the engine knew
                worker.skip(order)
                return
            failure, result = "", None
            try:
                result = worker.execute(order)
            except (RuntimeError, ReplicaLostError) as error:
                if not worker.outlives_peers or not _in_collective(error):
                    raise
                failure = _describe()
            if failure:  # not in the handler: the error keeps the groups' connections open
                worker.break_off()
                sender.send(plan.encode(plan.StepFailed(worker.spec.rank, order.generation, failure)))
                return
            if worker.experts is not None:
                worker.experts.acknowledge()
            if result is not None:
                sender.put(result)
        case plan.Enter():
            worker.enter(order)
        case plan.Prepare():
            assert worker.experts is not None, "only expert groups change"
            worker.experts.prepare(order)
        case plan.Discard():
            assert worker.experts is not None, "only expert groups change"
            worker.experts.discard(order.generation)


class Sender:
    """Sends results in order from a thread of its own, and a ping twice a second from another one.

    On CUDA waiting for a step's ids must not keep the main thread from launching the next step, nor a long step the
    pings from leaving: a rank that is silent counts as frozen.
    """

    def __init__(self, connection: Connection, rank: int) -> None:
        self._connection, self._rank = connection, rank
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[PendingResult | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for target, name in ((self._send_results, "rank-sender"), (self._ping, "rank-ping"))
        ]
        for thread in self._threads:
            thread.start()

    def send(self, data: bytes) -> None:
        """Send now."""
        with self._lock:
            self._connection.send_bytes(data)

    def put(self, result: "PendingResult") -> None:
        """Send a result when it is there: at once on CPU, where handing it to the thread would only cost time."""
        if result.is_ready:
            self.send(plan.encode(result.wait()))
        else:
            self._queue.put(result)

    def close(self) -> None:
        """Stop the threads after what is queued."""
        self._closed.set()
        self._queue.put(None)
        for thread in self._threads:
            thread.join(timeout=2.0)

    def _send_results(self) -> None:
        try:
            while (result := self._queue.get()) is not None:
                data = plan.encode(result.wait())
                try:
                    self.send(data)
                except OSError:
                    return
        finally:
            self._closed.set()  # a rank whose results do not come any more, whatever ended them, shall fall silent

    def _ping(self) -> None:
        while not self._closed.wait(PING_S):
            try:
                self.send(plan.encode(plan.Ping(self._rank)))
            except OSError:
                return


def _node(bootstrap: Bootstrap) -> str:
    return bootstrap.node or socket.gethostname()


def _describe() -> str:
    """The traceback; one that ends inside a collective is marked: another rank is the likely cause."""
    error = sys.exc_info()[1]
    return (CONSEQUENCE if error is not None and _in_collective(error) else "") + traceback.format_exc()


def _in_collective(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    is_kind = isinstance(error, RuntimeError | ReplicaLostError)
    return is_kind and any("/phalanx/parallel/" in frame.filename for frame in frames)


CONSEQUENCE = "[in a collective; probably the consequence of another rank's failure]\n"


def main() -> None:
    """Read the bootstrap from stdin; end when stdin does, because then the parent is dead."""
    begun = time.monotonic()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then closes the link
    bootstrap = msgspec.json.decode(sys.stdin.readline(), type=Bootstrap)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    code = 0
    try:
        serve(bootstrap, begun)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Library threads (gloo, OpenMP) may hang in their destructors once a peer is gone.
    os._exit(code)


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()

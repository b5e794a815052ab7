"""The Ray driver behind `phalanx up`: starts the controller and the replicas, restarts what fails, ends everything.

It decides nothing about requests. Its death ends the deployment: the controller sees its stdin close, Ray ends the
actors of a dead driver, and a local cluster's processes end with the process that started them.
"""

import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import RayError

from phalanx.deploy.controller_process import ControllerProcess
from phalanx.deploy.plan import DeploymentPlan
from phalanx.deploy.ray_groups import describe
from phalanx.deploy.replica import Replica
from phalanx.deploy.server.supervise import EndRanks, Order, Reclaim, StartRanks
from phalanx.errors import ConfigError, PhalanxError, ReplicaLostError

MAX_FAILED_STARTS = 3
"""Failed starts in a row of a replica that has served: then the deployment ends, unless another replica serves."""

RETRY_S = 15.0
"""Between further starts of a replica that keeps failing while others serve."""

BACKOFF_S = 1.0

PHASES = ("placement", "import", "rendezvous", "load", "warm_up")
"""Of a replica's start, in the order in which they happen; together they are the time until it is ready."""


@dataclass(frozen=True, slots=True)
class Progress:
    """One line for the person who waits.

    Attributes:
        event: controller | ready | lost | scale | drain, or log: a line of the controller's log.
        data: the same for programs.
    """

    event: str
    text: str
    data: Mapping[str, Any] = field(default_factory=dict)


class Supervisor:
    """Runs one deployment; `run` blocks until it has ended.

    Args:
        plan: resolved; the cluster it was resolved for is connected.
        report: called with progress, from any thread.
    """

    def __init__(self, plan: DeploymentPlan, report: Callable[[Progress], None]) -> None:
        self._plan, self._report = plan, report
        self._stopping = threading.Event()
        self._fatal: PhalanxError | None = None
        self._signals = 0
        self._orders: deque[Order] = deque()
        self._serving: set[int] = set()
        self._lock = threading.Lock()

    def run(self) -> None:
        """Serve until SIGTERM, SIGINT or a fatal error; SIGTERM drains, a second one ends at once.

        Raises:
            ConfigError: a port is taken, or the cluster lacks resources.
            ReplicaLostError: a replica fails again and again; the first failing rank's traceback is in the message.
        """
        controller = ControllerProcess(self._plan, self._on_order, lambda line: self._report(Progress("log", line)))
        previous = {kind: signal.signal(kind, self._on_signal) for kind in (signal.SIGTERM, signal.SIGINT)}
        threads = [
            threading.Thread(target=self._keep, args=(replica, controller), name=f"replica-{replica}")
            for replica in range(self._plan.replicas)
        ]
        try:
            text = f"controller pid {controller.pid} listens on {controller.listen}"
            self._report(Progress("controller", text, {"pid": controller.pid, "listen": controller.listen}))
            for thread in threads:
                thread.start()
            self._watch(controller)
        finally:
            self._stopping.set()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            controller.close()
            for kind, handler in previous.items():
                signal.signal(kind, handler)
        if self._fatal is not None:
            raise self._fatal

    def stop(self) -> None:
        """What SIGTERM does: drain, then end; the second call ends at once."""
        self._signals += 1

    def _on_signal(self, kind: int, frame: object) -> None:
        self.stop()

    def _on_order(self, order: Order) -> None:
        with self._lock:
            self._orders.append(order)

    def _take_orders(self, replica: Replica) -> list[Order]:
        """What is to be done with an incarnation; what was for one before it is dropped."""
        with self._lock:
            mine = [order for order in self._orders if order.replica == replica.replica]
            self._orders = deque(order for order in self._orders if order.replica != replica.replica)
        return [order for order in mine if order.incarnation == replica.incarnation]

    def _watch(self, controller: ControllerProcess) -> None:
        passed_on = 0
        while self._fatal is None:
            code = controller.poll()
            if code is not None:
                if not self._signals:
                    self._fatal = ReplicaLostError(f"the controller ended with status {code}: {controller.last_words}")
                return
            while passed_on < self._signals:
                passed_on += 1
                self._report(Progress("drain", "draining" if passed_on == 1 else "ending now"))
                controller.signal()
            time.sleep(0.05)

    def _keep(self, number: int, controller: ControllerProcess) -> None:
        """Keep one replica alive, one incarnation after the other."""
        incarnation, failed_starts, ever_served, is_crowded = 0, 0, False, False
        while not self._stopping.is_set() and self._fatal is None:
            incarnation += 1
            started = time.monotonic()
            size = controller.replica_starting(number, incarnation, self._stopping)
            if is_crowded:  # what it had been scaled to does not fit any more: nodes have left
                size = None
            attempt = _Attempt(Replica(self._plan, number, incarnation, controller.engines, size))
            error = ""
            try:
                attempt.replica.start(self._stopping)
                attempt.placed = time.monotonic()
                self._serve(attempt, controller)
            except PhalanxError as failure:
                error, is_crowded = str(failure), isinstance(failure, ConfigError)
                ever_served = ever_served or attempt.has_served
                failed_starts = 0 if attempt.has_served else failed_starts + 1
                if self._stopping.is_set():
                    pass
                elif not ever_served or (failed_starts >= MAX_FAILED_STARTS and not self._serving - {number}):
                    self._fatal = failure
                else:
                    data = {"replica": number, "incarnation": incarnation, "error": error}
                    self._report(Progress("lost", f"replica {number} incarnation {incarnation}: {error}", data))
            except RayError as failure:
                self._fatal = ReplicaLostError(f"Ray failed the supervisor: {describe(failure)}")
            finally:
                self._serving.discard(number)
                attempt.replica.end()
            controller.replica_gone(number, incarnation, "exit" if attempt.has_served else "startup", error)
            if failed_starts >= MAX_FAILED_STARTS:
                self._stopping.wait(RETRY_S)
            elif time.monotonic() - started < BACKOFF_S:
                self._stopping.wait(BACKOFF_S)

    def _serve(self, attempt: "_Attempt", controller: ControllerProcess) -> None:
        """Watch an incarnation until it ends, is reclaimed, or the deployment stops."""
        replica = attempt.replica
        while not self._stopping.is_set():
            for order in self._take_orders(replica):
                match order:
                    case Reclaim():
                        self._reclaimed(replica, order.cause)
                        return
                    case StartRanks():
                        replica.grow(order.op_id, order.units, time.monotonic())
                        self._scaled(replica, "starts", [rank for unit in order.units for rank in unit])
                    case EndRanks():
                        replica.shed(order.ranks)
                        self._scaled(replica, "has let go of", order.ranks)
            ended = replica.wait(0.05, has_served=attempt.has_served)
            if ended is not None:
                self._ended(ended)
                return
            for failure in replica.failures(time.monotonic()):
                controller.grow_failed(replica.replica, replica.incarnation, *failure)
            if not attempt.has_served:
                self._announce(attempt, controller)

    def _scaled(self, replica: Replica, what: str, ranks: Sequence[int]) -> None:
        text = f"replica {replica.replica} {what} ranks {', '.join(map(str, ranks))}"
        self._report(Progress("scale", text, {"replica": replica.replica, "ranks": list(ranks)}))

    def _reclaimed(self, replica: Replica, cause: str) -> None:
        # Of a replica that failed the controller hears before Ray does, and the engine's own words say more.
        if cause == "lease":
            raise ReplicaLostError("its lease ran out: the engine is frozen or its node is")
        self._ended(replica.last_words() or f"it does not end by itself ({cause})")

    def _ended(self, reason: str) -> None:
        """An engine that returns is as lost as one that raises, unless everything ends."""
        if not self._signals and not self._stopping.is_set():
            raise ReplicaLostError(f"its engine ended: {reason}")

    def _announce(self, attempt: "_Attempt", controller: ControllerProcess) -> None:
        state = controller.status()
        for replica in state.replicas if state is not None else ():
            is_this = (replica.replica, replica.incarnation) == (attempt.replica.replica, attempt.replica.incarnation)
            if is_this and replica.state == "ready":
                attempt.has_served = True
                self._serving.add(replica.replica)
                self._report(_ready(replica, attempt))


class _Attempt:
    """One incarnation as the supervisor sees it."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self.has_served = False
        self.begun = self.placed = time.monotonic()


def _ready(replica: Any, attempt: _Attempt) -> Progress:
    took = time.monotonic() - attempt.begun
    startup_s = {phase: replica.startup_s.get(phase, 0.0) for phase in PHASES}
    startup_s["placement"] = attempt.placed - attempt.begun
    # What is left is the ranks' processes on their way from Ray to their first line.
    startup_s["import"] = max(0.0, took - sum(startup_s.values()) + startup_s["import"])
    phases = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in startup_s.items())
    ranks = list(replica.ranks)
    text = "\n  ".join([f"replica {replica.replica} is ready after {took:.1f} s ({phases})", *ranks])
    data = {"replica": replica.replica, "took_s": took, "startup_s": startup_s, "ranks": ranks}
    return Progress("ready", text, data)

"""The controller as a child process of the supervisor, and the supervisor's link to it."""

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable

import grpc
import msgspec

from phalanx.deploy.plan import DeploymentPlan
from phalanx.deploy.server import phalanx_pb2 as pb
from phalanx.deploy.server import supervise
from phalanx.deploy.server.options import ServerOptions
from phalanx.deploy.server.phalanx_pb2_grpc import ClusterStub
from phalanx.deploy.supervise_link import SuperviseLink
from phalanx.errors import ConfigError
from phalanx.models.loading import read_config, resolve_path
from phalanx.runtime.controller.core import CoreConfig

EXIT_S = 5.0
SLICE_S = 0.2


def server_options(plan: DeploymentPlan) -> ServerOptions:
    """The controller's part of a plan."""
    server, folder = plan.server, resolve_path(plan.model.path)
    model = read_config(folder)
    return ServerOptions(
        model_name=plan.model.name,
        model_path=str(folder),
        vocab_size=model.vocab_size,
        max_model_len=plan.scheduler.max_model_len,
        num_tasks=model.num_tasks,
        listen=server.listen,
        engine_listen=server.engine_listen,
        metrics_listen=None if server.metrics == "off" else server.metrics,
        drain_s=server.drain,
        max_message_bytes=server.max_message,
        core=CoreConfig(max_queue=plan.scheduler.max_queue, detach_grace_s=server.detach_grace),
    )


class ControllerProcess:
    """Starts the controller; it ends with its stdin, so it cannot outlive the supervisor.

    Args:
        plan: of the deployment.
        on_order: called from the reading thread with what the controller wants done.
        on_log: called from another one with each line of its log.

    Attributes:
        listen, engines: bound addresses of the public port and of the port for engines.

    Raises:
        ConfigError: it did not come up, for example because a port is taken; its own sentence is in the message.
    """

    def __init__(
        self, plan: DeploymentPlan, on_order: Callable[[supervise.Order], None], on_log: Callable[[str], None]
    ) -> None:
        self._on_log, self._on_order = on_log, on_order
        self._started, self._is_deaf = threading.Condition(), False
        self._sizes: dict[tuple[int, int], int | None] = {}
        self._errors: list[str] = []
        with tempfile.NamedTemporaryFile("wb", suffix=".json") as file:
            file.write(msgspec.json.encode(server_options(plan)))
            file.flush()
            command = [sys.executable, "-m", "phalanx.deploy.server.main", "--plan", file.name]
            # Its own process group: a Ctrl-C of the terminal reaches the supervisor alone, which then drains.
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
            )
            self._echo = threading.Thread(target=self._read_errors, name="controller-log", daemon=True)
            self._echo.start()
            bound = self._bound_ports()
        self.pid = self._process.pid
        self.listen = _with_port(plan.server.listen, bound["listen"])
        self.engines = _with_port(plan.server.engine_listen, bound["engine_listen"])
        self._public = grpc.insecure_channel(self.listen)
        self._link = SuperviseLink(self.engines, self._on_frame, self._on_deaf, lambda: self._process.poll() is None)

    def replica_starting(self, replica: int, incarnation: int, stopping: threading.Event) -> int | None:
        """Announce an incarnation before its processes exist: all below it are fenced.

        Args:
            replica: its number.
            incarnation: what is announced.
            stopping: set from outside to give up waiting for the answer.

        Returns:
            How many dp ranks it is to start with; None = as the plan says.
        """
        self._link.say(supervise.ReplicaStarting(replica, incarnation))
        with self._started:
            # A controller that has ended gives no answer; then the size does not matter any more.
            while (replica, incarnation) not in self._sizes and not self._is_deaf and not stopping.is_set():
                self._started.wait(SLICE_S)
            return self._sizes.pop((replica, incarnation), None)

    def grow_failed(self, replica: int, incarnation: int, op_id: str, reason: str) -> None:
        """Ranks that the controller asked for will not come."""
        self._link.say(supervise.GrowFailed(replica, incarnation, op_id, reason))

    def replica_gone(self, replica: int, incarnation: int, cause: str, error: str) -> None:
        """Its processes have ended."""
        self._link.say(supervise.ReplicaGone(replica, incarnation, cause, error))

    def status(self) -> pb.ClusterState | None:
        """What `Cluster.Status` says; None while it does not answer."""
        try:
            state: pb.ClusterState = ClusterStub(self._public).Status(pb.StatusRequest(), timeout=2.0)
        except grpc.RpcError:
            return None
        return state

    def poll(self) -> int | None:
        """Exit status, or None while it runs."""
        return self._process.poll()

    @property
    def last_words(self) -> str:
        """The end of its log."""
        self._echo.join(timeout=1.0)
        return "\n".join(self._errors[-20:])

    def signal(self) -> None:
        """SIGTERM: drain; the second one ends it at once."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)

    def close(self) -> None:
        """End it if it still runs."""
        assert self._process.stdin is not None, "opened as a pipe"
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(EXIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._link.close()
        self._public.close()

    def _bound_ports(self) -> dict[str, int]:
        assert self._process.stdout is not None, "opened as a pipe"
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise ConfigError(f"the controller did not start: {self.last_words or 'it said nothing'}")
        bound: dict[str, int] = json.loads(line)
        return bound

    def _on_frame(self, frame: supervise.Frame) -> None:
        if isinstance(frame, supervise.Start):
            with self._started:
                self._sizes[frame.replica, frame.incarnation] = frame.data
                self._started.notify_all()
        elif isinstance(frame, supervise.Order):
            self._on_order(frame)

    def _on_deaf(self) -> None:
        with self._started:
            self._is_deaf = True
            self._started.notify_all()

    def _read_errors(self) -> None:
        assert self._process.stderr is not None, "opened as a pipe"
        for line in self._process.stderr:
            text = line.decode(errors="replace").rstrip()
            self._errors.append(text)
            del self._errors[:-200]
            self._on_log(text)


def _with_port(address: str, port: int) -> str:
    return f"{address.rpartition(':')[0]}:{port}"

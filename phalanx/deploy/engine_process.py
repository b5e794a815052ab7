"""The engine's process: one thread steps, one reads frames of the controller, one sends heartbeats.

The step thread alone touches the engine. A frame of the controller wakes it through a pipe, so a new request does not
wait for a poll to time out.
"""

import gc
import os
import queue
import threading
import time
from collections.abc import Iterator

import grpc
import msgspec

from phalanx.deploy.server.links import ENGINE_METHOD, LINK_OPTIONS
from phalanx.errors import ConfigError, ReplicaLostError
from phalanx.runtime import frames, scale_report
from phalanx.runtime.engine import Engine
from phalanx.runtime.expert_load import num_single_experts, rank_loads
from phalanx.runtime.frames import (
    Abort,
    AbortScale,
    AskScale,
    Failed,
    Frame,
    Heartbeat,
    Hello,
    Place,
    Scale,
    Shutdown,
    TokenEvents,
    Welcome,
)
from phalanx.runtime.scaling import Phase, ScaleOp

HEARTBEAT_S = 0.25
IDLE_PROOF_S = 1.0
"""An idle replica runs an empty step this often: a rank that hangs is found before a request needs it."""

POLL_S = 0.05


class ControllerLink:
    """The engine's end of the stream to its controller.

    Args:
        address: where the controller listens for engines.
        wake: called from the reading thread after each frame, and when the link ends.
    """

    def __init__(self, address: str, wake: "Wake") -> None:
        self.inbox: queue.SimpleQueue[Frame] = queue.SimpleQueue()
        self.lost: str | None = None
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._wake = wake
        self._channel = grpc.insecure_channel(address, options=LINK_OPTIONS)
        self._call = self._channel.stream_stream(ENGINE_METHOD)(self._requests())
        threading.Thread(target=self._read, name="controller-link", daemon=True).start()

    def send(self, frame: Frame) -> None:
        """Queue a frame; order is kept."""
        self._outbox.put(frames.encode(frame))

    def close(self, grace_s: float = 1.0) -> None:
        """Send what is queued, then end the stream."""
        self._outbox.put(None)
        deadline = time.monotonic() + grace_s
        while self.lost is None and time.monotonic() < deadline:
            time.sleep(0.01)
        self._channel.close()

    def _requests(self) -> Iterator[bytes]:
        return iter(self._outbox.get, None)

    def _read(self) -> None:
        try:
            for data in self._call:
                self.inbox.put(frames.decode(data))
                self._wake.set()
            self.lost = "the controller ended the link"
        except (grpc.RpcError, frames.WireError) as error:
            self.lost = f"the link to the controller broke: {error}"
        self._wake.set()


class Wake:
    """A pipe that `multiprocessing.connection.wait` can watch; inverse pair `set`, `clear`."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)

    def fileno(self) -> int:
        """Readable while set."""
        return self._read

    def set(self) -> None:
        """Wake the waiter; a full pipe is awake already."""
        try:
            os.write(self._write, b"!")
        except BlockingIOError:
            return

    def clear(self) -> None:
        """Forget all wake-ups so far."""
        try:
            while os.read(self._read, 4096):
                pass
        except BlockingIOError:
            return


class EngineProcess:
    """Connects an engine to the controller and steps it until told to stop.

    Args:
        engine: with its ranks up.
        hello: who this is; sent first.
        address: where the controller listens for engines.
    """

    def __init__(self, engine: Engine, hello: Hello, address: str) -> None:
        self._engine, self._hello = engine, hello
        self._wake = Wake()
        self._link = ControllerLink(address, self._wake)
        self._stop: str | None = None
        self._ended = threading.Event()
        self._last_step = time.monotonic()
        self._op: ScaleOp | None = None
        self._told: Phase | None = None

    def run(self) -> str:
        """Serve; returns the reason of an orderly end.

        Raises:
            ReplicaLostError: a rank is lost; the controller has been told.
        """
        self._link.send(self._hello)
        # What lives now lives as long as the engine: without this a full collection visits it all, in mid-step.
        gc.collect()
        gc.freeze()
        threading.Thread(target=self._heartbeats, name="heartbeat", daemon=True).start()
        try:
            while self._stop is None:
                self._turn()
        except ReplicaLostError as error:
            self._link.send(Failed(-1, "", "", str(error)))
            raise
        finally:
            self._ended.set()
            self._engine.executor.close()
            self._link.close()
        return self._stop

    def _turn(self) -> None:
        self._wake.clear()
        while not self._link.inbox.empty():
            self._handle(self._link.inbox.get())
        if self._link.lost is not None and self._stop is None:
            self._stop = self._link.lost
        engine = self._engine
        idle = not engine.has_work
        due = idle and time.monotonic() - self._last_step > IDLE_PROOF_S
        rows = engine.step(POLL_S, now=time.monotonic(), prove_alive=due, wake=self._wake)
        if due or not idle:
            self._last_step = time.monotonic()
        if rows:
            self._link.send(TokenEvents(engine.scheduler.step, rows))
        self._tell_scale()
        if idle and due:
            engine.check()

    def _handle(self, frame: Frame) -> None:
        match frame:
            case Place():
                self._engine.place(frame)
            case Abort():
                self._engine.abort(frame)
            case AskScale(call, data, leave):
                self._link.send(scale_report.estimate(self._engine, call, data, leave))
            case Scale():
                self._scale(frame)
            case AbortScale(op_id, reason):
                self._engine.abort_scale(op_id, reason, time.monotonic())
            case Shutdown():
                self._stop = frame.reason
            case Welcome():
                return
            case _:
                self._stop = f"the controller sent {type(frame).__name__}, which engines send"

    def _scale(self, frame: Scale) -> None:
        try:
            self._engine.scale(frame.op_id, frame.data, time.monotonic(), frame.leave)
        except ConfigError as error:
            self._link.send(scale_report.refused(self._engine, frame.op_id, str(error)))
        self._tell_scale()

    def _tell_scale(self) -> None:
        """Tell the controller about the operation under way when its phase has changed, or when it is another one."""
        op = self._engine.mesh.op
        if self._op is not None and self._op is not op:
            self._tell(self._op)  # it ended, and the engine began one of its own, within one turn
        if op is not self._op:
            self._op, self._told = op, None
        if op is not None:
            self._tell(op)

    def _tell(self, op: ScaleOp) -> None:
        if op.phase == self._told:
            return
        self._told = op.phase
        state = scale_report.state(self._engine, op)
        if state.ranks:
            state = msgspec.structs.replace(state, ranks=[*self._hello.ranks[:1], *state.ranks])
        self._link.send(state)

    def _heartbeats(self) -> None:
        seq = 0
        while not self._ended.wait(HEARTBEAT_S):
            self._link.send(heartbeat(self._engine, seq))
            seq += 1


def heartbeat(engine: Engine, seq: int) -> Heartbeat:
    """The engine's figures; plain integers, so that reading them beside the step thread is harmless."""
    scheduler = engine.scheduler
    caches = [domain.cache for domain in scheduler.domains]
    planner = engine.mesh.planner
    return Heartbeat(
        seq,
        scheduler.step,
        scheduler.num_running,
        scheduler.num_waiting,
        sum(cache.num_free for cache in caches),
        len(caches) * (engine.config.kv.num_blocks - 1),
        sum(cache.queries for cache in caches),
        sum(cache.hits for cache in caches),
        scheduler.num_preemptions,
        scheduler.num_generated_tokens,
        scheduler.num_prompt_tokens,
        [] if planner is None else rank_loads(planner.config, planner.placements, planner.load.load()),
        0 if planner is None else planner.num_dropped,
        0 if planner is None else planner.num_moved,
        0 if planner is None else num_single_experts(planner.config, planner.placements),
    )

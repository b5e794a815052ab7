"""Real sockets without a model: engines that answer token = f(seed, choice, position), a service, a proxy that cuts.

Everything asynchronous of one `Service` runs on one event loop in a thread, so tests stay plain functions.
"""

import asyncio
import contextlib
import json
import random
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc

from phalanx.deploy.client import Client
from phalanx.deploy.server import supervise
from phalanx.deploy.server.links import ENGINE_METHOD, LINK_OPTIONS, SUPERVISE_METHOD
from phalanx.deploy.server.options import ServerOptions
from phalanx.deploy.server.server import Ports, Server
from phalanx.runtime import frames
from phalanx.runtime.controller.core import CoreConfig
from phalanx.runtime.controller.jobs import unpack_ids
from phalanx.runtime.detokenize import BYTE_ALPHABET
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
    ScaleEstimate,
    ScaleState,
    Shutdown,
    StageBytes,
    TokenEvents,
    TokenRow,
    Welcome,
)
from phalanx.runtime.scaling import Phase
from phalanx.runtime.tokenizer import Tokenizer
from tests.runtime.controller.world import token

T = TypeVar("T")

CHAT_TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"


@dataclass
class Row:
    epoch: int
    seed: int
    position: int
    max_tokens: int
    num_prompt_tokens: int
    is_first: bool = True
    logprobs: bool = False


class FakeEngine:
    """One incarnation of a replica; every switch below may be thrown while it runs.

    Attributes:
        is_mute: sends no heartbeats.
        is_frozen: makes no steps.
        sends_twice: every frame of tokens goes out twice.
        sends_stale: before each row goes one of another epoch with other tokens.
        refusal: answer every placement with this error.
        rows: (job, choice) -> what runs; empty = all blocks free.
        scales: scale operations it was asked for, which `tell_scale` carries on; it answers questions by itself.
        tell_when_asked: the phase that an operation has at once.
        is_silent: answers no questions.
        stopped: reason of a Shutdown, or how the link ended.
    """

    def __init__(self, address: str, replica: int = 0, incarnation: int = 1, step_s: float = 0.003) -> None:
        self.replica, self.incarnation, self.step_s = replica, incarnation, step_s
        self.is_mute = self.is_frozen = self.sends_twice = self.sends_stale = self.is_silent = False
        self.data = 1
        self.scales: list[Scale | AbortScale] = []
        self.asked: list[AskScale] = []
        self.tell_when_asked: Phase | None = None
        self.refusal: str | None = None
        self.rows: dict[tuple[str, int], Row] = {}
        self.placed: list[Place] = []
        self.aborted: list[Abort] = []
        self.stopped: str | None = None
        self.is_welcome = False
        self.num_generated = 0
        self.closed = asyncio.Event()
        self._channel = grpc.aio.insecure_channel(address, options=LINK_OPTIONS)
        self._outbox: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._call = self._channel.stream_stream(ENGINE_METHOD)(self._requests())
        ranks = [f"rank 0: pid 1 cpu replica {replica}"]
        startup_s = {"load": 0.5, "warm_up": 0.25}
        hello = Hello(frames.VERSION, replica, incarnation, "plan-a", 4096, 2048, 100, 16, 1, startup_s, ranks)
        self.post(hello)
        self._tasks = [asyncio.create_task(work) for work in (self._read(), self._step(), self._beat())]

    def post(self, frame: Frame) -> None:
        self._outbox.put_nowait(frames.encode(frame))

    def tell_scale(self, op_id: str, phase: Phase, data: int, *, gone: Sequence[int] = (), detail: str = "") -> None:
        """How an operation goes; while it prepares it wants rank 1."""
        self.data = data
        wanted = [[1]] if phase == "PREPARING" else []
        ranks = [f"rank {rank}: pid {rank}" for rank in range(data)] if phase == "DONE" else []
        self.post(ScaleState(op_id, phase, detail, data, wanted, list(gone), ranks))

    def fail(self, error: str) -> None:
        self.post(Failed(3, "node-b", "/tmp/rank3.log", error))

    async def drop_link(self) -> None:
        """As if the process were killed."""
        for task in self._tasks:
            task.cancel()
        self._call.cancel()
        await self._channel.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.closed.set()

    async def _requests(self) -> AsyncIterator[bytes]:
        while (data := await self._outbox.get()) is not None:
            yield data

    async def _read(self) -> None:
        try:
            async for data in self._call:
                self._receive(frames.decode(data))
            self.stopped = self.stopped or "the controller ended the link"
        except grpc.aio.AioRpcError as error:
            self.stopped = self.stopped or f"{error.code().name}: {error.details()}"
        self.closed.set()

    def _receive(self, frame: Frame) -> None:
        match frame:
            case Place():
                self.placed.append(frame)
                for choice, packed in enumerate(frame.outputs):
                    if packed is None:
                        continue
                    known = unpack_ids(packed)
                    assert known == [token(frame.seed, choice, i) for i in range(len(known))]
                    assert frame.params.max_tokens is not None
                    row = Row(
                        frame.epoch, frame.seed, len(known), frame.params.max_tokens, len(frame.prompt_token_ids) // 4
                    )
                    row.logprobs = frame.params.logprobs is not None
                    self.rows[frame.job, choice] = row
            case Abort():
                self.aborted.append(frame)
                for job, choice in list(self.rows):
                    if job == frame.job and frame.choice in (-1, choice):
                        del self.rows[job, choice]
            case AskScale(call, data) if not self.is_silent:
                self.asked.append(frame)
                refusal = "" if data < 9 else f"data {data}: too many"
                stages = [StageBytes(2**20, 2**21, 2**22, 2**23)]
                self.post(
                    ScaleEstimate(call, refusal, 0, self.data, data, 1, 1, 8, 16, stages, 3, 3 * 2**20, ["a", "b"])
                )
            case Scale() | AbortScale():
                self.scales.append(frame)
                if isinstance(frame, Scale) and self.tell_when_asked is not None:
                    data = frame.data if self.tell_when_asked == "DONE" else self.data
                    self.tell_scale(frame.op_id, self.tell_when_asked, data, detail="as told")
            case Welcome():
                self.is_welcome = True
            case Shutdown():
                self.stopped = frame.reason
                self.rows.clear()

    async def _step(self) -> None:
        step = 0
        while True:
            await asyncio.sleep(self.step_s)
            if self.is_frozen or not self.rows:
                continue
            step += 1
            events = TokenEvents(step, [row for key in list(self.rows) for row in self._rows_of(key)])
            for _ in range(2 if self.sends_twice else 1):
                self.post(events)

    def _rows_of(self, key: tuple[str, int]) -> Iterator[TokenRow]:
        row, (job, choice) = self.rows[key], key
        if self.refusal is not None:
            del self.rows[key]
            yield TokenRow(job, row.epoch, choice, row.position, [], finish="error", error=self.refusal)
            return
        ids = [token(row.seed, choice, row.position)]
        if self.sends_stale:
            yield TokenRow(job, row.epoch - 1, choice, row.position, [ids[0] ^ 1])
        is_last = row.position + 1 == row.max_tokens
        entries = [frames.TokenLogprobs(ids[0], -0.5, 1, [ids[0], 7], [-0.5, -2.0])] if row.logprobs else None
        yield TokenRow(
            job,
            row.epoch,
            choice,
            row.position,
            ids,
            logprobs=entries,
            finish="length" if is_last else None,
            num_cached_tokens=row.num_prompt_tokens // 2 if row.is_first else -1,
        )
        self.num_generated += 1
        row.is_first = False
        row.position += 1
        if is_last:
            del self.rows[key]

    async def _beat(self) -> None:
        seq = 0
        while True:
            if not self.is_mute:
                seq += 1
                free = 100 - 3 * len(self.rows)
                self.post(Heartbeat(seq, seq, len(self.rows), 0, free, 100, 40, 10, 2, self.num_generated, 30))
            await asyncio.sleep(0.1)


class FakeSupervisor:
    """Collects what the controller asks of a supervisor."""

    def __init__(self, address: str) -> None:
        self.received: list[supervise.Frame] = []
        self._channel = grpc.aio.insecure_channel(address, options=LINK_OPTIONS)
        self._call = self._channel.stream_stream(SUPERVISE_METHOD)()
        self._task = asyncio.create_task(self._read())

    async def send(self, frame: supervise.Frame) -> None:
        await self._call.write(supervise.encode(frame))

    async def close(self) -> None:
        self._call.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self._channel.close()

    async def _read(self) -> None:
        async for data in self._call:
            self.received.append(supervise.decode(data))


class CuttingProxy:
    """A TCP proxy that resets each connection after a random number of bytes, until `budget` cuts are done."""

    def __init__(self, port: int, seed: int, budget: int, low: int = 200, high: int = 1200) -> None:
        self.num_cuts = 0
        self._target = port
        self._rng = random.Random(seed)
        self._budget, self._low, self._high = budget, low, high
        self._server: asyncio.Server | None = None

    async def start(self) -> int:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        left = self._rng.randint(self._low, self._high) if self.num_cuts < self._budget else 10**12
        counter = [left]

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            while data := await source.read(512):
                sink.write(data[: counter[0]])
                await sink.drain()
                counter[0] -= len(data)
                if counter[0] <= 0:
                    self.num_cuts += 1
                    return

        tasks = [asyncio.create_task(pump(reader, far_writer)), asyncio.create_task(pump(far_reader, writer))]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        writer.transport.abort()
        far_writer.transport.abort()


class Service:
    """A controller on real ports in a thread, with helpers to run coroutines on its loop."""

    def __init__(self, tmp_path: Path, **options: Any) -> None:
        core = CoreConfig(**{"lease_s": 1.0, "detach_grace_s": 5.0, **options.pop("core", {})})
        self.options = ServerOptions(
            model_name="tiny",
            model_path=str(write_tokenizer(tmp_path)),
            vocab_size=256,
            max_model_len=4096,
            core=core,
            **{"listen": "127.0.0.1:0", **options},
        )
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()
        self._closers: list[Callable[[], Coroutine[Any, Any, None]]] = []
        self.server, self.ports = self.run(self._start())

    async def _start(self) -> tuple[Server, Ports]:
        assert self.options.model_path is not None
        server = Server(self.options, Tokenizer.from_folder(self.options.model_path))
        return server, await server.start()

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float = 30) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout_s)

    def wait_until(self, condition: Any, timeout_s: float = 10) -> None:
        """Until `condition()`, evaluated on the loop, holds."""

        async def poll() -> None:
            while not condition():
                await asyncio.sleep(0.005)

        self.run(asyncio.wait_for(poll(), timeout_s))

    def engine(self, replica: int = 0, incarnation: int = 1, **switches: Any) -> FakeEngine:
        """Start an engine and wait until the controller has it."""

        async def make() -> FakeEngine:
            engine = FakeEngine(f"127.0.0.1:{self.ports.engine_listen}", replica, incarnation)
            for name, value in switches.items():
                setattr(engine, name, value)
            return engine

        engine = self.run(make())
        self._closers.append(engine.drop_link)
        self.wait_until(lambda: engine.stopped or engine.is_welcome)
        return engine

    def supervisor(self) -> FakeSupervisor:
        async def make() -> FakeSupervisor:
            supervisor = FakeSupervisor(f"127.0.0.1:{self.ports.engine_listen}")
            await supervisor.send(supervise.SupervisorHello(frames.VERSION))
            return supervisor

        supervisor = self.run(make())
        self._closers.append(supervisor.close)
        return supervisor

    def proxy(self, seed: int, budget: int, **bounds: int) -> tuple[CuttingProxy, str]:
        proxy = CuttingProxy(self.ports.listen, seed, budget, **bounds)
        port = self.run(proxy.start())
        self._closers.append(proxy.close)
        return proxy, f"127.0.0.1:{port}"

    @property
    def core(self) -> Any:
        return self.server.shell.core

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.ports.listen}"

    def client(self, **options: Any) -> Client:
        return Client(self.address, **options)

    def close(self) -> None:
        for closer in self._closers:
            self.run(closer())
        self.run(self.server.stop())
        self.run(self._cancel_rest())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    async def _cancel_rest(self) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.contextmanager
def serving(tmp_path: Path, **options: Any) -> Iterator[Service]:
    service = Service(tmp_path, **options)
    try:
        yield service
    finally:
        service.close()


def write_tokenizer(folder: Path) -> Path:
    """A model folder whose token ids are bytes."""
    letters = dict(BYTE_ALPHABET.items())
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    definition = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": letters, "merges": []},
    }
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    return folder

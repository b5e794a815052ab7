"""The controller process from start to end: ports, clock, health, drain."""

import asyncio
import contextlib
import random
from functools import partial
from typing import NamedTuple

import grpc

from phalanx import log
from phalanx.deploy.metrics import MetricsServer
from phalanx.deploy.server.addresses import bind_error, split_address
from phalanx.deploy.server.cluster import Cluster
from phalanx.deploy.server.engine_link import engine_link_handler
from phalanx.deploy.server.health import Health
from phalanx.deploy.server.inference import Inference, ServedModel
from phalanx.deploy.server.links import KEEPALIVE_OPTIONS, LINK_OPTIONS
from phalanx.deploy.server.options import ServerOptions
from phalanx.deploy.server.shell import Shell
from phalanx.errors import ConfigError
from phalanx.runtime.controller.core import Core
from phalanx.runtime.controller.events import Drain, Tick
from phalanx.runtime.output import choice_outputs
from phalanx.runtime.tokenizer import Tokenizer

TICK_S = 0.05
LAST_READ_S = 5.0
# A last cap, several times what admission lets in: at this many open calls even health checks are refused.
MAX_CONCURRENT_RPCS = 16_384

_logger = log.get("controller")

SERVER_OPTIONS = (
    # On by default: a second controller would bind the same port without an error and take half of the connections.
    ("grpc.so_reuseport", 0),
    # Clients may ping an idle stream this often; else a long prefill ends in GOAWAY.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
    *KEEPALIVE_OPTIONS,
)


class Ports(NamedTuple):
    """What the process listens on; `metrics` is None where it is off."""

    listen: int
    engine_listen: int
    metrics: int | None


class Server:
    """One controller. Use: `await start()`, then `await serve_until_drained()` or `await stop()`."""

    def __init__(self, options: ServerOptions, tokenizer: Tokenizer | None) -> None:
        self._options = options
        self._metrics: MetricsServer | None = None
        self._clock: asyncio.Task[None] | None = None
        self._draining = asyncio.Event()
        self._health = Health(options.model_name)
        self.shell = Shell(Core(options.core, partial(choice_outputs, tokenizer)))
        sizes = options.vocab_size, options.max_model_len, options.num_tasks
        model = ServedModel(options.model_name, tokenizer, *sizes)
        inference = Inference(self.shell, model, options.state_interval_s, random.SystemRandom())
        cluster = Cluster(self.shell, options.model_name)
        self._public = grpc.aio.server(
            options=(*SERVER_OPTIONS, ("grpc.max_receive_message_length", options.max_message_bytes)),
            maximum_concurrent_rpcs=MAX_CONCURRENT_RPCS,
        )
        self._public.add_generic_rpc_handlers((inference.handler(), cluster.handler(), self._health.handler()))
        self._internal = grpc.aio.server(options=(*LINK_OPTIONS, *SERVER_OPTIONS))
        self._internal.add_generic_rpc_handlers((engine_link_handler(self.shell),))

    async def start(self) -> Ports:
        """Listen on every port.

        Raises:
            ConfigError: an address cannot be had; nothing listens then.
        """
        try:
            ports = Ports(
                _bind(self._public, self._options.listen),
                _bind(self._internal, self._options.engine_listen),
                self._start_metrics(),
            )
        except ConfigError:
            await self.stop()
            raise
        await self._internal.start()
        await self._public.start()
        self._clock = asyncio.create_task(self._run_clock())
        _logger.info("controller up", extra=log.fields(**ports._asdict()))
        return ports

    @property
    def is_draining(self) -> bool:
        """Whether `drain` was called."""
        return self._draining.is_set()

    def drain(self) -> None:
        """Refuse new jobs; `serve_until_drained` returns when the running ones have ended or time is up."""
        self.shell.handle(Drain())
        self._health.publish(is_ready=False)
        self._draining.set()

    async def serve_until_drained(self) -> None:
        """Serve until `drain` was called and every job has ended and been read, or `drain_s` has passed."""
        assert self._clock is not None
        draining = asyncio.ensure_future(self._draining.wait())
        await asyncio.wait((draining, self._clock), return_when=asyncio.FIRST_COMPLETED)
        draining.cancel()
        if self._clock.done():
            self._clock.result()  # the clock never ends by itself: this raises what ended it
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.shell.drained.wait(), self._options.drain_s)
        for _ in range(int(LAST_READ_S / TICK_S)):
            if not any(job.readers for job in self.shell.core.jobs.values()):
                break
            await asyncio.sleep(TICK_S)
        _logger.info("drained", extra=log.fields(unfinished=self.shell.core.num_live))

    async def stop(self) -> None:
        """End everything now; open streams are cut."""
        if self._clock is not None:
            self._clock.cancel()
        await self._public.stop(None)
        await self._internal.stop(None)
        if self._metrics is not None:
            self._metrics.close()

    async def _run_clock(self) -> None:
        while True:
            self.shell.handle(Tick())
            self._health.publish(self.shell.core.is_ready)
            await asyncio.sleep(TICK_S)

    def _start_metrics(self) -> int | None:
        if self._options.metrics_listen is None:
            return None
        self._metrics = MetricsServer(self._options.metrics_listen, self.shell.core, self._options.model_name)
        return self._metrics.port


def _bind(server: grpc.aio.Server, address: str) -> int:
    split_address(address)
    try:
        port: int = server.add_insecure_port(address)
    except RuntimeError as error:
        raise bind_error(address) from error
    return port

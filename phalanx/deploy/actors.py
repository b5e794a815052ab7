"""The Ray actors of a replica: one engine, one worker per rank. Ray places and starts them and carries nothing else.

`max_restarts=0`: a restarted actor would reuse its incarnation; the supervisor starts a whole new replica instead.
"""

import dataclasses
import os
import secrets
import time

import msgspec
import psutil
import ray

from phalanx.deploy import plan as plans
from phalanx.deploy.engine_config import engine_config
from phalanx.deploy.engine_process import EngineProcess
from phalanx.parallel import rendezvous
from phalanx.runtime.engine import Engine
from phalanx.runtime.engine_config import EngineConfig
from phalanx.runtime.executor.link import LinkExecutor
from phalanx.runtime.frames import VERSION, Hello
from phalanx.runtime.rank import Bootstrap, serve
from phalanx.runtime.rank_link import RankListener
from phalanx.runtime.scale_report import rank_lines


class EngineOrders(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine actor is told.

    Attributes:
        plan: encoded `DeploymentPlan`.
        data: dp ranks to start with, which may have been scaled since the plan was made.
        controller: address the controller listens on for engines.
        interface: network interface of collectives; "" = found from the host name.
    """

    plan: bytes
    replica: int
    incarnation: int
    data: int
    controller: str
    interface: str = ""


class EngineActor:
    """Hosts the scheduler, the rank link and the rendezvous of one replica."""

    def __init__(self, orders: EngineOrders, key: bytes) -> None:
        self._orders = orders
        self._begun = time.monotonic()
        host = ray.util.get_node_ip_address()
        self._listener = RankListener(host, key)
        self._store, self._store_address = rendezvous.host_store(host)

    def address(self) -> str:
        """Where the ranks dial."""
        return self._listener.address

    def run(self) -> str:
        """Wait for the ranks, then serve; returns the reason of an orderly end, raises the first failure."""
        plan = plans.decode(self._orders.plan)
        # The plan's digest stays: replicas of any size belong to one deployment and take over each other's jobs.
        config = at_size(engine_config(plan), self._orders.data)
        store, interface = self._store_address, self._orders.interface
        executor = LinkExecutor(
            self._listener,
            config.shape.world_size,
            lambda nodes: config.rank_specs(store, nodes, interface),
        )
        slowest = {
            phase: max(ready.startup_s.get(phase, 0.0) for ready in executor.ready.values())
            for phase in executor.ready[0].startup_s
        }
        engine = Engine(config, executor, store, interface)
        hello = Hello(
            version=VERSION,
            replica=self._orders.replica,
            incarnation=self._orders.incarnation,
            fingerprint=plan.digest,
            max_model_len=config.kv.max_model_len,
            max_request_tokens=engine.limit,
            num_blocks=config.kv.num_blocks,
            block_size=config.kv.block_size,
            dp_size=config.shape.dp,
            startup_s=slowest | {"ready": time.monotonic() - self._begun},
            ranks=[f"engine node {_node()} pid {os.getpid()}", *rank_lines(engine)],
        )
        return EngineProcess(engine, hello, self._orders.controller).run()


class WorkerActor:
    """One rank."""

    def run(self, bootstrap: Bootstrap) -> None:
        """Dial the engine and execute plans until the link ends."""
        where = {"node": _node(), "log_path": _log_path(), "interface": _interface()}
        serve(msgspec.structs.replace(bootstrap, **where))

    def pid(self) -> int:
        """Of the process, for fault tests and status."""
        return os.getpid()


def at_size(config: EngineConfig, data: int) -> EngineConfig:
    """The same replica with another number of dp ranks: each rank holds what it held before."""
    return dataclasses.replace(config, shape=dataclasses.replace(config.shape, dp=data))


def new_key() -> bytes:
    """A shared secret for one incarnation's rank link."""
    return secrets.token_bytes(32)


def _node() -> str:
    # Several Ray nodes may share a host (and its name): the id tells them apart.
    return f"{ray.util.get_node_ip_address()}/{ray.get_runtime_context().get_node_id()[:6]}"


def _interface() -> str:
    """The network interface that has this Ray node's address; its name may differ from node to node.

    Left to themselves, collectives look up the host name, which on many machines means the machine itself.
    """
    address = ray.util.get_node_ip_address()
    addresses = psutil.net_if_addrs().items()
    return next((name for name, entries in addresses if any(entry.address == address for entry in entries)), "")


def _log_path() -> str:
    context = ray.get_runtime_context()
    folder = os.path.join(ray._private.worker._global_node.get_session_dir_path(), "logs")
    return os.path.join(folder, f"worker-{context.get_worker_id()}-{context.get_job_id()}-{os.getpid()}.err")

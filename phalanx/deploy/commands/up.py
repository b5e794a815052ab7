"""`phalanx up`: start Ray or attach to it, start the deployment, stay until it ends."""

import argparse
import os
import threading
import time
from pathlib import Path

from rich.console import Console

from phalanx.deploy import detached
from phalanx.deploy.config import ClusterConfig, load_config
from phalanx.deploy.plan import DeploymentPlan
from phalanx.deploy.ports import server_problems
from phalanx.deploy.preparation import Prepared, prepare
from phalanx.deploy.state import Deployment, Deployments, process_started
from phalanx.deploy.supervisor import Progress, Supervisor
from phalanx.deploy.up_report import UpReport
from phalanx.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """FILE [--detach] [--json]."""
    parser.add_argument("file", type=Path, metavar="FILE", help="cluster file")
    parser.add_argument("--detach", action="store_true", help="return when it is ready; it runs on in the background")
    parser.add_argument("--json", action="store_true", help="progress as JSON lines")
    parser.add_argument("--log", type=Path, help=argparse.SUPPRESS)  # of the background process, for its record


def run(arguments: argparse.Namespace) -> int:
    """Serve until `phalanx down`, Ctrl-C or a fatal error; everything that was started is ended."""
    config = load_config(arguments.file)
    problems = server_problems(config.server)
    if problems:
        raise ConfigError("\n".join(problems))
    is_verbose = os.environ.get("PHALANX_DEBUG") == "1"
    with UpReport(Console(), as_json=arguments.json, is_verbose=is_verbose) as report:
        if arguments.detach:
            detached.start(arguments.file, report)
        else:
            _serve(config, arguments, report)
    return 0


def _serve(config: ClusterConfig, arguments: argparse.Namespace, report: UpReport) -> None:
    begun = time.monotonic()
    where = "starting a local Ray cluster" if config.ray.address == "local" else f"Ray at {config.ray.address}"

    def show_plan(plan: DeploymentPlan) -> None:
        report.event("plan", _summary(plan), {"digest": plan.digest})
        report.waiting(where)

    report.waiting(f"reading {config.model.path}")
    with prepare(config, start_local=True, on_plan=show_plan) as prepared:
        ray_s = time.monotonic() - begun
        report.event("ray", f"Ray is up after {ray_s:.1f} s", {"took_s": ray_s})
        report.waiting("starting the controller")
        up = _Up(prepared, arguments, report, ray_s)
        try:
            Supervisor(prepared.plan, up.progress).run()
        finally:
            up.forget()
        report.waiting("ending Ray")
    report.event("ended", "everything has ended")


class _Up:
    """What `up` makes of the supervisor's progress: lines, and the record by which other commands find it."""

    def __init__(self, prepared: Prepared, arguments: argparse.Namespace, report: UpReport, ray_s: float) -> None:
        self._plan, self._arguments, self._report, self._ray_s = prepared.plan, arguments, report, ray_s
        self._starting = set(range(prepared.plan.replicas))
        self._lock = threading.Lock()
        self._deployments = Deployments()
        self._record: Deployment | None = None

    def progress(self, progress: Progress) -> None:
        """Pass it on; called from any thread of the supervisor."""
        if progress.event == "log":
            self._report.log(progress.text)
            return
        self._report.event(progress.event, progress.text, progress.data)
        if progress.event == "controller":
            self._remember(progress.data["listen"])
            ranks = self._plan.replicas * self._plan.parallel.shape.world_size
            self._report.waiting(f"starting {ranks} ranks: import, load, warm up")
        elif progress.event == "ready" and self._is_last(progress.data["replica"]):
            self._serving(progress)
        elif progress.event == "drain":
            self._report.waiting("waiting for running requests; a second Ctrl-C or `phalanx down --now` ends them")

    def forget(self) -> None:
        """The deployment has ended."""
        if self._record is not None:
            self._deployments.remove(self._record)

    def _is_last(self, replica: int) -> bool:
        """Whether this replica's first start completes the deployment."""
        with self._lock:
            was_starting = replica in self._starting
            self._starting.discard(replica)
            return was_starting and not self._starting

    def _remember(self, listen: str) -> None:
        started = process_started(os.getpid())
        assert started is not None, "this process runs"
        self._record = Deployment(
            pid=os.getpid(),
            process_started=started,
            listen=listen,
            file=str(self._arguments.file.resolve()),
            log="" if self._arguments.log is None else str(self._arguments.log),
            started=time.time(),
        )
        self._deployments.add(self._record)

    def _serving(self, progress: Progress) -> None:
        assert self._record is not None, "the controller is up before a replica"
        startup_s = {"ray": self._ray_s, **progress.data["startup_s"]}
        phases = "".join(f"\n  {phase:<12}{seconds:6.1f} s" for phase, seconds in startup_s.items())
        text = (
            f"start-up took {sum(startup_s.values()):.1f} s:{phases}\n"
            f"serving {self._plan.model.name} at {self._record.listen}; try\n"
            f"  phalanx generate 'def main():' --address {self._record.listen}\n"
            f"  phalanx status {self._arguments.file}\n"
            f"  phalanx down {self._arguments.file}"
        )
        data = {"listen": self._record.listen, "pid": self._record.pid, "startup_s": startup_s}
        self._report.waiting("")
        self._report.event("serving", text, data)


def _summary(plan: DeploymentPlan) -> str:
    parallel, kv = plan.parallel, plan.kv
    return (
        f"{plan.model.name} ({plan.model.dtype}) on {plan.device}: {plan.replicas} x {parallel.shape.world_size} ranks "
        f"(tensor {parallel.tensor}, pipeline {parallel.pipeline}, data {parallel.data}), {kv.capacity_tokens} tokens "
        f"of KV per data rank, up to {plan.scheduler.max_model_len} per sequence"
    )

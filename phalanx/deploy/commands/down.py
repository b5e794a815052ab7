"""`phalanx down`: let a deployment end, and check that it is gone."""

import argparse
import contextlib
import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable

import psutil
from rich.console import Console

from phalanx.deploy.client import Client
from phalanx.deploy.commands import target
from phalanx.deploy.ports import listen_problem
from phalanx.deploy.state import Deployment, Deployments
from phalanx.errors import PhalanxError

POLL_S = 0.2
BETWEEN_SIGNALS_S = 0.5
"""Two signals at once could arrive as one."""

GONE_S = 15.0
"""After the supervisor: how long its Ray processes may take to follow it."""

NOW_S = 30.0
"""How long a supervisor told to end at once may take."""

PLACE = re.compile(r"\bnode (\S+?)(?:/\S+)? pid (\d+)")
"""In the lines of `Cluster.Status` that say what runs where."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """[FILE | --address] [--now] [--json]."""
    target.add_arguments(parser)
    parser.add_argument("--now", action="store_true", help="end running requests instead of waiting for them")
    parser.add_argument("--json", action="store_true", help="the outcome as one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Stop a deployment of this user on this machine; 1 if something of it is still there."""
    deployment = target.find_deployment(arguments)
    if deployment is None:
        print(json.dumps({"stopped": None, "left": []}) if arguments.json else "nothing is running")
        return 0
    console = Console(stderr=True)
    with console.status(f"stopping {deployment.listen}") as spinner:
        left = _stop(deployment, arguments.now, lambda text: spinner.update(text))
    Deployments().remove(deployment)
    if arguments.json:
        print(json.dumps({"stopped": deployment.listen, "left": left}))
    elif left:
        print(f"stopped {deployment.listen}, but this is left:\n  " + "\n  ".join(left))
    else:
        print(f"stopped {deployment.listen}: its processes have ended and its port is free")
    return 1 if left else 0


def _stop(deployment: Deployment, is_urgent: bool, progress: Callable[[str], None]) -> list[str]:
    """Signal and wait; returns a line for each thing that is left."""
    family = _family(deployment)
    for _ in range(2 if is_urgent else 1):
        with contextlib.suppress(ProcessLookupError):
            os.kill(deployment.pid, signal.SIGTERM)
        time.sleep(BETWEEN_SIGNALS_S)
    deadline = time.monotonic() + NOW_S if is_urgent else None
    with Client(deployment.listen, retry_s=0.0) as client:
        while deployment.is_running and (deadline is None or time.monotonic() < deadline):
            progress(_jobs(client) or f"stopping {deployment.listen}: ending its processes")
            time.sleep(POLL_S)
    progress("checking that everything is gone")
    _, alive = psutil.wait_procs(family, timeout=GONE_S)
    left = [f"pid {process.pid}: {_command(process)}" for process in alive if _is_there(process)]
    if listen_problem(deployment.listen) is not None:
        left.append(f"port {deployment.listen} is taken")
    return left


def _family(deployment: Deployment) -> list[psutil.Process]:
    """Every process of the deployment on this machine, whether it is a child of the supervisor or of a Ray node."""
    family = {}
    with contextlib.suppress(psutil.NoSuchProcess):
        supervisor = psutil.Process(deployment.pid)
        family = {process.pid: process for process in (supervisor, *supervisor.children(recursive=True))}
    own = {address.address for addresses in psutil.net_if_addrs().values() for address in addresses}
    own |= {socket.gethostname()}
    for node, pid in PLACE.findall("\n".join(_ranks(deployment))):
        if node in own and int(pid) not in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                family[int(pid)] = psutil.Process(int(pid))
    return list(family.values())


def _ranks(deployment: Deployment) -> list[str]:
    with contextlib.suppress(PhalanxError), Client(deployment.listen, retry_s=0.0) as client:
        return [line for replica in client.status().replicas for line in replica.ranks]
    return []


def _jobs(client: Client) -> str:
    """What it is still waiting for; "" when the controller does not answer any more."""
    try:
        jobs = client.status().jobs
    except PhalanxError:
        return ""
    return f"waiting for {jobs.running} running and {jobs.queued} queued requests; `phalanx down --now` ends them"


def _is_there(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _command(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())[:120]
    return "?"

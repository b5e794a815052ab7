"""`phalanx status`: what runs where, and how loaded it is."""

import argparse
import datetime

from rich.console import Console
from rich.table import Table
from rich.text import Text

from phalanx.deploy.client import ClusterState, ReplicaStatus
from phalanx.deploy.commands import connection, target


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """[FILE | --address] [--json]."""
    target.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="everything as one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Print the state; 0 even while no replica is ready, since the service answers."""
    with connection.connect(arguments) as client:
        state = client.status()
        if arguments.json:
            connection.print_json(state)
            return 0
        deployment = target.find_deployment(arguments)
        since = "" if deployment is None else f", up for {_age(deployment.started)} (pid {deployment.pid})"
        print_state(Console(), state, f"{client.address}{since}")
    return 0


def print_state(console: Console, state: ClusterState, where: str) -> None:
    """The service in a line, its replicas as a table, their ranks below."""
    mode = "draining" if state.draining else "serving"
    jobs = state.jobs
    console.print(Text(f"{state.model} at {where}: {mode}, phalanx {state.version}"), soft_wrap=True)
    console.print(f"jobs: {jobs.running} running, {jobs.queued} queued, {jobs.finished} finished and kept")
    table = Table(box=None, pad_edge=False)
    for heading in ("replica", "state", "start", "data", "running", "waiting", "free blocks", "prefix hits", "tokens"):
        table.add_column(heading, justify="left" if heading == "state" else "right", no_wrap=True)
    for replica in state.replicas:
        table.add_row(*_row(replica))
    console.print(table)
    for replica in state.replicas:
        for line in (*replica.ranks, *_last_words(replica)):
            console.print(Text(f"  replica {replica.replica}: {line}"), soft_wrap=True)


def _row(replica: ReplicaStatus) -> tuple[str, ...]:
    hits = f"{100 * replica.prefix_hits / replica.prefix_queries:.0f} %" if replica.prefix_queries else "-"
    blocks = f"{replica.num_free_blocks} of {replica.num_total_blocks}"
    counts = (replica.num_running, replica.num_waiting)
    start = f"#{replica.incarnation}"
    return (
        str(replica.replica),
        replica.state,
        start,
        str(replica.data),
        *map(str, counts),
        blocks,
        hits,
        str(replica.num_generated_tokens),
    )


def _last_words(replica: ReplicaStatus) -> list[str]:
    scale = replica.scale
    under_way = [] if scale is None else [f"scaling {scale.old} -> {scale.new} ({scale.op_id}): {scale.phase}"]
    experts = []
    if any(replica.expert_load):
        balance = sum(replica.expert_load) / len(replica.expert_load) / max(replica.expert_load)
        loads = ", ".join(map(str, replica.expert_load))
        experts = [f"expert load per rank: {loads} tokens (balancedness {balance:.2f}), {replica.num_moved} moved"]
        if replica.num_single_experts:
            experts[0] += f", {replica.num_single_experts} experts have one copy"
    return [*experts, *under_way, *([f"last failure: {replica.error}"] if replica.error else [])]


def _age(started: float) -> str:
    seconds = datetime.datetime.now(datetime.UTC).timestamp() - started
    return str(datetime.timedelta(seconds=int(seconds)))

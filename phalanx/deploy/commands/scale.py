"""`phalanx scale`: another number of data-parallel ranks for a mixture-of-experts model, while it serves."""

import argparse
import sys
import time
import uuid

from rich.console import Console

from phalanx.deploy.client import Client, ScaleOperation, ScalePlan
from phalanx.deploy.client_scale import ReplicaScalePlan
from phalanx.deploy.commands import connection, target
from phalanx.errors import ConfigError
from phalanx.runtime.memory import readable

POLL_S = 0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """[FILE | --address] --data N [--replica R] [--leave NODE]... [--plan] [--yes] [--op-id ID] [--json]."""
    target.add_arguments(parser)
    parser.add_argument("--data", type=int, required=True, metavar="N", help="data-parallel ranks of each replica")
    parser.add_argument("--replica", type=int, metavar="R", help="only this one; without it all")
    parser.add_argument(
        "--leave", action="append", default=[], metavar="NODE", help="no rank stays on this Ray node (as in status)"
    )
    parser.add_argument("--plan", action="store_true", help="print what it takes and change nothing")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument(
        "--op-id", metavar="ID", help="name of the operation: the same one again follows it instead of starting another"
    )
    parser.add_argument("--json", action="store_true", help="the plan and each state as JSON lines; asks nothing")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan, apply it, follow the operation; 0 only when every replica has the new size."""
    with connection.connect(arguments) as client:
        plan = client.plan_scale(arguments.data, arguments.replica, leave=arguments.leave)
        if arguments.json:
            connection.print_json(plan)
        else:
            print("\n".join(map(plan_text, plan.replicas)))
        refusals = [f"replica {one.replica}: {one.refusal}" for one in plan.replicas if one.refusal]
        # What has an id may have been done already; if not, it is refused when it is applied.
        if refusals and (arguments.plan or not arguments.op_id):
            raise ConfigError("\n".join(refusals))
        if arguments.plan:
            return 0
        if not (arguments.yes or arguments.json or _is_wanted()):
            print("nothing was changed")
            return 0
        operation = _apply(client, arguments, plan)
    if not arguments.json:
        print("\n".join(_outcome(operation)))
    return 0 if operation.phase == "DONE" else 1


def plan_text(plan: ReplicaScalePlan) -> str:
    """What scaling takes in one replica, for people."""
    name = f"replica {plan.replica}: data {plan.old} -> {plan.new}"
    if plan.refusal:
        return f"{name} is refused"
    width = plan.pipeline * plan.tensor
    slots = [size * plan.tensor * plan.slots_per_rank for size in (plan.old, plan.new)]
    lines = [
        f"{name}: {plan.old * width} -> {plan.new * width} ranks, {slots[0]} -> {slots[1]} expert slots per layer "
        f"({plan.slots_per_rank} per rank) for {plan.num_experts} experts"
    ]
    if plan.num_added:
        lines.append(f"  {plan.num_added} new ranks load {readable(plan.loaded_bytes)} from disk, each:")
        lines += [
            f"    stage {number}: {readable(stage.dense)} of weights without experts, "
            f"{readable(stage.experts)} of experts"
            for number, stage in enumerate(plan.stages)
        ]
    if plan.num_removed:
        lines.append(
            f"  {plan.num_removed} ranks leave; before, {plan.moved_rows} expert rows ({readable(plan.moved_bytes)}) "
            "move to ranks that stay"
        )
    for number, stage in enumerate(plan.stages):
        total = stage.dense + stage.experts + stage.workspace + stage.kv
        lines.append(
            f"  memory of a rank of stage {number}: {readable(total)} ({readable(stage.dense + stage.experts)} of "
            f"weights, {readable(stage.workspace)} of workspace, {readable(stage.kv)} of KV)"
        )
    return "\n".join(lines)


def _is_wanted() -> bool:
    if not sys.stdin.isatty():
        raise ConfigError("nobody can be asked here whether to go on; add --yes")
    return input("go on? [y/N] ").strip().lower() in ("y", "yes")


def _apply(client: Client, arguments: argparse.Namespace, plan: ScalePlan) -> ScaleOperation:
    """Until the operation is over; it goes on by itself if this program ends."""
    op_id = arguments.op_id or f"scale-{uuid.uuid4().hex[:8]}"
    shown = None
    with Console(stderr=True).status(f"{op_id}: starting") as spinner:
        while True:
            operation = client.apply_scale(
                op_id, arguments.data, arguments.replica, plan_id=plan.plan_id, leave=arguments.leave
            )
            if operation != shown:
                if arguments.json:
                    connection.print_json(operation)
                spinner.update(f"{op_id}: {operation.phase}")
                shown = operation
            if operation.is_over:
                return operation
            time.sleep(POLL_S)


def _outcome(operation: ScaleOperation) -> list[str]:
    lines = []
    for part in operation.replicas:
        detail = f" ({part.detail})" if part.detail else ""
        size = f"has data {part.new} now" if part.phase == "DONE" else f"was not scaled from {part.old} to {part.new}"
        lines.append(f"{operation.op_id}: replica {part.replica} {size}{detail}")
    return lines

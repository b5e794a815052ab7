"""A deployment plan for people and for programs: `phalanx plan` and `phalanx plan --json`."""

import io
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from phalanx.deploy.fields import BYTE_UNITS
from phalanx.deploy.plan import DeploymentPlan, RankPlan
from phalanx.runtime.memory import readable

SECTIONS = ("model", "ray", "device", "replicas", "parallel", "scheduler", "kv", "moe", "server", "workers", "kernels")


def plan_text(plan: DeploymentPlan, width: int = 100) -> str:
    """The plan as text: the resolved file, the rank map with memory, capacity, and the divisions that were checked."""
    out = io.StringIO()
    console = Console(file=out, width=width, color_system=None, highlight=False)
    _print_lines(console, "# Resolved file", resolved_file(plan))
    _print_lines(console, "# Ranks")
    console.print(_rank_table(plan.ranks))
    _print_lines(console, "", "# Capacity", *_capacity(plan), "", "# Checks", *plan.checks, f"digest {plan.digest}")
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def _print_lines(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def plan_json(plan: DeploymentPlan) -> dict[str, Any]:
    """The plan as plain data, with its digest and the capacity in tokens."""
    return {**asdict(plan), "digest": plan.digest, "capacity_tokens": plan.kv.capacity_tokens}


def resolved_file(plan: DeploymentPlan) -> str:
    """A cluster file without `auto`; on the same hardware it resolves to an equal plan."""
    tree = {section: _plain(asdict(plan)[section]) for section in SECTIONS}
    tree["kv"]["cpu_memory"] = _size(plan.kv.cpu_memory)
    tree["server"]["max_message"] = _size(plan.server.max_message)
    for section, key in (("server", "drain"), ("server", "detach_grace"), ("ray", "placement_timeout")):
        tree[section][key] = _duration(tree[section][key])
    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=10_000)


def _plain(value: Any) -> Any:
    """Tuples become lists: YAML has no tuples."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _size(num_bytes: int) -> str:
    """The largest unit that writes it as a whole number."""
    unit, factor = max(
        ((unit, factor) for unit, factor in BYTE_UNITS.items() if num_bytes % factor == 0), key=lambda pair: pair[1]
    )
    return f"{num_bytes // factor}{unit}" if num_bytes else "0B"


def _duration(seconds: float) -> str:
    return f"{seconds:.6f}".rstrip("0").rstrip(".") + "s"


def _rank_table(ranks: tuple[RankPlan, ...]) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("replica", "rank", "pp", "dp", "tp", "node", "slot", "layers", "weights", "workspace", "KV", "of"):
        if heading == "node":
            table.add_column(heading, overflow="fold")
        else:
            table.add_column(heading, justify="right", no_wrap=True)
    for rank in ranks:
        where = (rank.replica, rank.rank, rank.pp, rank.dp, rank.tp, rank.node, rank.slot)
        layers = f"{rank.first_layer}-{rank.end_layer - 1}"
        memory = (rank.weight_bytes, rank.workspace_bytes, rank.kv_bytes, rank.limit_bytes)
        table.add_row(*map(str, where), layers, *map(readable, memory))
    return table


def _capacity(plan: DeploymentPlan) -> Iterator[str]:
    kv, longest, domains = plan.kv, plan.scheduler.max_model_len, plan.replicas * plan.parallel.data
    yield f"{kv.num_blocks - 1} usable blocks of {kv.block_size} tokens = {kv.capacity_tokens} tokens per data rank"
    yield f"replicas x data = {plan.replicas} x {plan.parallel.data}: {domains * kv.capacity_tokens} tokens in all"
    sequences = kv.capacity_tokens // (-(-longest // kv.block_size) * kv.block_size)
    yield (
        f"per data rank up to {plan.scheduler.max_sequences} sequences at once, "
        f"{min(sequences, plan.scheduler.max_sequences)} of them if each has the longest length of {longest} tokens"
    )

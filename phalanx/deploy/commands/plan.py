"""`phalanx plan`: the resolved file, rank map, memory and capacity, before any device is taken."""

import argparse
import json
from pathlib import Path

from phalanx.deploy.config import load_config
from phalanx.deploy.plan_text import plan_json, plan_text
from phalanx.deploy.preparation import prepare


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """FILE [--json]."""
    parser.add_argument("file", type=Path, metavar="FILE", help="cluster file")
    parser.add_argument("--json", action="store_true", help="the whole plan as one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; an impossible one raises the sentences that say why."""
    with prepare(load_config(arguments.file), start_local=False) as prepared:
        plan = prepared.plan
    print(json.dumps(plan_json(plan), indent=2) + "\n" if arguments.json else plan_text(plan), end="")
    return 0

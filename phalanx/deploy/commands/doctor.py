"""`phalanx doctor`: would this cluster file work on its cluster, and if not, what to do."""

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.text import Text

from phalanx.deploy.doctor import Check, examine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """FILE [--json]."""
    parser.add_argument("file", type=Path, metavar="FILE", help="cluster file")
    parser.add_argument("--json", action="store_true", help="one JSON line per check")


def run(arguments: argparse.Namespace) -> int:
    """Print each check as it ends; 1 if any failed."""
    console = Console()
    failed = []
    with console.status("checking") as spinner:
        if arguments.json:
            spinner.stop()

        def tell(check: Check) -> None:
            if not check.is_ok:
                failed.append(check)
            if arguments.json:
                print(json.dumps(check._asdict()), flush=True)
            else:
                _print(console, check)

        examine(arguments.file, tell)
    return 1 if failed else 0


def _print(console: Console, check: Check) -> None:
    mark = Text("ok    ", style="green") if check.is_ok else Text("FAIL  ", style="bold red")
    detail = check.detail.replace("\n", "\n" + " " * 18)
    console.print(mark + Text(f"{check.name:<12}{detail}"), soft_wrap=True)
    if not check.is_ok and check.fix:
        console.print(Text(f"{'':18}fix: {check.fix}"), soft_wrap=True)

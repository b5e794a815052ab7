"""The program `phalanx`: one file of `phalanx/deploy/commands/` per command, loaded only when it is the one asked for.

A command's file exports `add_arguments(parser)` and `run(arguments) -> exit code`.
"""

import argparse
import json
import os
import sys
import traceback
from collections.abc import Sequence

import phalanx
from phalanx import plugins
from phalanx.errors import (
    CheckpointError,
    ConfigError,
    InvalidRequestError,
    OverloadedError,
    PhalanxError,
    UnavailableError,
)

COMMANDS = {
    "up": "serve the deployment that a cluster file describes",
    "down": "stop a deployment: running requests end first, then every process does",
    "plan": "print what a cluster file resolves to, or why it cannot work",
    "doctor": "check the Ray cluster that a cluster file is meant for",
    "status": "show replicas, ranks and load of a running deployment",
    "drain": "let a running deployment refuse new requests",
    "scale": "grow or shrink the expert group of a running deployment",
    "generate": "stream the answer to a prompt",
    "submit": "start a job that runs without a reader",
    "attach": "follow a job",
    "cancel": "end a job",
}

OK, FAILED, BAD_INPUT, UNREACHABLE, INTERRUPTED = 0, 1, 2, 3, 130

EXIT_CODES = """\
exit codes:
  0    done
  1    a check failed, a request failed, or a deployment was lost
  2    the command line, the cluster file, the checkpoint or the request is wrong
  3    no deployment answers, or it does not take requests now
  130  interrupted by Ctrl-C

PHALANX_DEBUG=1 prints the traceback of an error as well.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        arguments = _parse(words)
        return int(arguments.run(arguments))
    except PhalanxError as error:
        return _refuse(error, as_json="--json" in words)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has gone, as `head` does: nothing to say and nobody to say it to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK


def exit_code(error: PhalanxError) -> int:
    """The exit code that stands for an error."""
    if isinstance(error, ConfigError | CheckpointError | InvalidRequestError):
        return BAD_INPUT
    return UNREACHABLE if isinstance(error, UnavailableError | OverloadedError) else FAILED


def _parse(words: list[str]) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="phalanx", description=phalanx.__doc__, epilog=EXIT_CODES, formatter_class=form
    )
    parser.add_argument("--version", action="version", version=f"phalanx {phalanx.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, line in COMMANDS.items():
        command = commands.add_parser(name, help=line, description=line, epilog=EXIT_CODES, formatter_class=form)
        # Only the chosen one is imported: `up` brings Ray and torch, `--help` must not.
        if words[:1] == [name]:
            module = plugins.load("deploy/commands", name, ("add_arguments", "run"))
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser.parse_args(words)


def _refuse(error: PhalanxError, *, as_json: bool) -> int:
    if os.environ.get("PHALANX_DEBUG") == "1":
        traceback.print_exception(error)
    code = exit_code(error)
    if as_json:
        print(json.dumps({"error": str(error), "kind": type(error).__name__, "exit_code": code}), flush=True)
    else:
        print(f"phalanx: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())

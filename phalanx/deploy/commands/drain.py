"""`phalanx drain`: no new requests from now on; accepted ones run to their end, the service stays up."""

import argparse

from phalanx.deploy.commands import connection, target


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """[FILE | --address] [--undo] [--json]."""
    target.add_arguments(parser)
    parser.add_argument("--undo", action="store_true", help="take new requests again")
    parser.add_argument("--json", action="store_true", help="the jobs it still has as one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Switch, and print what is still to be done."""
    with connection.connect(arguments) as client:
        jobs = client.drain(undo=arguments.undo)
    if arguments.json:
        connection.print_json({"draining": not arguments.undo, "jobs": jobs})
    else:
        mode = "takes requests again" if arguments.undo else "refuses new requests"
        print(f"{client.address} {mode}: {jobs.running} running, {jobs.queued} queued")
    return 0

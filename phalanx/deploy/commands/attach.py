"""`phalanx attach`: follow a job from a position on, any number of times."""

import argparse

from phalanx.deploy.commands import connection, target
from phalanx.deploy.commands.output import print_stream


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """ID [--from N] [--address] [--json]."""
    parser.add_argument("request_id", metavar="ID", help="of the job")
    parser.add_argument("--from", type=int, default=0, dest="position", metavar="N", help="skip this many tokens")
    target.add_arguments(parser, with_file=False)
    parser.add_argument("--json", action="store_true", help="one JSON line per chunk")


def run(arguments: argparse.Namespace) -> int:
    """Stream; 1 if the job ended with an error. Leaving does not end the job."""
    with connection.connect(arguments) as client:
        num_choices = len(client.get(arguments.request_id).choices)
        chunks = client.stream(arguments.request_id, arguments.position)
        return print_stream(chunks, as_json=arguments.json, num_choices=num_choices)

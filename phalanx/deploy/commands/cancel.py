"""`phalanx cancel`: end a job; nothing happens to a finished one."""

import argparse

from phalanx.deploy.commands import connection, target


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """ID [--address] [--json]."""
    parser.add_argument("request_id", metavar="ID", help="of the job")
    target.add_arguments(parser, with_file=False)
    parser.add_argument("--json", action="store_true", help="the job as one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Cancel and print the job's state; what it has produced can still be read with attach."""
    with connection.connect(arguments) as client:
        job = client.cancel(arguments.request_id)
    if arguments.json:
        connection.print_json(job)
    else:
        print(f"{job.request_id} is {job.state}")
    return 0

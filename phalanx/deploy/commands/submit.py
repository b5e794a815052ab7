"""`phalanx submit`: start a job that runs without a reader; `phalanx attach` follows it."""

import argparse

from phalanx.deploy.commands import connection, request_flags, target


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """PROMPT, the flags of a request, --address, --json."""
    request_flags.add_arguments(parser)
    target.add_arguments(parser, with_file=False)
    parser.add_argument("--json", action="store_true", help="the job as one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Submit and print the job's id; the same id and request again name the same job."""
    request = request_flags.request(arguments)
    with connection.connect(arguments) as client:
        job = client.submit(**request)
    if arguments.json:
        connection.print_json(job)
    else:
        print(f"{job.request_id} is {job.state}, seed {job.seed}; follow it with: phalanx attach {job.request_id}")
    return 0

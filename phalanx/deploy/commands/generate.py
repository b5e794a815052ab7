"""`phalanx generate`: stream the answer to a prompt; Ctrl-C cancels the job."""

import argparse

from phalanx.deploy.commands import connection, request_flags, target
from phalanx.deploy.commands.output import print_stream


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """PROMPT, the flags of a request, --address, --json."""
    request_flags.add_arguments(parser)
    target.add_arguments(parser, with_file=False)
    parser.add_argument("--json", action="store_true", help="one JSON line per chunk")


def run(arguments: argparse.Namespace) -> int:
    """Stream; 1 if the job ended with an error."""
    request = request_flags.request(arguments)
    with connection.connect(arguments) as client:
        chunks = client.generate(**request)
        try:
            return print_stream(chunks, as_json=arguments.json, num_choices=request["params"].n)
        finally:
            chunks.close()  # before the client is: this is what cancels an unfinished job

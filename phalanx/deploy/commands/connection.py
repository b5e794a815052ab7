"""The client of the commands that talk to a running deployment."""

import argparse
import sys
from typing import Any

import msgspec

from phalanx.deploy.client import Client
from phalanx.deploy.commands import target

RETRY_S = 3.0
"""A person waits at the other end: shorter than the patience of a program."""


def connect(arguments: argparse.Namespace) -> Client:
    """A client of the deployment that was asked for."""
    return Client(target.client_address(arguments), retry_s=RETRY_S)


def print_json(value: Any) -> None:
    """One line of JSON: a dataclass of the client, or plain data."""
    sys.stdout.write(msgspec.json.encode(value).decode() + "\n")
    sys.stdout.flush()

"""Which running deployment a command means."""

import argparse
from pathlib import Path

from phalanx.deploy.config import load_config
from phalanx.deploy.server.addresses import split_address
from phalanx.deploy.state import Deployment, Deployments
from phalanx.errors import ConfigError

DEFAULT_ADDRESS = "127.0.0.1:50051"


def add_arguments(parser: argparse.ArgumentParser, *, with_file: bool = True) -> None:
    """`--address`, and the cluster file where the command has no other positional argument."""
    if with_file:
        parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="cluster file of the deployment")
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        help=f"of the deployment; without it the only one this user has up here, else {DEFAULT_ADDRESS}",
    )


def find_deployment(arguments: argparse.Namespace) -> Deployment | None:
    """The deployment on this machine that was asked for; None if it is not running.

    Raises:
        ConfigError: several are running and none was named, or the file or address is wrong.
    """
    deployments = Deployments()
    named = _named_address(arguments)
    if named is not None and split_address(named)[1]:
        return deployments.find(split_address(named)[1])
    running = deployments.running()
    if named is not None:  # port 0: whichever was free
        running = [deployment for deployment in running if deployment.file == str(arguments.file.resolve())]
    if len(running) > 1:
        known = ", ".join(f"{deployment.listen} ({deployment.file})" for deployment in running)
        raise ConfigError(f"{len(running)} deployments are running: {known}; name one with --address")
    return running[0] if running else None


def client_address(arguments: argparse.Namespace) -> str:
    """Where to connect.

    Raises:
        ConfigError: as `find_deployment`.
    """
    named = _named_address(arguments)
    if named is not None and split_address(named)[1]:
        return _dialable(named)
    deployment = find_deployment(arguments)
    return DEFAULT_ADDRESS if deployment is None else _dialable(deployment.listen)


def _dialable(address: str) -> str:
    """A service that listens on every interface is reached on this machine's own."""
    host, port = split_address(address)
    return f"127.0.0.1:{port}" if host in ("0.0.0.0", "::") else address


def _named_address(arguments: argparse.Namespace) -> str | None:
    """From `--address` or the file; None = neither was given."""
    file: Path | None = getattr(arguments, "file", None)
    address: str | None = arguments.address
    if address is not None:
        if file is not None:
            raise ConfigError(f"both --address {address} and the file {file} were given; give one")
        split_address(address)
        return address
    return None if file is None else load_config(file).server.listen

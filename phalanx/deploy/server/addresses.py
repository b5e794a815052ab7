"""Addresses to listen on, and why one cannot be had."""

import socket

from phalanx.errors import ConfigError


def split_address(address: str) -> tuple[str, int]:
    """`host:port` or `[v6]:port`; port 0 = any free one.

    Raises:
        ConfigError: another form.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"address {address!r} is not host:port; write for example 127.0.0.1:50051, or port 0 for any")
    return host.removeprefix("[").removesuffix("]"), int(port)


def bind_error(address: str) -> ConfigError:
    """What stands in the way of listening on `address`, found out by trying with a plain socket."""
    host, port = split_address(address)
    reason = "the port was taken a moment ago"
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(where)
            probe.listen()
    except OSError as error:
        reason = error.strerror or str(error)
    return ConfigError(
        f"cannot listen on {address}: {reason}; stop the program that holds it, or configure another address "
        "(port 0 = any free port)"
    )

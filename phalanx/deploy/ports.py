"""Whether an address can be listened on, asked before anything is started."""

import socket

from phalanx.deploy.config import ServerConfig
from phalanx.deploy.server.addresses import bind_error, split_address


def listen_problem(address: str) -> str | None:
    """Why `host:port` cannot be listened on, with the way out; None = it can (port 0 always has a free one)."""
    host, port = split_address(address)
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            # As gRPC does it: a port whose last connections are still closing can be had, one with a listener cannot.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
            probe.listen()
    except OSError:
        return str(bind_error(address))
    return None


def server_problems(server: ServerConfig) -> list[str]:
    """What stands in the way of the controller's ports, `server.key: sentence` each."""
    addresses = {"listen": server.listen, "metrics": server.metrics, "engine_listen": server.engine_listen}
    problems = {key: listen_problem(address) for key, address in addresses.items() if address != "off"}
    return [f"server.{key}: {problem}" for key, problem in problems.items() if problem is not None]

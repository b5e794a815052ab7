"""A Ray cluster on this machine, in a process that ends with its stdin: it cannot outlive whoever started it.

Run as `python -m phalanx.deploy.local_ray NODES`; prints one JSON line with the address when all nodes are up. Ray ends
its processes when the one that started them is killed, all but the agents of each node: they wait a minute for a head
that is gone. So the supervisor, which anything may kill, does not start them itself.
"""

import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile

from ray.cluster_utils import Cluster

from phalanx.errors import ConfigError

OBJECT_STORE_BYTES = 80 * 2**20
"""The least Ray takes: nothing of ours passes through its object store."""

EXIT_S = 5.0


class LocalRay:
    """Starts the process; `close` ends the cluster.

    Args:
        num_nodes: how many nodes it pretends to have; each offers all CPUs, GPUs are on the first.

    Attributes:
        address: host:port of the head.

    Raises:
        ConfigError: it did not come up; Ray's own last words are in the message.
    """

    def __init__(self, num_nodes: int) -> None:
        with tempfile.TemporaryFile("w+") as errors:
            # Its own session: a Ctrl-C of the terminal reaches the supervisor alone, which needs Ray to end in order.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "phalanx.deploy.local_ray", str(num_nodes)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
            assert self._process.stdout is not None, "opened as a pipe"
            try:
                line = self._process.stdout.readline()
            except BaseException:
                self.close()
                raise
            if not line:
                self.close()
                errors.seek(0)
                raise ConfigError(f"a local Ray cluster did not start:\n{errors.read().strip()[-2000:]}")
        self.address = str(json.loads(line)["address"])

    def close(self) -> None:
        """End every process of the cluster; safe to call twice."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None, "opened as pipes"
            pipe.close()
        try:
            self._process.wait(2 * EXIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def main() -> None:
    """Start the nodes, say where, and end them when stdin ends."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    cluster = _start(int(sys.argv[1]))
    try:
        # Nobody reads any more when the supervisor was killed meanwhile.
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps({"address": cluster.address}), flush=True)
        while os.read(0, 4096):
            pass
    finally:
        _end(cluster)


def _start(num_nodes: int) -> Cluster:
    # In the main thread: the kernel ends these processes when the thread that started them ends.
    node = {"num_cpus": os.cpu_count() or 1, "object_store_memory": OBJECT_STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    for _ in range(num_nodes - 1):
        cluster.add_node(**node, num_gpus=0)
    cluster.wait_for_nodes()
    return cluster


def _end(cluster: Cluster) -> None:
    """End the raylets first: while the head lives, each takes its workers and agents along, within milliseconds."""
    processes = [(kind, process) for node in cluster.list_all_nodes() for kind, process in node.live_processes()]
    raylets = [process for kind, process in processes if kind == "raylet"]
    for raylet in raylets:
        raylet.terminate()
    for raylet in raylets:
        with contextlib.suppress(subprocess.TimeoutExpired):
            raylet.wait(EXIT_S / len(raylets))
    for _, process in processes:
        process.kill()
    cluster.shutdown()


if __name__ == "__main__":
    main()

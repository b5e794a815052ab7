"""A Ray cluster with one Ray node per node of a lab.

    with Lab(2, link=...) as lab, RayNodes(lab) as ray:       # head on node 0
        ray.add(1)
        lab.popen(0, [sys.executable, "driver.py", ray.address])

A driver runs in a node that has a Ray node. So `phalanx up` is started under `lab.nodes[0].inside()`, with
`ray: {address: <ray.address>}` and `server: {engine_listen: <lab.nodes[0].address>:0}`; clients outside reach its gRPC
port through `forward.Forward`.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.netlab.lab import Lab

PORT = 6379
"""Of the head; a node has all ports to itself."""

OBJECT_STORE_BYTES = 80 * 2**20
START_S = 60.0
HEALTH_CHECK_MS = "500"
"""Five that fail make a node dead: within 3 s instead of 15 s."""


class RayNodes:
    """Context manager: a head now, more nodes with `add`. The lab ends the processes, this removes their files.

    Args:
        lab: an entered one.
        head: index of the node of the head.
        num_cpus: what each Ray node offers, by default.

    Attributes:
        address: host:port of the head.
        folder: Ray's sessions and logs.

    Raises:
        RuntimeError: Ray does not start; its words are in the message.
    """

    def __init__(self, lab: Lab, *, head: int = 0, num_cpus: int = 2) -> None:
        self._lab = lab
        self._num_cpus = num_cpus
        self.address = f"{lab.nodes[head].address}:{PORT}"
        # Short: Ray keeps sockets in it.
        self.folder = Path(tempfile.mkdtemp(prefix="nl-"))
        try:
            self._start(head, ["--head", f"--port={PORT}", "--include-dashboard=false"], num_cpus)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def add(self, node: int, *, num_cpus: int | None = None) -> None:
        """Start a Ray node on a node that has none; returns when it has joined."""
        self._start(node, [f"--address={self.address}"], num_cpus or self._num_cpus)

    def kill(self, node: int) -> None:
        """Everything on the node ends at once, as after a power cut; `add` may start it again."""
        self._lab.kill(node)

    def close(self) -> None:
        """End all processes of the lab's nodes and remove Ray's files; safe to call twice."""
        for node in range(len(self._lab.nodes)):
            self._lab.kill(node)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, node: int, options: list[str], num_cpus: int) -> None:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *options]
        command += [f"--node-ip-address={self._lab.nodes[node].address}", f"--num-cpus={num_cpus}", "--num-gpus=0"]
        command += [f"--object-store-memory={OBJECT_STORE_BYTES}", f"--temp-dir={self.folder}/{node}"]
        process = self._lab.popen(
            node,
            [*command, "--disable-usage-stats"],
            env={"RAY_TMPDIR": str(self.folder), "RAY_health_check_period_ms": HEALTH_CHECK_MS},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        words, _ = process.communicate(timeout=START_S)
        if process.returncode:
            raise RuntimeError(f"no Ray node on node {node} of the lab:\n{words}")

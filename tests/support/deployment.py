"""A deployment as a user starts it, `phalanx up FILE --json`, and what a client and an operator see of it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from phalanx.deploy.client import Client, ReplicaStatus
from tests.support.census import Census

START_S = 90.0
STOP_S = 30.0
ROOT = Path(__file__).parents[2]


class Deployment:
    """One supervisor process; `events` is what it has printed, in order, each with the monotonic time it came."""

    def __init__(self, yaml: str, folder: Path) -> None:
        self.file = folder / "cluster.yaml"
        self.file.write_text(yaml)
        self.events: list[tuple[float, dict[str, Any]]] = []
        self._news = threading.Condition()
        self._errors = (folder / "stderr").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "phalanx.deploy.cli", "up", str(self.file), "--json"],
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=ROOT,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def address(self) -> str:
        """Of the gRPC port."""
        return str(self.wait_for("controller")["listen"])

    def wait_ready(self, replicas: int = 1, timeout_s: float = START_S) -> None:
        """Until every replica has announced itself."""
        self._wait(lambda: len({event["replica"] for event in self.all("ready")}) >= replicas, "ready", timeout_s)

    def wait_for(self, kind: str, timeout_s: float = START_S) -> dict[str, Any]:
        """The first event of a kind."""
        self._wait(lambda: bool(self.all(kind)), kind, timeout_s)
        return self.all(kind)[0]

    def all(self, kind: str) -> list[dict[str, Any]]:
        """Every event of a kind so far."""
        return [event for _, event in self.events if event["event"] == kind]

    def client(self, **options: Any) -> Client:
        """A new client of it."""
        return Client(self.address, **options)

    def replica(self, number: int = 0) -> ReplicaStatus:
        """What Status says of a replica now."""
        with self.client() as client:
            return client.status().replicas[number]

    def wait_end(self, timeout_s: float = STOP_S) -> int:
        """The exit code."""
        code = self.process.wait(timeout_s)
        self._reader.join(timeout_s)
        return code

    def stop(self) -> None:
        """Whatever state it is in: ask twice, then end it."""
        for kind in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGCONT)
                self.process.send_signal(kind)
                try:
                    self.process.wait(STOP_S / 3)
                except subprocess.TimeoutExpired:
                    continue
        self._reader.join(STOP_S)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._errors.close()

    def story(self) -> str:
        """Everything it has said, for the message of a failed test."""
        self._errors.seek(0)
        lines = [f"{at - self.events[0][0]:8.3f} {event['event']}: {event['text']}" for at, event in self.events]
        return "\n".join(["", *lines, self._errors.read()])

    def _wait(self, condition: Callable[[], bool], what: str, timeout_s: float) -> None:
        with self._news:
            self._news.wait_for(lambda: condition() or not self._reader.is_alive(), timeout_s)
        if not condition():
            raise AssertionError(f"no {what!r} within {timeout_s:g} s{self.story()}")

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._news:
                self.events.append((time.monotonic(), _event(line)))
                self._news.notify_all()
        with self._news:
            self._news.notify_all()


def _event(line: str) -> dict[str, Any]:
    """A line of progress, an error, or ("log") a line of the controller's log; stdout has nothing else."""
    row: dict[str, Any] = json.loads(line)
    if "exit_code" in row:
        return {"event": "error", "text": row["error"], **row}
    return row if row["source"] == "up" else {"event": "log", "text": line.rstrip()}


@contextmanager
def deployed(yaml: str, census: Census, *, replicas: int = 1) -> Iterator[Deployment]:
    """A running deployment, stopped afterwards. Its files are in a folder of its own, Ray's sessions too."""
    with short_folder() as folder:
        deployment = Deployment(yaml, folder)
        try:
            deployment.wait_ready(replicas)
            census.note_sockets()
            yield deployment
        except BaseException:
            print(deployment.story())
            raise
        finally:
            deployment.stop()


@contextmanager
def short_folder() -> Iterator[Path]:
    """A temporary folder for a deployment's files, Ray's and its record too. Short, because Ray keeps sockets in it."""
    folder = Path(tempfile.mkdtemp(prefix="ph-"))
    try:
        with mock.patch.dict(os.environ, RAY_TMPDIR=str(folder), XDG_RUNTIME_DIR=str(folder)):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def pids(replica: ReplicaStatus) -> list[int]:
    """Of the engine, then of the ranks."""
    return [int(re.findall(r"pid (\d+)", line)[0]) for line in replica.ranks]


def wait_until(condition: Callable[[], Any], timeout_s: float, what: str, *, interval_s: float = 0.02) -> float:
    """Poll; returns the seconds it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < timeout_s, f"not within {timeout_s:g} s: {what}"
        time.sleep(interval_s)
    return time.monotonic() - began

"""Which deployments this user has running on this machine: one small JSON file each, so that `phalanx down` finds them.

The folder is the user's own (0700): whoever can write there can make `down` signal any process of the user.
"""

import contextlib
import os
import stat
import tempfile
from pathlib import Path

import msgspec
import psutil

from phalanx.deploy.server.addresses import split_address
from phalanx.errors import ConfigError

SAME_START_S = 1.0
"""The operating system computes start times from ticks; a reused pid differs by far more."""


class Deployment(msgspec.Struct, frozen=True, kw_only=True):
    """One running `phalanx up`.

    Attributes:
        pid: of the supervisor.
        process_started: its start as the operating system counts it, so that a reused pid is not taken for it.
        listen: bound host:port of the public API.
        file: the cluster file, absolute.
        log: of a detached one; "" in the foreground.
        started: seconds since the epoch.
    """

    pid: int
    process_started: float
    listen: str
    file: str
    log: str
    started: float

    @property
    def port(self) -> int:
        """The key: two deployments on one machine cannot share it."""
        return split_address(self.listen)[1]

    @property
    def is_running(self) -> bool:
        """Whether the process that wrote this is still there."""
        started = process_started(self.pid)
        return started is not None and abs(started - self.process_started) < SAME_START_S


def process_started(pid: int) -> float | None:
    """When a process was started, seconds since the epoch; None if it has ended (a zombie has)."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return None


class Deployments:
    """The files of one folder.

    Raises:
        ConfigError: the folder belongs to somebody else, or others may write to it.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = default_folder() if folder is None else folder
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = self.folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise ConfigError(
                f"{self.folder} must be a folder of yours that nobody else can use (mode 0700); remove it"
            )

    def add(self, deployment: Deployment) -> None:
        """Write a deployment's file, whole or not at all; one of the same port is replaced."""
        with tempfile.NamedTemporaryFile("wb", dir=self.folder, delete=False) as file:
            file.write(msgspec.json.encode(deployment))
        os.replace(file.name, self._path(deployment.port))

    def remove(self, deployment: Deployment) -> None:
        """Forget a deployment; nothing happens if another one has its port by now."""
        if self._read(self._path(deployment.port)) == deployment:
            self._path(deployment.port).unlink(missing_ok=True)

    def find(self, port: int) -> Deployment | None:
        """The running deployment at a port."""
        return next((deployment for deployment in self.running() if deployment.port == port), None)

    def running(self) -> list[Deployment]:
        """All running ones, oldest first; files of dead or unreadable ones are removed."""
        alive = []
        for path in self.folder.glob("*.json"):
            deployment = self._read(path)
            if deployment is not None and deployment.is_running:
                alive.append(deployment)
            else:
                path.unlink(missing_ok=True)
        return sorted(alive, key=lambda deployment: deployment.started)

    def _path(self, port: int) -> Path:
        return self.folder / f"{port}.json"

    def _read(self, path: Path) -> Deployment | None:
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            return msgspec.json.decode(path.read_bytes(), type=Deployment)
        return None


def default_folder() -> Path:
    """`$XDG_RUNTIME_DIR/phalanx`, or `phalanx-<uid>` in the folder for temporary files."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "phalanx" if runtime else Path(tempfile.gettempdir()) / f"phalanx-{os.getuid()}"

"""What a test module leaves behind: processes, listening ports, files in /dev/shm. Machine-wide, whoever else runs.

Everything started while a census is open inherits a mark in its environment, and is found by it however it was
detached. Sockets are remembered by inode, so another program on the same port number is not taken for a leftover.
"""

import os
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

MARK = "PHALANX_CENSUS"
SHM = Path("/dev/shm")
LISTENING = "0A"


class Census:
    """Context manager: marks what is started inside, and fails on leaving if any of it is still there."""

    def __init__(self, grace_s: float = 10.0) -> None:
        self._grace_s = grace_s
        self._mark = f"{MARK}={uuid.uuid4().hex}"
        self._files = set(SHM.iterdir())
        self._sockets: set[str] = set()

    def __enter__(self) -> Self:
        os.environ[MARK] = self._mark.partition("=")[2]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        del os.environ[MARK]
        problem = self._wait_for_none()
        for process in self.processes():
            process.kill()
        assert error is not None or problem is None, problem

    def processes(self) -> list[psutil.Process]:
        """Every live process that was started inside, by it or by one of its descendants."""
        found = []
        for process in psutil.process_iter():
            try:
                marked = self._mark.encode() in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
            if marked:
                found.append(process)
        return found

    def note_sockets(self) -> int:
        """Remember the ports that marked processes listen on now; returns how many are known."""
        listening = _listening()
        for process in self.processes():
            for link in _descriptors(process.pid):
                if link.startswith("socket:["):
                    self._sockets.update({link[8:-1]} & listening.keys())
        return len(self._sockets)

    def assert_gone(self, within_s: float) -> float:
        """Wait until nothing started inside is left; returns the seconds it took."""
        began = time.monotonic()
        self._grace_s, grace_s = within_s, self._grace_s
        problem = self._wait_for_none()
        self._grace_s = grace_s
        assert problem is None, problem
        return time.monotonic() - began

    def _wait_for_none(self) -> str | None:
        deadline = time.monotonic() + self._grace_s
        while (problem := self._left()) is not None and time.monotonic() < deadline:
            time.sleep(0.1)
        return None if problem is None else f"left behind after {self._grace_s:g} s: {problem}"

    def _left(self) -> str | None:
        if processes := self.processes():
            return f"processes {[(process.pid, command(process)[:120]) for process in processes]}"
        listening = _listening()
        if ports := [listening[inode] for inode in self._sockets if inode in listening]:
            return f"listening ports {ports}"
        new = set(SHM.iterdir()) - self._files
        if new and (files := new - _open_files()):
            return f"files {sorted(map(str, files))}"
        return None


def _listening() -> dict[str, int]:
    """Inode -> port of every listening TCP socket."""
    found = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENING:
                found[fields[9]] = int(fields[1].rpartition(":")[2], 16)
    return found


def _open_files() -> set[Path]:
    """Files of /dev/shm that some live process has open or mapped: those of other programs on this machine."""
    found: set[Path] = set()
    for process in psutil.process_iter():
        found.update(Path(link) for link in _descriptors(process.pid) if link.startswith(str(SHM)))
        try:
            maps = Path(f"/proc/{process.pid}/maps").read_text()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        found.update(Path(line[line.index(str(SHM)) :]) for line in maps.splitlines() if str(SHM) in line)
    return found


def _descriptors(pid: int) -> list[str]:
    links = []
    try:
        for entry in os.scandir(f"/proc/{pid}/fd"):
            links.append(os.readlink(entry.path))
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        pass  # it ended meanwhile: what it had open is closed
    return links


def command(process: psutil.Process) -> str:
    """Its command line; it may end meanwhile."""
    try:
        return " ".join(process.cmdline()) or process.name()
    except psutil.NoSuchProcess:
        return "gone"

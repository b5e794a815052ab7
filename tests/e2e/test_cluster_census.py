"""The census of the cluster tests finds what is left behind, however it hides (about 2 s)."""

import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from tests.support.census import SHM, Census

ORPHAN = (
    "import os, socket, sys, time\n"
    "if os.fork() or os.setsid() and os.fork(): os._exit(0)\n"
    "server = socket.create_server(('127.0.0.1', 0))\n"
    "open(sys.argv[1], 'w').write(str(server.getsockname()[1]))\n"
    "time.sleep(60)\n"
)


def start_orphan(note: Path) -> int:
    """A detached process that listens; its port."""
    subprocess.run([sys.executable, "-c", ORPHAN, note], check=True)
    while not (note.exists() and note.read_text()):
        time.sleep(0.01)
    return int(note.read_text())


def test_a_detached_process_is_found_and_ended(tmp_path: Path) -> None:
    census = Census(grace_s=0.2)
    census.__enter__()
    start_orphan(tmp_path / "port")
    (orphan,) = census.processes()
    with pytest.raises(AssertionError, match=rf"left behind after 0\.2 s: processes \[\({orphan.pid}, '.*import os"):
        census.__exit__(None, None, None)
    census.assert_gone(within_s=5.0)


def test_a_port_is_found_without_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    census = Census(grace_s=0.2)
    with census:
        port = start_orphan(tmp_path / "port")
        assert census.note_sockets() == 1
        (orphan,) = census.processes()
        with monkeypatch.context() as patch:
            patch.setattr(census, "processes", list)
            with pytest.raises(AssertionError, match=rf"listening ports \[{port}\]"):
                census.assert_gone(within_s=0.1)
        orphan.kill()
        census.assert_gone(within_s=5.0)


def test_a_shared_memory_file_is_found() -> None:
    file = SHM / f"census-{uuid.uuid4().hex}"
    try:
        with pytest.raises(AssertionError, match=file.name), Census(grace_s=0.1):
            file.touch()
        file.unlink()
        with Census(grace_s=0.1):
            held = file.open("w")  # by somebody, while the census looks: not a leftover
        held.close()
        with file.open("w"), Census(grace_s=0.1):
            pass  # it was there before
    finally:
        file.unlink(missing_ok=True)

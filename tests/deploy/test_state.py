"""Records of running deployments: found while their process lives, whoever has its pid later. Under 1 s."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from phalanx.deploy import state
from phalanx.deploy.state import Deployment, Deployments, process_started
from phalanx.errors import ConfigError


def record(pid: int, port: int, *, started_off_s: float = 0.0, started: float = 0.0) -> Deployment:
    begun = process_started(pid)
    assert begun is not None
    return Deployment(
        pid=pid,
        process_started=begun + started_off_s,
        listen=f"127.0.0.1:{port}",
        file="/a/cluster.yaml",
        log="",
        started=started or time.time(),
    )


@pytest.fixture
def sleeper() -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def test_records_come_back_until_they_are_removed(tmp_path: Path) -> None:
    deployments = Deployments(tmp_path / "new" / "folder")
    young, old = record(os.getpid(), 1, started=2.0), record(os.getpid(), 2, started=1.0)
    deployments.add(young)
    deployments.add(old)
    assert deployments.running() == [old, young]
    assert deployments.find(1) == young
    assert deployments.find(3) is None
    deployments.remove(young)
    assert Deployments(deployments.folder).running() == [old]
    assert sorted(path.name for path in deployments.folder.iterdir()) == ["2.json"]
    assert deployments.folder.stat().st_mode & 0o777 == 0o700


def test_record_of_an_ended_process_is_ignored_and_removed(tmp_path: Path, sleeper: "subprocess.Popen[bytes]") -> None:
    deployments = Deployments(tmp_path / "f")
    deployments.add(record(sleeper.pid, 1))
    assert deployments.find(1) is not None
    sleeper.kill()
    while process_started(sleeper.pid) is not None:  # a zombie until it is waited for: that has ended, too
        time.sleep(0.01)
    assert sleeper.returncode is None
    assert deployments.find(1) is None
    assert list(deployments.folder.iterdir()) == []


@pytest.mark.parametrize("off_s", [-3600.0, 2.0])
def test_reused_pid_is_not_taken_for_the_deployment(tmp_path: Path, off_s: float) -> None:
    deployments = Deployments(tmp_path / "f")
    deployments.add(record(os.getpid(), 1, started_off_s=off_s))
    assert deployments.running() == []
    assert list(deployments.folder.iterdir()) == []


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"pid": "x"}', b"\xff"])
def test_damaged_record_is_ignored_and_removed(tmp_path: Path, damage: bytes) -> None:
    deployments = Deployments(tmp_path / "f")
    deployments.add(record(os.getpid(), 2))
    (deployments.folder / "1.json").write_bytes(damage)
    assert [found.port for found in deployments.running()] == [2]
    assert sorted(path.name for path in deployments.folder.iterdir()) == ["2.json"]


def test_successor_at_the_same_port_is_not_removed_by_its_predecessor(tmp_path: Path) -> None:
    deployments = Deployments(tmp_path / "f")
    first, second = record(os.getpid(), 1, started=1.0), record(os.getpid(), 1, started=2.0)
    deployments.add(first)
    deployments.add(second)
    deployments.remove(first)
    assert deployments.find(1) == second


def test_folder_that_others_can_use_is_refused(tmp_path: Path) -> None:
    open_folder = tmp_path / "open"
    open_folder.mkdir(mode=0o755)
    open_folder.chmod(0o755)
    link = tmp_path / "link"
    (tmp_path / "mine").mkdir(mode=0o700)
    link.symlink_to(tmp_path / "mine")
    for folder in (open_folder, link):
        with pytest.raises(ConfigError, match="folder of yours that nobody else can use"):
            Deployments(folder)


def test_default_folder_is_the_users_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert state.default_folder() == tmp_path / "phalanx"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert state.default_folder().name == f"phalanx-{os.getuid()}"

"""The doctor's checks on reports that nodes could send, and its refusals without a cluster. About 5 s."""

import dataclasses
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from phalanx.deploy.config import parse_config
from phalanx.deploy.doctor import Check, examine, node_checks, plan_checks
from phalanx.deploy.hardware import Hardware, Node
from phalanx.deploy.node_probe import NodeReport, checkpoint_digest, versions
from phalanx.deploy.plan import DeploymentPlan
from phalanx.deploy.resolve import resolve
from phalanx.errors import CheckpointError
from phalanx.models.hf_config import read_config, resolve_path

GIB = 2**30
CONFIG = parse_config("model: {path: tiny}\nserver: {engine_listen: '10.0.0.1:5000'}", "file")
OWN = {"python": "3.11.7", "phalanx": "0.1.0"}


def report(number: int, **changes: Any) -> NodeReport:
    """A healthy node."""
    good = NodeReport(
        node=f"10.0.0.{number}/abc{number}",
        address=f"10.0.0.{number}",
        host=f"host{number}",
        host_address=f"10.0.0.{number}",
        versions=OWN,
        checkpoint="d" * 64,
        shm_free_bytes=8 * GIB,
        gpu_free_bytes=(40 * GIB, 40 * GIB),
    )
    return dataclasses.replace(good, **changes)


def check(name: str, reports: Sequence[NodeReport]) -> Check:
    return next(found for found in node_checks(CONFIG, reports, OWN) if found.name == name)


def test_healthy_nodes_pass_every_check() -> None:
    checks = list(node_checks(CONFIG, [report(1), report(2)], OWN))
    assert [found.name for found in checks] == ["nodes", "versions", "addresses", "controller", "checkpoint"]
    assert all(found.is_ok for found in checks)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("nodes", {"error": "ModuleNotFoundError: No module named 'phalanx'"}, "10.0.0.2/abc2: ModuleNotFoundError"),
        ("versions", {"versions": {**OWN, "phalanx": "0.0.9"}}, "has phalanx 0.0.9, this process has 0.1.0"),
        ("versions", {"versions": {"python": "3.11.7"}}, "has phalanx none, this process has 0.1.0"),
        ("addresses", {"host_address": "127.0.1.1"}, "host name host2 means 127.0.1.1"),
        ("addresses", {"host_address": ""}, "host name host2 means no address"),
        ("addresses", {"address": "127.0.0.1"}, "Ray knows this node by a loopback address"),
        ("controller", {"unreachable": "10.0.0.1:5000 cannot be reached (refused)"}, "10.0.0.1:5000 cannot be reached"),
        ("checkpoint", {"checkpoint_error": "/m is not a folder"}, "10.0.0.2/abc2: /m is not a folder"),
    ],
)
def test_one_bad_node_is_named(name: str, changes: dict[str, Any], words: str) -> None:
    found = check(name, [report(1), report(2, **changes), report(3)])
    assert not found.is_ok
    assert "10.0.0.2/abc2" in found.detail
    assert words in found.detail
    assert "10.0.0.3" not in found.detail
    assert found.fix


def test_node_with_another_checkpoint_is_named() -> None:
    found = check("checkpoint", [report(1), report(2, checkpoint="e" * 64), report(3)])
    assert found.detail == "tiny is another checkpoint on 10.0.0.2/abc2"


def test_loopback_is_good_enough_for_one_machine() -> None:
    nodes = [report(number, host="here", host_address="127.0.0.1", address="127.0.0.1") for number in (1, 2)]
    assert check("addresses", nodes).is_ok


def cuda_plan() -> DeploymentPlan:
    """Two ranks of one GPU each, 8 GiB per GPU."""
    node = Node(name="n", cpus=8, gpus=2, gpu_memory_bytes=8 * GIB, memory_bytes=8 * GIB)
    config = parse_config("model: {path: tiny}\nparallel: {tensor: 2}", "file")
    return resolve(config, Hardware(nodes=(node,)), read_config("tiny"))


@pytest.mark.parametrize(
    ("free", "is_ok"),
    [((8 * GIB, 8 * GIB), True), ((8 * GIB, 1 * GIB), False), ((8 * GIB,), False), ((9 * GIB, 1, 9 * GIB), True)],
)
def test_every_rank_needs_a_gpu_with_room(free: tuple[int, ...], is_ok: bool) -> None:
    plan = cuda_plan()
    found = {check.name: check for check in plan_checks(plan, [report(1, gpu_free_bytes=free)])}
    assert found["GPU memory"].is_ok is is_ok
    assert "2 ranks" in found["GPU memory"].detail


@pytest.mark.parametrize(("shm_bytes", "is_ok"), [(64 * 2**20, False), (128 * 2**20, True)])
def test_shared_memory_is_counted_per_host(shm_bytes: int, is_ok: bool) -> None:
    found = {check.name: check for check in plan_checks(cuda_plan(), [report(1, shm_free_bytes=shm_bytes)])}
    assert found["/dev/shm"].is_ok is is_ok


def test_checkpoint_digest_sees_names_shapes_and_damage(tmp_path: Path) -> None:
    tiny, copy = resolve_path("tiny"), tmp_path / "copy"
    shutil.copytree(tiny, copy)
    same = checkpoint_digest("tiny")
    assert checkpoint_digest(str(copy)) == same
    (copy / "config.json").write_text((copy / "config.json").read_text() + "\n")
    assert checkpoint_digest(str(copy)) != same
    with (copy / "model.safetensors").open("r+b") as file:
        file.truncate(100_000)
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        checkpoint_digest(str(copy))


def test_versions_are_of_what_ranks_share() -> None:
    assert list(versions()) == ["python", "ray", "torch", "phalanx"]


def test_file_and_ray_are_refused_in_turn(tmp_path: Path) -> None:
    """Without a cluster the doctor ends early, and quickly: Ray alone would try a dead address for minutes."""
    file = tmp_path / "cluster.yaml"
    checks: list[Check] = []
    file.write_text("model: {path: tiny}\nparalel: {tensor: 2}\n")
    examine(file, checks.append)
    assert [(found.name, found.is_ok) for found in checks] == [("file", False)]
    assert "cluster.yaml:2:1: unknown key 'paralel'" in checks[0].detail

    checks.clear()
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        listen, ray = taken.getsockname()[1], unused.getsockname()[1]
        file.write_text(
            f"model: {{path: /no/such/folder}}\nray: {{address: '127.0.0.1:{ray}'}}\n"
            f"server: {{listen: '127.0.0.1:{listen}', metrics: 'off'}}\n"
        )
        examine(file, checks.append)
    assert [(found.name, found.is_ok) for found in checks] == [
        ("file", True),
        ("ports", False),
        ("model", False),
        ("ray", False),
    ]
    assert f"cannot listen on 127.0.0.1:{listen}: Address already in use" in checks[1].detail
    assert "/no/such/folder" in checks[2].detail
    assert f"no Ray cluster answers at ray.address '127.0.0.1:{ray}'" in checks[3].detail

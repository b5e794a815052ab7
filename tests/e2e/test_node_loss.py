"""A Ray node of a group of four ranks: it dies with two of them, or they leave it and then it dies. About 45 s."""

import signal
from collections.abc import Iterator

import psutil
import pytest

from phalanx import Client
from phalanx.deploy import cli
from phalanx.errors import ConfigError
from tests.support.census import Census
from tests.support.deployment import Deployment, deployed, pids, wait_until
from tests.support.scaling import FILE, NUM_STREAMS, Load, assert_only, state, undisturbed

pytestmark = pytest.mark.slow
FOUR = FILE.replace("data: 2", "data: 4") + "moe: {redundant_experts: 48, on_rank_loss: shrink}\n"
"""Every rank has every expert."""


@pytest.fixture(scope="module")
def answers() -> list[list[int]]:
    return undisturbed()


@pytest.fixture
def census(answers: object) -> Iterator[Census]:
    with Census() as census:
        yield census


@pytest.fixture
def deployment(census: Census) -> Iterator[Deployment]:
    with deployed(FOUR, census) as deployment:
        yield deployment


@pytest.fixture
def client(deployment: Deployment) -> Iterator[Client]:
    with deployment.client() as client:
        wait_until(lambda: state(client).state == "ready", 60, "the replica")
        yield client


def raylet(pid: int) -> psutil.Process:
    """The Ray node that a process runs on."""
    return next(parent for parent in psutil.Process(pid).parents() if "raylet" in parent.name())


def kill_node(node: psutil.Process) -> None:
    for process in [node, *node.children(recursive=True)]:
        process.send_signal(signal.SIGKILL)


def other_node(client: Client) -> psutil.Process:
    """The one without the engine."""
    engine, *ranks = pids(state(client))
    there = [pid for pid in ranks if raylet(pid) != raylet(engine)]
    assert len(there) == 2, "two ranks on each node"
    return raylet(there[0])


def a_round(load: Load, what: str) -> None:
    """All streams from their beginning to their end."""
    count = load.num_streams
    wait_until(lambda: load.num_streams >= count + 2 * NUM_STREAMS, 60, f"streams {what}")


def test_the_group_goes_on_with_the_other_node(client: Client, answers: list[list[int]]) -> None:
    with Load(client, answers) as load:
        kill_node(other_node(client))
        took_s = wait_until(lambda: state(client).data == 2, 30, "the repair")
        a_round(load, "without the node")
        print(f"\nnode lost: repaired after {took_s:.2f} s, longest pause {load.longest_gap_s:.2f} s")
    replica = state(client)
    assert replica.incarnation == 1
    assert {raylet(pid) for pid in pids(replica)} == {raylet(pids(replica)[0])}


def test_ranks_leave_a_node_that_is_to_be_drained(
    deployment: Deployment, client: Client, census: Census, answers: list[list[int]], capfd: pytest.CaptureFixture[str]
) -> None:
    node = other_node(client)
    (name,) = {
        line.split(" node ")[1].split()[0]
        for line, pid in zip(state(client).ranks, pids(state(client)), strict=True)
        if raylet(pid) == node
    }
    with pytest.raises(ConfigError, match=rf"data 3: only 2 of 4 data-parallel ranks are not on {name}; use 2 or less"):
        client.apply_scale("three", 3, leave=[name])
    with pytest.raises(ConfigError, match=r"leave elsewhere: no rank is there; ranks are on "):
        client.apply_scale("elsewhere", 2, leave=["elsewhere"])
    with Load(client, answers) as load:
        call = ["scale", str(deployment.file), "--data", "2", "--yes", "--op-id", "drain"]
        assert cli.main([*call, "--leave", name]) == 0
        assert "drain: replica 0 has data 2 now" in capfd.readouterr().out
        assert_only(census, client, 2)
        assert not any(raylet(pid) == node for pid in pids(state(client)))
        kill_node(node)
        a_round(load, "after the node has gone")
        assert cli.main([*call, "--leave", name]) == 0, "done already"
        print(f"\nnode left: longest pause {load.longest_gap_s:.2f} s")
    assert state(client).incarnation == 1

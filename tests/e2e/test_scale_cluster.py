"""Scaling the expert group of a replica on a local Ray cluster of two nodes, under 16 streams that never end.

The streams are compared with an undisturbed run on one rank. First, a replica with redundant experts that goes on
without a rank. Then another one, where is killed: a new worker, an old worker and the engine while an operation
prepares, Ray's room for a new worker, a worker after the commit. Nothing may be left behind.

About 80 s on two quiet cores.
"""

import json
import os
import signal
from collections.abc import Iterator

import pytest

from phalanx import Client
from phalanx.deploy import cli
from phalanx.errors import ConfigError, DuplicateRequestError, InvalidRequestError
from tests.support.census import Census
from tests.support.deployment import Deployment, deployed, pids, wait_until
from tests.support.scaling import FILE, NUM_STREAMS, Load, assert_only, follow, state, undisturbed, workers

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def answers() -> list[list[int]]:
    return undisturbed()


@pytest.fixture(scope="module", autouse=True)
def census(answers: object) -> Iterator[Census]:
    with Census() as census:
        yield census


@pytest.fixture(scope="module")
def deployment(census: Census) -> Iterator[Deployment]:
    with deployed(FILE, census) as deployment:
        yield deployment


@pytest.fixture
def client(deployment: Deployment) -> Iterator[Client]:
    with deployment.client() as client:
        wait_until(lambda: state(client).state == "ready", 60, "the replica")
        yield client


def test_a_rank_that_is_lost_and_replaced(census: Census, answers: list[list[int]]) -> None:
    """With `on_rank_loss: shrink` the others go on, whichever rank it was: every one has all experts.

    It comes before the tests that share a deployment, which would take CPUs from this one.
    """
    spare = FILE.replace("data: 2", "data: 3") + "moe: {redundant_experts: 32, on_rank_loss: shrink}\n"
    with deployed(spare, census) as deployment, deployment.client() as client, Load(client, answers) as load:
        for number, kind in enumerate((signal.SIGKILL, signal.SIGSTOP)):
            os.kill(pids(state(client))[1], kind)
            took_s = wait_until(lambda: state(client).data == 2, 20, "the repair")
            count = load.num_streams
            wait_until(lambda count=count: load.num_streams >= count + NUM_STREAMS, 60, "streams without the rank")
            assert_only(census, client, 2)
            assert follow(client, f"again {number}", 3).phase == "DONE"
            assert_only(census, client, 3)
            print(f"\nrank lost ({kind.name}): repaired after {took_s:.2f} s, longest pause {load.longest_gap_s:.2f} s")
        assert state(client).incarnation == 1


def test_the_same_operation_twice(client: Client, census: Census) -> None:
    assert follow(client, "once", 3).phase == "DONE"
    again = client.apply_scale("once", 3)
    assert (again.phase, again.replicas[0].old, again.replicas[0].new) == ("DONE", 2, 3)
    with pytest.raises(DuplicateRequestError, match=r"'once' is for data 3 of all replicas; use a new op_id"):
        client.apply_scale("once", 2)
    assert follow(client, "twice", 3).replicas[0].detail == "it has this size already"
    assert_only(census, client, 3)


def test_refusals_name_the_numbers(client: Client) -> None:
    refused = r"data 1: 1 ranks of 8 expert slots hold 8 of 16 experts; use 2 or more"
    (plan,) = client.plan_scale(1).replicas
    assert plan.refusal is not None
    assert refused in plan.refusal
    with pytest.raises(ConfigError, match=refused):
        client.apply_scale("too small", 1)
    with pytest.raises(InvalidRequestError, match=r"there is no replica 7; the replicas are 0"):
        client.plan_scale(2, replica=7)
    with pytest.raises(InvalidRequestError, match=r"data \(0\) must be 1 to 4096"):
        client.apply_scale("zero", 0)
    outdated = client.plan_scale(2).plan_id
    with pytest.raises(ConfigError, match=rf"plan {outdated} is outdated"):
        client.apply_scale("other plan", 4, plan_id=outdated)


def test_command_line(
    deployment: Deployment, client: Client, census: Census, capfd: pytest.CaptureFixture[str]
) -> None:
    """From 3 down to 2: what moves is printed before anything happens."""
    call = ["scale", str(deployment.file), "--data"]
    assert cli.main([*call, "2", "--plan"]) == 0
    said = capfd.readouterr().out
    assert "replica 0: data 3 -> 2: 3 -> 2 ranks, 24 -> 16 expert slots per layer (8 per rank) for 16 experts" in said
    assert "1 ranks leave; before, 0 expert rows (0 B) move to ranks that stay" in said
    assert state(client).data == 3
    assert cli.main([*call, "1", "--yes"]) == 2
    assert "hold 8 of 16 experts" in capfd.readouterr().err
    assert cli.main([*call, "2", "--yes", "--op-id", "down"]) == 0
    assert "down: replica 0 has data 2 now" in capfd.readouterr().out
    assert cli.main([*call, "2", "--json", "--op-id", "down"]) == 0
    plan, operation = map(json.loads, capfd.readouterr().out.splitlines())
    assert plan["replicas"][0]["old"] == 2
    assert operation["phase"] == "DONE"
    assert_only(census, client, 2)


@pytest.mark.parametrize("victim", ["a new worker", "an old worker", "the engine"])
def test_killed_while_it_prepares(client: Client, census: Census, answers: list[list[int]], victim: str) -> None:
    before = state(client)
    known = workers(census)
    op_id = f"kill {victim}"
    with Load(client, answers) as load:
        client.apply_scale(op_id, 4)
        wait_until(lambda: len(workers(census)) == 4, 30, "new workers")
        pid = {
            "a new worker": max(workers(census) - known),
            "an old worker": pids(before)[2],
            "the engine": pids(before)[0],
        }[victim]
        with pytest.raises(ConfigError, match=rf"scale operation '{op_id}' to data 4 is under way \(PREPARING\)"):
            client.apply_scale("another", 3)
        assert state(client).scale is not None
        os.kill(pid, signal.SIGKILL)
        operation = follow(client, op_id, 4)
        assert operation.phase == "ABORTED", operation
        assert operation.replicas[0].detail
        wait_until(lambda: state(client).state == "ready", 60, "the replica")
        count = load.num_streams
        wait_until(lambda: load.num_streams >= count + NUM_STREAMS, 60, "streams at the old size")
    is_restarted = state(client).incarnation == before.incarnation + 1
    assert is_restarted == (victim != "a new worker")
    assert_only(census, client, 2)


def test_killed_after_the_commit(client: Client, census: Census, answers: list[list[int]]) -> None:
    """It restarts at the new size; then its first units leave and their room is used again."""
    before = state(client)
    with Load(client, answers) as load:
        assert follow(client, "before the kill", 4).phase == "DONE"
        os.kill(pids(state(client))[4], signal.SIGKILL)
        wait_until(lambda: state(client).incarnation == before.incarnation + 1, 30, "the restart")
        wait_until(lambda: state(client).state == "ready", 60, "the replica")
        assert_only(census, client, 4)
        for number, data in enumerate((2, 3, 2)):
            assert follow(client, f"after the kill {number}", data).phase == "DONE"
            assert_only(census, client, data)
        count = load.num_streams
        wait_until(lambda: load.num_streams >= count + NUM_STREAMS, 60, "streams")


def test_no_room(client: Client, census: Census, answers: list[list[int]]) -> None:
    """Two nodes of two CPUs have no place for a fifth rank."""
    with Load(client, answers):
        operation = follow(client, "too big", os.cpu_count() * 2 + 1)
    assert operation.phase == "ABORTED"
    assert "CPU free, another data-parallel rank needs 1 in groups of 1 on one node" in operation.replicas[0].detail
    assert_only(census, client, 2)

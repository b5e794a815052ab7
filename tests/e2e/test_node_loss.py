"""A Ray node dies with all ranks on it: a group that shrinks goes on with the other node's. About 25 s."""

import signal

import psutil
import pytest

from tests.support.census import Census
from tests.support.deployment import deployed, pids, wait_until
from tests.support.scaling import FILE, NUM_STREAMS, Load, state, undisturbed

pytestmark = pytest.mark.slow
FOUR = FILE.replace("data: 2", "data: 4") + "moe: {redundant_experts: 48, on_rank_loss: shrink}\n"


def raylet(pid: int) -> psutil.Process:
    """The Ray node that a worker runs on."""
    return next(parent for parent in psutil.Process(pid).parents() if "raylet" in parent.name())


def test_the_group_goes_on_with_the_other_node() -> None:
    """Every rank has every expert here; the node that dies is the one without the engine."""
    answers = undisturbed()
    with Census() as census, deployed(FOUR, census) as deployment, deployment.client() as client:
        wait_until(lambda: state(client).state == "ready", 60, "the replica")
        with Load(client, answers) as load:
            engine, *ranks = pids(state(client))
            lost = {pid for pid in ranks if raylet(pid) != raylet(engine)}
            assert len(lost) == 2, "two ranks on each node"
            node = raylet(lost.pop())
            for process in [node, *node.children(recursive=True)]:
                process.send_signal(signal.SIGKILL)
            took_s = wait_until(lambda: state(client).data == 2, 30, "the repair")
            count = load.num_streams
            wait_until(lambda: load.num_streams >= count + NUM_STREAMS, 60, "streams without the node")
            print(f"\nnode lost: repaired after {took_s:.2f} s, longest pause {load.longest_gap_s:.2f} s")
        assert state(client).incarnation == 1
        assert {raylet(pid) for pid in pids(state(client))} == {raylet(engine)}

"""Scaling the expert group of a replica on a local Ray cluster of two nodes, under 16 streams that never end.

The streams are compared with an undisturbed run on one rank. First, a replica with redundant experts that goes on
without a rank. Then another one, where is killed: a new worker, an old worker and the engine while an operation
prepares, Ray's room for a new worker, a worker after the commit. Nothing may be left behind.

About 130 s on two quiet cores, 30 of them waiting for a placement that cannot be.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import psutil
import pytest

from phalanx import LLM, Client, SamplingParams
from phalanx.deploy import cli
from phalanx.deploy.client import ReplicaStatus, ScaleOperation
from phalanx.errors import ConfigError, DuplicateRequestError, InvalidRequestError, PhalanxError
from tests.support.census import Census
from tests.support.deployment import Deployment, deployed, pids, wait_until

pytestmark = pytest.mark.slow

FILE = """
model: {path: tiny-moe, dtype: float32}
ray: {address: local, nodes: 2}
device: cpu
parallel: {data: 2}
scheduler: {max_sequences: 16}
kv: {num_blocks: 200}
workers: {threads: 1}
server: {listen: '127.0.0.1:0', metrics: 'off'}
"""
NUM_STREAMS = 16
PROMPTS = [f"def function_{number}(" for number in range(NUM_STREAMS)]
PARAMS = [
    SamplingParams(max_tokens=40, temperature=float(number % 2), seed=number, ignore_eos=True)
    for number in range(NUM_STREAMS)
]


@pytest.fixture(scope="module")
def answers() -> list[list[int]]:
    with LLM("tiny-moe", dtype="float32", device="cpu", workers={"threads": 1}, kv={"num_blocks": 200}) as llm:
        return [output.choices[0].token_ids for output in llm.generate(PROMPTS, PARAMS)]


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


class Load:
    """16 streams, each begun again when it ends, until the context is left; every one of them must be whole."""

    def __init__(self, client: Client, answers: Sequence[list[int]]) -> None:
        self._client, self._answers = client, answers
        self._stop = threading.Event()
        self.num_streams, self.longest_gap_s = 0, 0.0
        self.problems: list[str] = []
        self._threads = [threading.Thread(target=self._run, args=(i,), daemon=True) for i in range(NUM_STREAMS)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        wait_until(lambda: self.num_streams >= NUM_STREAMS or self.problems, 60, "a round of streams")
        self.longest_gap_s = 0.0
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in self._threads), "a stream has not ended"
        assert not self.problems, self.problems

    def _run(self, index: int) -> None:
        while not self._stop.is_set() and not self.problems:
            ids: list[int] = []
            heard = time.monotonic()
            try:
                for chunk in self._client.generate(PROMPTS[index], PARAMS[index]):
                    ids += chunk.token_ids
                    now = time.monotonic()
                    self.longest_gap_s, heard = max(self.longest_gap_s, now - heard), now
            except PhalanxError as error:
                self.problems.append(f"stream {index} failed after {len(ids)} tokens: {error}")
                return
            if ids != self._answers[index]:
                self.problems.append(f"stream {index} is {ids}, not {self._answers[index]}")
            self.num_streams += 1


def state(client: Client) -> ReplicaStatus:
    return client.status().replicas[0]


def follow(client: Client, op_id: str, data: int, timeout_s: float = 60) -> ScaleOperation:
    """Begin an operation, or find it, and wait for its end."""
    wait_until(lambda: client.apply_scale(op_id, data).is_over, timeout_s, op_id)
    return client.apply_scale(op_id, data)


def workers(census: Census) -> set[int]:
    """Processes of ranks that run or have run."""
    return {process.pid for process in census.processes() if "WorkerActor" in " ".join(process.cmdline())}


def assert_only(census: Census, client: Client, data: int) -> None:
    """As many dp ranks serve, each on a process of its own, and no other worker process is there."""
    replica = state(client)
    assert (replica.data, len(replica.ranks), replica.scale) == (data, data + 1, None)
    serving = set(pids(replica)[1:])
    wait_until(lambda: workers(census) == serving, 10, f"the end of workers other than {serving}")


def test_a_rank_that_is_lost_and_replaced(census: Census, answers: list[list[int]]) -> None:
    """With `on_rank_loss: shrink` the others go on, whichever rank it was; scaling brings another one.

    It comes before the tests that share a deployment, which would take CPUs from this one.
    """
    spare = FILE.replace("data: 2", "data: 3") + "moe: {redundant_experts: 16, on_rank_loss: shrink}\n"
    with deployed(spare, census) as deployment, deployment.client() as client, Load(client, answers) as load:
        for number in range(2):
            os.kill(pids(state(client))[1], signal.SIGKILL)
            took_s = wait_until(lambda: state(client).data == 2, 10, "the repair")
            count = load.num_streams
            wait_until(lambda count=count: load.num_streams >= count + NUM_STREAMS, 60, "streams without the rank")
            assert_only(census, client, 2)
            assert follow(client, f"again {number}", 3).phase == "DONE"
            assert_only(census, client, 3)
            print(f"\nrank lost: repaired after {took_s:.2f} s, longest pause {load.longest_gap_s:.2f} s")
        assert state(client).incarnation == 1


def test_under_load(
    client: Client, census: Census, answers: list[list[int]], record_property: Callable[[str, object], None]
) -> None:
    figures = []
    with Load(client, answers) as load:
        for number, data in enumerate((4, 3, 2)):
            began, count = time.monotonic(), load.num_streams
            load.longest_gap_s = 0.0
            operation = follow(client, f"cycle-{number}", data)
            took_s = time.monotonic() - began
            assert operation.phase == "DONE", operation
            wait_until(lambda count=count: load.num_streams >= count + NUM_STREAMS, 30, "streams at the new size")
            assert_only(census, client, data)
            figures.append((f"-> {data}", took_s, load.longest_gap_s))
            if data == 4:
                nodes = [line.split(" node ")[1].split()[0] for line in state(client).ranks[1:]]
                assert len(set(nodes)) == 2
    for name, took_s, gap_s in figures:
        record_property("table", ("scaling under 16 streams", name, "done after", f"{took_s:.2f} s"))
        record_property("table", ("scaling under 16 streams", name, "longest pause", f"{gap_s:.2f} s"))


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


def test_nothing_is_left_open(client: Client, census: Census) -> None:
    """Descriptors and threads of the engine and of a rank that stays are the same after a cycle."""

    def open_things() -> list[tuple[int, int]]:
        return [(psutil.Process(pid).num_fds(), psutil.Process(pid).num_threads()) for pid in pids(state(client))[:2]]

    seen = []
    for number in range(2):
        for data in (3, 2):
            assert follow(client, f"leak {number} {data}", data).phase == "DONE"
        assert_only(census, client, 2)
        seen.append(open_things())
    wait_until(lambda: open_things() <= seen[0], 5, f"no more than {seen[0]}, not {open_things()}")

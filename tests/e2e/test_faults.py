"""kill -9 and kill -STOP of each rank and of the engine under 16 streams, on one replica of tensor 2.

Every stream ends equal to the undisturbed offline answer. Last, kill -9 of the supervisor.

About 50 s on two quiet cores.
"""

import os
import signal
from collections.abc import Callable, Iterator

import psutil
import pytest

from phalanx import SamplingParams
from tests.support.census import Census
from tests.support.deployment import Deployment, deployed, pids, wait_until
from tests.support.streams import Answer, Ask, Reader, offline

pytestmark = pytest.mark.slow

FILE = """
model: {path: tiny, dtype: float32}
ray: {address: local, nodes: 2}
device: cpu
parallel: {tensor: 2}
scheduler: {max_sequences: 32}
kv: {num_blocks: 400}
workers: {threads: 1}
server: {listen: '127.0.0.1:0', metrics: 'off'}
"""
MAX_TOKENS = 120
ASKS = [
    Ask(
        f"import os\n\n\ndef function_{number}(",
        SamplingParams(max_tokens=MAX_TOKENS, temperature=float(number % 2), seed=number, ignore_eos=True),
    )
    for number in range(16)
]
VICTIMS = ("engine", "rank 0", "rank 1")
LIMIT_S = {signal.SIGKILL: 1.0, signal.SIGSTOP: 5.0}
RESTART_S = 60.0
CAUSES = {
    (signal.SIGKILL, True): "the engine: the process died",
    (signal.SIGKILL, False): "died without a word",
    (signal.SIGSTOP, True): "lease",
    (signal.SIGSTOP, False): "has been silent for",
}
"""What the supervisor reports, by signal and whether it hit the engine."""


@pytest.fixture(scope="module")
def answers() -> list[list[Answer]]:
    return offline(ASKS, tensor=2)


@pytest.fixture(scope="module", autouse=True)
def census(answers: object) -> Iterator[Census]:
    with Census() as census:
        yield census


@pytest.fixture(scope="module")
def deployment(census: Census) -> Iterator[Deployment]:
    with deployed(FILE, census) as deployment:
        yield deployment


@pytest.mark.parametrize("how", LIMIT_S, ids=lambda how: how.name)
@pytest.mark.parametrize("victim", VICTIMS)
def test_streams_survive(
    deployment: Deployment,
    answers: list[list[Answer]],
    victim: str,
    how: signal.Signals,
    record_property: Callable[[str, object], None],
) -> None:
    with deployment.client() as client:

        def state() -> tuple[str, int]:
            replica = client.status().replicas[0]
            return replica.state, replica.incarnation

        before = client.status().replicas[0]
        pid = pids(before)[VICTIMS.index(victim)]
        reader = Reader([client.generate(ask.prompt, ask.params) for ask in ASKS])
        wait_until(lambda: min(map(reader.tokens, range(len(ASKS)))) > 8, 30, "8 tokens of every stream")
        os.kill(pid, how)
        noticed_s = wait_until(lambda: state() != ("ready", before.incarnation), 10, "the loss", interval_s=0.005)
        assert max(map(reader.tokens, range(len(ASKS)))) < MAX_TOKENS
        if how == signal.SIGSTOP and psutil.pid_exists(pid):
            os.kill(pid, signal.SIGCONT)  # fenced: whatever it still does must not matter
        back_s = wait_until(lambda: state() == ("ready", before.incarnation + 1), RESTART_S, "the restart")
        assert [[answer[0]] for answer in reader.wait(60)] == answers
        wait_until(lambda: not psutil.pid_exists(pid), 5, "the end of the victim")
        assert state() == ("ready", before.incarnation + 1)
    lost = deployment.all("lost")[-1]
    assert (lost["replica"], lost["incarnation"]) == (0, before.incarnation)
    assert CAUSES[how, victim == "engine"] in lost["text"]
    for what, seconds in {"noticed": noticed_s, "back after": back_s, "longest pause": reader.longest_gap_s}.items():
        record_property("table", ("faults on tensor 2", f"{how.name} {victim}", what, f"{seconds:.2f} s"))
    assert noticed_s <= LIMIT_S[how]


def test_nothing_outlives_the_supervisor(deployment: Deployment, census: Census) -> None:
    with deployment.client() as client:
        client.submit("import", SamplingParams(max_tokens=1500, ignore_eos=True))
    census.note_sockets()
    deployment.process.kill()
    print(f"\nsupervisor killed: the last process and port went {census.assert_gone(within_s=10.0):.1f} s later")

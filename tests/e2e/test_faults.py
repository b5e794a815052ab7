"""kill -9 and kill -STOP of each rank and of the engine under 16 streams, on one replica of tensor 2 x pipeline 2; then of
the supervisor. Every stream ends equal to the undisturbed offline answer.

About 90 s on two quiet cores.
"""

import os
import signal
import time
from collections.abc import Iterator

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
parallel: {tensor: 2, pipeline: 2}
scheduler: {max_sequences: 32}
kv: {num_blocks: 400}
workers: {threads: 1}
server: {listen: '127.0.0.1:0', metrics: 'off'}
"""
ASKS = [
    Ask(
        f"import os\n\n\ndef function_{number}(",
        SamplingParams(max_tokens=160, temperature=float(number % 2), seed=number, ignore_eos=True),
    )
    for number in range(16)
]
VICTIMS = ("engine", "rank 0", "rank 1", "rank 2", "rank 3")
LIMIT_S = {signal.SIGKILL: 1.0, signal.SIGSTOP: 5.0}
RESTART_S = 60.0


@pytest.fixture(scope="module", autouse=True)
def census() -> Iterator[Census]:
    with Census() as census:
        yield census


@pytest.fixture(scope="module")
def answers() -> list[list[Answer]]:
    return offline(ASKS, tensor=2, pipeline=2)


@pytest.fixture(scope="module")
def deployment(answers: object, census: Census) -> Iterator[Deployment]:
    with deployed(FILE, census) as deployment:
        yield deployment


@pytest.mark.parametrize("how", LIMIT_S, ids=lambda how: how.name)
@pytest.mark.parametrize("victim", VICTIMS)
def test_streams_survive(
    deployment: Deployment, answers: list[list[Answer]], victim: str, how: signal.Signals
) -> None:
    with deployment.client() as client:

        def state() -> tuple[str, int]:
            replica = client.status().replicas[0]
            return replica.state, replica.incarnation

        before = client.status().replicas[0]
        pid = pids(before)[VICTIMS.index(victim)]
        reader = Reader([client.generate(ask.prompt, ask.params) for ask in ASKS])
        wait_until(lambda: min(map(reader.tokens, range(16))) > 20, 30, "20 tokens of every stream")
        os.kill(pid, how)
        detected_s = wait_until(lambda: state() != ("ready", before.incarnation), 10, "the loss", interval_s=0.005)
        lost_at = [reader.tokens(number) for number in range(16)]
        assert all(20 < tokens < 160 for tokens in lost_at)
        if how == signal.SIGSTOP and psutil.pid_exists(pid):
            os.kill(pid, signal.SIGCONT)  # fenced: whatever it still does must not matter
        back_s = wait_until(lambda: state() == ("ready", before.incarnation + 1), RESTART_S, "the restart")
        ended = reader.wait(60)
        assert [[answer[0]] for answer in ended] == answers
        assert detected_s <= LIMIT_S[how]
        wait_until(lambda: not psutil.pid_exists(pid), 5, "the end of the victim")
        wait_until(lambda: client.status().replicas[0].num_running == 0, 5, "an idle engine")
        assert state() == ("ready", before.incarnation + 1)
    lost = deployment.all("lost")[-1]
    assert (lost["replica"], lost["incarnation"]) == (0, before.incarnation)
    print(
        f"\n{how.name} of {victim}: noticed after {detected_s:.2f} s, replica back {back_s:.1f} s later, longest gap of a "
        f"stream {reader.longest_gap_s:.1f} s\n  {lost['text'][:200]}"
    )


def test_nothing_outlives_the_supervisor(deployment: Deployment, census: Census) -> None:
    with deployment.client() as client:
        client.submit("import", SamplingParams(max_tokens=1500, ignore_eos=True))
    census.note_sockets()
    deployment.process.kill()
    print(f"\nsupervisor killed: the last process and port went {census.assert_gone(within_s=10.0):.1f} s later")

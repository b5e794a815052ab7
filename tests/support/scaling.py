"""16 streams that never end while the expert group of a deployment is scaled, and what must be true afterwards."""

import threading
import time
from collections.abc import Sequence

from phalanx import LLM, Client, SamplingParams
from phalanx.deploy.client import ReplicaStatus, ScaleOperation
from phalanx.errors import PhalanxError
from tests.support.census import Census, command
from tests.support.deployment import pids, wait_until

FILE = """
model: {path: tiny-moe, dtype: float32}
ray: {address: local, nodes: 2, placement_timeout: 8s}
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


def undisturbed() -> list[list[int]]:
    """What one rank answers to each stream."""
    with LLM("tiny-moe", dtype="float32", device="cpu", workers={"threads": 1}, kv={"num_blocks": 200}) as llm:
        return [output.choices[0].token_ids for output in llm.generate(PROMPTS, PARAMS)]


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
    deadline = time.monotonic() + timeout_s
    while not (operation := client.apply_scale(op_id, data)).is_over:
        assert time.monotonic() < deadline, f"not over within {timeout_s:g} s: {operation}; {state(client)}"
        time.sleep(0.02)
    return operation


def workers(census: Census) -> set[int]:
    """Processes of ranks that run or have run."""
    return {process.pid for process in census.processes() if "WorkerActor" in command(process)}


def assert_only(census: Census, client: Client, data: int) -> None:
    """As many dp ranks serve, each on a process of its own, and no other worker process is there."""
    replica = state(client)
    assert (replica.data, len(replica.ranks), replica.scale) == (data, data + 1, None)
    serving = set(pids(replica)[1:])
    wait_until(lambda: workers(census) == serving, 10, f"the end of workers other than {serving}")

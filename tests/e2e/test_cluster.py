"""A deployment on a local two-node Ray cluster, tensor 2, over gRPC: many clients, bad ones, lost ones, then SIGTERM.

About 35 s on two quiet cores.
"""

import contextlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from phalanx import Client, SamplingParams
from phalanx.deploy.client import Chunk
from phalanx.deploy.server import phalanx_pb2 as pb
from phalanx.deploy.server.phalanx_pb2_grpc import InferenceStub
from phalanx.errors import UnavailableError
from tests.support.census import Census
from tests.support.deployment import ROOT, Deployment, deployed, wait_until
from tests.support.streams import Answer, Ask, Reader, a_prompt, offline

pytestmark = pytest.mark.slow

GRACE_S = 1.0
FILE = f"""
model: {{path: tiny, dtype: float32}}
ray: {{address: local, nodes: 2}}
device: cpu
parallel: {{tensor: 2}}
scheduler: {{max_sequences: 40}}
kv: {{num_blocks: 160}}
workers: {{threads: 1}}
server: {{listen: '127.0.0.1:0', metrics: 'off', detach_grace: {GRACE_S}s}}
"""


class Stream:
    """A random request and its fate: it ends by itself, is left or cancelled midway, or meets its deadline."""

    def __init__(self, number: int) -> None:
        rng = random.Random(number)
        self.name = f"job-{number}"
        self.fate = ("whole", "whole", "whole", "whole", "whole", "left", "cancelled", "deadline")[number % 8]
        self.num_tokens = rng.randint(1, 30)
        self.deadline_s = rng.uniform(0.3, 2.0) if self.fate == "deadline" else None
        shared = "from typing import Any, NamedTuple\n" * 4 if number % 4 == 0 else ""
        params = SamplingParams(
            max_tokens=rng.randint(1, 150) if self.fate == "whole" else 300,
            temperature=rng.choice((0.0, 0.7, 1.0)),
            top_p=rng.choice((1.0, 0.9)),
            repetition_penalty=rng.choice((1.0, 1.1)),
            seed=rng.getrandbits(64),
            n=rng.choice((1, 1, 1, 2)),
            stop=rng.choice(((), ("\n\n", "return"))),
            ignore_eos=rng.random() < 0.5,
        )
        self.ask = Ask(shared + a_prompt(rng, rng.randint(1, 400)), params)

    def follow(self, client: Client) -> Iterator[Chunk]:
        """The request over gRPC, left or cancelled when its time has come."""
        ask, heard = self.ask, 0
        chunks = client.generate(ask.prompt, ask.params, request_id=self.name, deadline_s=self.deadline_s)
        with contextlib.closing(chunks):
            for chunk in chunks:
                yield chunk
                heard += len(chunk.token_ids)
                if heard >= self.num_tokens and self.fate == "left":
                    return
                if heard >= self.num_tokens and self.fate == "cancelled":
                    client.cancel(self.name)

    def check(self, client: Client, heard: dict[int, Answer], right: list[Answer]) -> set[str | None]:
        """What was heard, and what the server keeps, against the offline answer; returns the finish reasons."""
        kept = [Answer(list(c.token_ids), c.text, c.finish_reason) for c in client.get(self.name).choices]
        for index, (choice, whole) in enumerate(zip(kept, right, strict=True)):
            assert choice.finish in {"left": (whole.finish, "cancelled")}.get(self.fate, (whole.finish, self.fate))
            if choice.finish == whole.finish:
                assert choice == whole, self.name
            assert choice.token_ids == whole.token_ids[: len(choice.token_ids)], self.name
            if self.fate != "left":
                assert heard[index] == choice, self.name
            elif index in heard:
                assert heard[index].token_ids == choice.token_ids[: len(heard[index].token_ids)], self.name
                assert choice.text.startswith(heard[index].text), self.name
        return {choice.finish for choice in kept}


STREAMS = [Stream(number) for number in range(64)]
LAST = [
    Ask("import os\n\n\ndef main(", SamplingParams(max_tokens=250, temperature=1.0, seed=seed, ignore_eos=True))
    for seed in range(4)
]


@pytest.fixture(scope="module")
def answers() -> list[list[Answer]]:
    """To `STREAMS`, then to `LAST`."""
    return offline([*(stream.ask for stream in STREAMS), *LAST], tensor=2)


@pytest.fixture(scope="module", autouse=True)
def census(answers: object) -> Iterator[Census]:
    with Census() as census:
        yield census


@pytest.fixture(scope="module")
def deployment(census: Census) -> Iterator[Deployment]:
    with deployed(FILE, census) as deployment:
        yield deployment


def wait_idle(deployment: Deployment, timeout_s: float = 5.0) -> float:
    """Until the pool is back to empty and the engine has found its books in order; seconds for the former."""

    def is_empty() -> bool:
        replica = deployment.replica()
        return replica.num_free_blocks == replica.num_total_blocks and not replica.num_running + replica.num_waiting

    took = wait_until(is_empty, timeout_s, "an empty pool")
    time.sleep(1.2)  # an idle engine checks all its invariants once a second; what it finds ends the replica
    assert (deployment.replica().state, deployment.replica().incarnation) == ("ready", 1)
    return took


def test_64_streams_equal_the_offline_answers(
    deployment: Deployment, answers: list[list[Answer]], record_property: Callable[[str, object], None]
) -> None:
    began = time.monotonic()
    with deployment.client() as client:
        heard = Reader([stream.follow(client) for stream in STREAMS]).wait(120)
        seconds = time.monotonic() - began
        reasons: dict[str, set[str | None]] = {stream.fate: set() for stream in STREAMS}
        for stream, own, right in zip(STREAMS, heard, answers, strict=False):
            reasons[stream.fate] |= stream.check(client, own, right)
    assert reasons["whole"] == {"stop", "length"}
    assert "cancelled" in reasons["left"] & reasons["cancelled"]
    assert "deadline" in reasons["deadline"]
    emptied_s = wait_idle(deployment)
    replica = deployment.replica()
    assert replica.num_preemptions > 0, "the pool was meant to be too small"
    for what, value in {
        "tokens": f"{replica.num_generated_tokens}",
        "seconds": f"{seconds:.1f}",
        "preemptions": f"{replica.num_preemptions}",
        "cached prompt tokens": f"{replica.prefix_hits} of {replica.prefix_queries}",
        "pool empty after": f"{emptied_s:.2f} s",
    }.items():
        record_property("table", ("64 streams on tensor 2", "all equal the offline answers", what, value))


def submit(**fields: Any) -> pb.SubmitRequest:
    return pb.SubmitRequest(prompt_text="x", stopping=pb.Stopping(max_tokens=2), **fields)


def sampling(**fields: Any) -> pb.SubmitRequest:
    return submit(sampling=pb.Sampling(**fields))


BAD_GENERATES = {
    "empty text": (pb.SubmitRequest(prompt_text=""), "INVALID_ARGUMENT", "makes no tokens; send some text"),
    "no ids": (pb.SubmitRequest(prompt_token_ids=pb.TokenIds()), "INVALID_ARGUMENT", "empty"),
    "no prompt": (
        pb.SubmitRequest(),
        "INVALID_ARGUMENT",
        "no prompt; set prompt_token_ids, prompt_text or prompt_chat",
    ),
    "prompt over the limit": (
        pb.SubmitRequest(prompt_token_ids=pb.TokenIds(ids=[5] * 2048)),
        "OUT_OF_RANGE",
        r"2048 tokens; .* at most 2048 \(max_model_len\), so send at most 2047",
    ),
    "output over the limit": (
        pb.SubmitRequest(prompt_text="x", stopping=pb.Stopping(max_tokens=2048)),
        "OUT_OF_RANGE",
        r"max_tokens \(2048\) are 2049 tokens, over 2048",
    ),
    "id out of range": (
        pb.SubmitRequest(prompt_token_ids=pb.TokenIds(ids=[1, 4096])),
        "INVALID_ARGUMENT",
        r"prompt_token_ids\[1\] \(4096\) must be an integer from 0 to 4095",
    ),
    "temperature -1": (sampling(temperature=-1.0), "INVALID_ARGUMENT", r"temperature \(-1.0\) .* \[0, 100\]"),
    "temperature NaN": (sampling(temperature=float("nan")), "INVALID_ARGUMENT", r"temperature \(nan\)"),
    "temperature inf": (sampling(temperature=float("inf")), "INVALID_ARGUMENT", r"temperature \(inf\)"),
    "temperature huge": (sampling(temperature=1e30), "INVALID_ARGUMENT", r"temperature \(1.*e\+30\)"),
    "top_p 0": (sampling(top_p=0.0), "INVALID_ARGUMENT", r"top_p \(0.0\) .* \(0, 1\]"),
    "top_k huge": (sampling(top_k=2**32 - 1), "INVALID_ARGUMENT", r"top_k \(4294967295\)"),
    "penalty NaN": (sampling(presence_penalty=float("nan")), "INVALID_ARGUMENT", r"presence_penalty \(nan\)"),
    "n 0": (sampling(num_choices=0), "INVALID_ARGUMENT", r"n \(0\) must be an integer from 1 to 128"),
    "n huge": (sampling(num_choices=10**6), "INVALID_ARGUMENT", r"n \(1000000\)"),
    "bias of an unknown id": (
        sampling(logit_bias=[pb.LogitBias(token_id=5000, bias=1.0)]),
        "INVALID_ARGUMENT",
        r"logit_bias: id 5000 is not below the vocabulary \(4096\)",
    ),
    "unknown model": (submit(model="other"), "NOT_FOUND", "model 'other' is not served here; this is 'tiny'"),
    "bad request id": (submit(request_id="a b"), "INVALID_ARGUMENT", "must be 1 to 128 characters"),
    "20 MB": (pb.SubmitRequest(prompt_text="x" * 20_000_000), "RESOURCE_EXHAUSTED", "larger than max"),
}


def quick_request(deployment: Deployment) -> None:
    with deployment.client() as client:
        assert len(list(client.generate("def main(", SamplingParams(max_tokens=2, ignore_eos=True)))) >= 1


@pytest.mark.parametrize("name", BAD_GENERATES)
def test_bad_request(deployment: Deployment, name: str) -> None:
    request, code, sentence = BAD_GENERATES[name]
    with grpc.insecure_channel(deployment.address, [("grpc.max_send_message_length", -1)]) as channel:
        with pytest.raises(grpc.RpcError, match=sentence) as refusal:
            list(InferenceStub(channel).Generate(request, timeout=10))
        assert refusal.value.code().name == code
    quick_request(deployment)


def test_bad_bytes_and_ids(deployment: Deployment) -> None:
    with grpc.insecure_channel(deployment.address) as channel:
        inference = InferenceStub(channel)
        generate = channel.unary_stream("/phalanx.v1.Inference/Generate")
        for data in (b"\x1a\x02\xff\xfe", b"\xff" * 9, b"\x12\x99"):  # prompt_text that is no UTF-8; no message; cut
            with pytest.raises(grpc.RpcError, match="damaged message, or text that is not UTF-8") as refusal:
                list(generate(data, timeout=10))
            assert refusal.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        for call in (
            lambda: inference.Get(pb.GetRequest(request_id="nobody"), timeout=10),
            lambda: inference.Cancel(pb.JobRef(request_id="nobody"), timeout=10),
            lambda: list(inference.Stream(pb.StreamRequest(request_id="nobody"), timeout=10)),
        ):
            with pytest.raises(grpc.RpcError, match="request 'nobody' is unknown") as refusal:
                call()
            assert refusal.value.code() == grpc.StatusCode.NOT_FOUND
        inference.Submit(submit(request_id="twice"), timeout=10)
        inference.Submit(submit(request_id="twice"), timeout=10)
        with pytest.raises(grpc.RpcError, match="'twice' exists with another prompt") as refusal:
            inference.Submit(submit(request_id="twice", sampling=pb.Sampling(top_k=1)), timeout=10)
        assert refusal.value.code() == grpc.StatusCode.ALREADY_EXISTS
    quick_request(deployment)


def test_a_cancelled_call_frees_its_blocks_at_once(deployment: Deployment) -> None:
    with grpc.insecure_channel(deployment.address) as channel, deployment.client() as client:
        stopping = pb.Stopping(max_tokens=1500, ignore_eos=True)
        call = InferenceStub(channel).Generate(pb.SubmitRequest(prompt_text="class A:", stopping=stopping))
        for _ in range(20):
            next(call)
        assert client.status().jobs.running == 1
        call.cancel()
        ended_s = wait_until(lambda: client.status().jobs.running == 0, 1.0, "the job's end", interval_s=0.002)
    freed_s = wait_idle(deployment, timeout_s=1.0)
    print(f"\ncall cancelled: job ended after {ended_s * 1e3:.0f} ms, blocks seen free {freed_s:.2f} s later")


def test_a_killed_client_frees_its_blocks_after_the_grace(deployment: Deployment) -> None:
    program = (
        "import sys; from phalanx import Client, SamplingParams\n"
        "params = SamplingParams(max_tokens=1500, temperature=0, ignore_eos=True)\n"
        "for chunk in Client(sys.argv[1]).generate('class A:', params): print(chunk.position, flush=True)\n"
    )
    command = [sys.executable, "-c", program, deployment.address]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process,
        deployment.client() as client,
    ):
        assert process.stdout is not None
        for _ in range(20):
            assert process.stdout.readline()
        process.kill()
        ended_s = wait_until(lambda: client.status().jobs.running == 0, GRACE_S + 1.5, "the job's end")
    assert ended_s > GRACE_S / 2, "a client has this long to come back"
    freed_s = wait_idle(deployment, timeout_s=1.0)
    print(
        f"\nclient killed: job ended after {ended_s:.2f} s (grace {GRACE_S} s), blocks seen free {freed_s:.2f} s later"
    )


def test_sigterm_drains(deployment: Deployment, census: Census, answers: list[list[Answer]]) -> None:
    with deployment.client() as client:
        reader = Reader([client.generate(ask.prompt, ask.params) for ask in LAST])
        wait_until(lambda: all(map(reader.tokens, range(len(LAST)))), 10.0, "first tokens")
        deployment.process.send_signal(signal.SIGTERM)
        wait_until(lambda: client.status().draining, 5.0, "draining")
        with pytest.raises(UnavailableError, match="draining"):
            client.submit("x")
        ended = reader.wait(60)
    began = time.monotonic()
    assert [[answer[0]] for answer in ended] == answers[len(STREAMS) :]
    assert deployment.wait_end() == 0
    census.assert_gone(within_s=3.0)
    print(f"\ndrained: all streams ended whole, the rest {time.monotonic() - began:.2f} s after them")

"""The client over connections that break, its errors, and its resume state machine without sockets (about 8 s)."""

import asyncio
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from phalanx import errors
from phalanx.deploy.client import AsyncClient, Chunk, Client
from phalanx.deploy.client_resume import Attempts, Failure, Follow
from phalanx.deploy.server import phalanx_pb2 as pb
from phalanx.runtime.sampling_params import SamplingParams
from tests.deploy.fake_engine import FakeEngine, Service, serving
from tests.runtime.controller.world import expected


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(tmp_path_factory.mktemp("model")) as service:
        yield service


@pytest.fixture(scope="module")
def engine(service: Service) -> FakeEngine:
    return service.engine()


@pytest.fixture
def client(service: Service, engine: FakeEngine) -> Iterator[Client]:
    with service.client() as client:
        yield client


def joined(chunks: list[Chunk], params: SamplingParams, seed: int) -> None:
    """The chunks are the oracle's output, each token and byte once."""
    for index in range(params.n):
        mine = [chunk for chunk in chunks if chunk.choice == index]
        position = text_bytes = 0
        for chunk in mine:
            assert (chunk.position, chunk.text_offset) == (position, text_bytes)
            position += len(chunk.token_ids)
            text_bytes += len(chunk.text.encode())
        ids = [token_id for chunk in mine for token_id in chunk.token_ids]
        text = "".join(chunk.text for chunk in mine)
        assert (ids, text, mine[-1].finish_reason) == expected(seed, index, params)
        assert [chunk.finish_reason for chunk in mine[:-1]] == [None] * (len(mine) - 1)


def test_generate(client: Client) -> None:
    params = SamplingParams(max_tokens=60, seed=3, n=2, stop=("bba",), logprobs=1, logit_bias={65: 1.5, 7: -2.0})
    chunks = list(client.generate("hello", params))
    joined(chunks, params, 3)
    last = [chunk for chunk in chunks if chunk.finish_reason]
    assert all(chunk.usage is not None and chunk.usage.prompt_tokens == 5 and chunk.seed == 3 for chunk in last)
    assert all(
        [entry.token_id for entry in chunk.logprobs or ()] == list(chunk.token_ids)
        for chunk in chunks
        if chunk.token_ids
    )


def test_unseeded_request_gets_a_seed(client: Client) -> None:
    params = SamplingParams(max_tokens=10)
    chunks = list(client.generate([{"role": "user", "content": "hi"}], params))
    assert chunks[-1].seed is not None
    joined(chunks, params, chunks[-1].seed)


def test_submit_stream_get_cancel_status(client: Client) -> None:
    params = SamplingParams(max_tokens=50, seed=8)
    job = client.submit([1, 2], params, request_id="job-1")
    assert client.submit([1, 2], params, request_id="job-1").request_id == job.request_id
    joined(list(client.stream("job-1")), params, 8)
    tail = [token_id for chunk in client.stream("job-1", from_position=30) for token_id in chunk.token_ids]
    assert tail == expected(8, 0, params)[0][30:]
    assert client.get("job-1").choices[0].text == expected(8, 0, params)[1]
    assert client.cancel("job-1").choices[0].finish_reason == "length"
    state = client.status()
    assert (state.model, state.replicas[0].state) == ("tiny", "ready")
    assert state.replicas[0].startup_s == {"load": 0.5, "warm_up": 0.25}


def test_closing_the_iterator_cancels(client: Client, service: Service, engine: FakeEngine) -> None:
    stream = client.generate([1], SamplingParams(max_tokens=2000), request_id="closed")
    next(stream)
    stream.close()
    assert client.get("closed").choices[0].finish_reason == "cancelled"
    service.wait_until(lambda: not engine.rows)


def test_deadline(client: Client) -> None:
    chunks = list(client.generate([1], SamplingParams(max_tokens=2000, seed=1), deadline_s=0.2))
    assert chunks[-1].finish_reason == "deadline"


def test_errors_are_typed_and_carry_the_sentence(client: Client, service: Service) -> None:
    with pytest.raises(errors.RequestTooLongError, match="2048"):
        next(client.generate([1] * 3000))
    with pytest.raises(errors.InvalidRequestError, match="empty"):
        next(client.generate([]))
    with pytest.raises(errors.InvalidRequestError, match="256"):
        client.submit([256])
    with pytest.raises(errors.InvalidRequestError, match=r"task \(0\): this model has no tasks"):
        client.submit([1], SamplingParams(task=0))
    with pytest.raises(errors.UnknownRequestError, match="'nope'"):
        next(client.stream("nope"))
    with pytest.raises(errors.UnknownRequestError, match="'nope'"):
        client.get("nope")
    client.submit([1], request_id="mine")
    with pytest.raises(errors.DuplicateRequestError, match="'mine'"):
        client.submit([2], request_id="mine")
    client.cancel("mine")
    with Client(service.address, model="other") as other, pytest.raises(errors.UnknownRequestError, match="'tiny'"):
        other.submit([1])
    with pytest.raises(errors.InvalidRequestError, match="larger than max"):
        client.submit("x" * 20_000_000)
    for prompt in ([-1], [2**32], ["a"], [{"role": "user"}], "\ud800"):
        with pytest.raises(errors.InvalidRequestError):
            client.submit(prompt)


def test_a_task_reaches_the_engine(tmp_path: Path) -> None:
    """Unset it is task 0, as `LLM` has it, and 0 is not unset; for another job under the same id it is another body."""
    with serving(tmp_path, num_tasks=3) as service, service.client() as client:
        engine = service.engine()
        for task in (None, 0, 2):
            params = SamplingParams(max_tokens=5, seed=1, task=task)
            joined(list(client.generate([1], params)), params, 1)
        assert [frame.params.task for frame in engine.placed] == [0, 0, 2]
        with pytest.raises(errors.InvalidRequestError, match=r"task \(3\) is unknown; this model has tasks 0 to 2"):
            client.submit([1], SamplingParams(task=3))
        client.submit([1], SamplingParams(task=1), request_id="mine")
        with pytest.raises(errors.DuplicateRequestError, match="'mine'"):
            client.submit([1], SamplingParams(task=2), request_id="mine")


def test_unreachable_service() -> None:
    with (
        Client("127.0.0.1:1", retry_s=0.3) as client,
        pytest.raises(errors.UnavailableError, match=r"127.0.0.1:1.*0.3 s"),
    ):
        client.status()


def test_closed_client(service: Service, engine: FakeEngine) -> None:
    client = service.client()
    stream = client.generate([1], SamplingParams(max_tokens=2000), request_id="open")
    next(stream)
    client.close()
    with pytest.raises(errors.UnavailableError, match="closed"):
        list(stream)
    with pytest.raises(errors.UnavailableError, match="closed"):
        client.status()


@pytest.mark.parametrize("seed", range(4))
def test_streams_survive_cut_connections(seed: int, service: Service, engine: FakeEngine) -> None:
    proxy, address = service.proxy(seed, budget=8)
    params = SamplingParams(max_tokens=400, seed=seed, n=2, stop=("abaaabab",))
    with Client(address) as client:
        joined(list(client.generate("go on", params, request_id=f"cut-{seed}")), params, seed)
    assert proxy.num_cuts >= 3


def test_async_streams_survive_cut_connections(service: Service, engine: FakeEngine) -> None:
    async def run(address: str) -> list[list[Chunk]]:
        async def one(client: AsyncClient, seed: int) -> list[Chunk]:
            params = SamplingParams(max_tokens=300, seed=seed)
            return [chunk async for chunk in client.generate([1], params)]

        async with AsyncClient(address) as client:
            await client.status()
            return await asyncio.gather(*(one(client, seed) for seed in range(4)))

    proxy, address = service.proxy(99, budget=6)
    for seed, chunks in enumerate(service.run(run(address))):
        joined(chunks, SamplingParams(max_tokens=300), seed)
    assert proxy.num_cuts >= 3


def test_async_client(service: Service, engine: FakeEngine) -> None:
    async def run() -> None:
        async with AsyncClient(service.address) as client:
            params = SamplingParams(max_tokens=20, seed=4)
            job = await client.submit([1], params)
            joined([chunk async for chunk in client.stream(job.request_id)], params, 4)
            assert (await client.get(job.request_id)).state == "finished"
            stream = client.generate([1], SamplingParams(max_tokens=2000), request_id="async-closed")
            await anext(stream)
            await stream.aclose()
            assert (await client.cancel("async-closed")).choices[0].finish_reason == "cancelled"
            assert (await client.status()).jobs.finished >= 2
            with pytest.raises(errors.UnknownRequestError):
                await client.get("nope")
            await client.drain()
            with pytest.raises(errors.UnavailableError, match="draining"):
                await client.submit([1])
            await client.drain(undo=True)

    service.run(run())


def test_service_that_restarts_without_the_job(tmp_path: Path, unused_port: int) -> None:
    # Jobs are not kept over a restart yet: the client is told, and nothing is spliced together.
    with serving(tmp_path, listen=f"127.0.0.1:{unused_port}") as service:
        service.engine()
        client = service.client()
        stream = client.generate([1], SamplingParams(max_tokens=2000))
        next(stream)
    with serving(tmp_path, listen=f"127.0.0.1:{unused_port}") as service:
        service.engine()
        with pytest.raises(errors.UnknownRequestError, match="unknown"):
            list(stream)
        client.close()


@pytest.fixture
def unused_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# Without sockets


def follow(submit: bool = True, start: tuple[int, ...] = ()) -> Follow:
    request = pb.SubmitRequest(request_id="r") if submit else None
    return Follow(request, "r", start, Attempts("host:1", 10.0, random.Random(0)))


DROPPED = Failure("UNAVAILABLE", "socket closed", False, None)


def test_first_call_is_repeated_until_something_came() -> None:
    stream = follow()
    assert stream.next_call()[0] == "Generate"
    assert 0 < stream.failed(DROPPED, 0.0) < 0.1
    assert stream.next_call()[0] == "Generate"
    stream.accept(pb.Chunk(choice=1, token_ids=[1, 2], text_delta="\u00e9"))
    stream.failed(DROPPED, 1.0)
    method, request = stream.next_call()
    assert (method, list(request.from_position)) == ("Stream", [0, 2, 0])
    chunk = stream.accept(pb.Chunk(choice=1, first_position=2, token_ids=[3], text_offset=2))
    assert chunk is not None
    assert chunk.token_ids == (3,)


@pytest.mark.parametrize(
    "message",
    [
        pb.Chunk(first_position=1, token_ids=[1]),  # repeats
        pb.Chunk(first_position=3, token_ids=[1], text_offset=1),  # leaves one out
        pb.Chunk(first_position=2, token_ids=[1], text_offset=0),  # text of other tokens
    ],
)
def test_a_splice_is_refused(message: pb.Chunk) -> None:
    stream = follow()
    stream.accept(pb.Chunk(token_ids=[1, 2], text_delta="x"))
    with pytest.raises(errors.StepError, match="went on at"):
        stream.accept(message)
    assert not stream.must_cancel


def test_states_and_finished_choices_add_nothing() -> None:
    stream = follow(submit=False, start=(4,))
    assert list(stream.next_call()[1].from_position) == [4]
    assert stream.accept(pb.Chunk(state=pb.QUEUED)) is None
    finish = pb.Finish(reason=pb.LENGTH)
    assert stream.accept(pb.Chunk(first_position=4, text_offset=9, token_ids=[1], finish=finish)) is not None
    assert stream.accept(pb.Chunk(first_position=5, text_offset=9, finish=finish)) is None


def test_patience() -> None:
    attempts = Attempts("host:1", 10.0, random.Random(0))
    now, delays = 0.0, []
    while now < 10:
        delays.append(attempts.failed(DROPPED, now))
        now += delays[-1]
    with pytest.raises(errors.UnavailableError, match="host:1 cannot be reached for 10 s"):
        attempts.failed(DROPPED, now)
    assert delays[0] < 0.1
    assert all(delay <= 3 for delay in delays)
    attempts.progressed()
    assert attempts.failed(DROPPED, now) < 0.1


def test_answers_are_not_retried_but_a_refused_reader_is() -> None:
    draining = Failure("UNAVAILABLE", "draining", True, 1.0)
    stream = follow()
    with pytest.raises(errors.UnavailableError, match="draining"):
        stream.failed(draining, 0.0)
    stream = follow()
    stream.accept(pb.Chunk(token_ids=[1]))
    assert stream.failed(Failure("RESOURCE_EXHAUSTED", "4 readers", True, 1.0), 0.0) >= 0.5
    with pytest.raises(errors.StepError, match="incident"):
        stream.failed(Failure("INTERNAL", "incident 5", True, None), 0.0)


def test_two_requests_of_one_id_at_once_are_one_job(client: Client, service: Service) -> None:
    params = SamplingParams(max_tokens=30, seed=2)
    first = client.generate([1], params, request_id="same")
    second = client.generate([1], params, request_id="same")
    started = time.monotonic()
    chunks = [next(first), next(second)]
    joined([chunks[0], *first], params, 2)
    joined([chunks[1], *second], params, 2)
    assert time.monotonic() - started < 5

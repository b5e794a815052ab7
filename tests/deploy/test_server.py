"""Every RPC and every refusal over real sockets (about 10 s)."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from phalanx.deploy.server import phalanx_pb2 as pb
from phalanx.deploy.server.phalanx_pb2_grpc import ClusterStub, InferenceStub
from phalanx.runtime.sampling_params import SamplingParams
from tests.deploy.fake_engine import FakeEngine, Service, serving
from tests.runtime.controller.world import expected


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(tmp_path_factory.mktemp("model"), state_interval_s=0.2) as service:
        yield service


@pytest.fixture(scope="module")
def engine(service: Service) -> FakeEngine:
    return service.engine()


@pytest.fixture
def channel(service: Service, engine: FakeEngine) -> Iterator[grpc.Channel]:
    options = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(service.address, options=options) as channel:
        yield channel


@pytest.fixture
def inference(channel: grpc.Channel) -> InferenceStub:
    return InferenceStub(channel)


def request(request_id: str = "", **fields: object) -> pb.SubmitRequest:
    message = pb.SubmitRequest(request_id=request_id, prompt_token_ids=pb.TokenIds(ids=[1, 2, 3, 4]))
    message.stopping.max_tokens = 40
    message.sampling.seed = 5
    message.MergeFrom(pb.SubmitRequest(**fields))
    return message


def read(chunks: Iterable[pb.Chunk], start: int = 0) -> dict[int, tuple[list[int], str, pb.Finish]]:
    """Per choice: ids, text, finish; checks that positions and text offsets join and that the finish is the last."""
    seen: dict[int, tuple[list[int], str, pb.Finish | None]] = {}
    for chunk in chunks:
        if chunk.HasField("state"):
            continue
        ids, text, finish = seen.get(chunk.choice, ([], "", None))
        assert finish is None
        assert chunk.first_position == start + len(ids)
        assert start or chunk.text_offset == len(text.encode())
        ended = chunk.finish if chunk.HasField("finish") else None
        seen[chunk.choice] = [*ids, *chunk.token_ids], text + chunk.text_delta, ended
    assert all(finish is not None for _, _, finish in seen.values())
    return seen


def refusal(chunks: Iterable[pb.Chunk]) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        list(chunks)
    return caught.value


def unary_refusal(method: Callable[..., object], message: object) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        method(message)
    return caught.value


def test_generate_equals_the_oracle(inference: InferenceStub) -> None:
    message = request(sampling=pb.Sampling(num_choices=3, seed=9), stopping=pb.Stopping(stop=["ab", "\u00e9"]))
    params = SamplingParams(n=3, max_tokens=40, stop=("ab", "\u00e9"))
    seen = read(inference.Generate(message))
    assert sorted(seen) == [0, 1, 2]
    for choice, (ids, text, finish) in seen.items():
        want_ids, want_text, reason = expected(9, choice, params)
        assert (ids, text) == (want_ids, want_text)
        assert pb.Reason.Name(finish.reason).lower() == reason
        assert finish.usage == pb.Usage(prompt_tokens=4, cached_tokens=2, output_tokens=len(ids))
        assert finish.seed == 9
        assert (finish.stop_match in ("ab", "\u00e9")) == (reason == "stop")


def test_prompts_of_every_kind(inference: InferenceStub, service: Service) -> None:
    chat = pb.Chat(messages=[pb.Message(role="user", content="hi")])
    for name, given in (("prompt_text", "hello"), ("prompt_chat", chat)):
        message = pb.SubmitRequest(request_id=f"kind-{name}", stopping=pb.Stopping(max_tokens=1))
        message.MergeFrom(pb.SubmitRequest(**{name: given}))
        read(inference.Generate(message))
    packed = {job.request.request_id: job.request.prompt_token_ids[::4] for job in service.core.jobs.values()}
    assert packed["kind-prompt_text"] == b"hello"
    assert packed["kind-prompt_chat"] == b"<user>hi<assistant>"


def test_submit_get_stream_cancel(inference: InferenceStub) -> None:
    assert inference.Submit(request("a")).state in (pb.QUEUED, pb.RUNNING)
    assert inference.Submit(request("a")).request_id == "a"  # the same job
    whole = read(inference.Stream(pb.StreamRequest(request_id="a")))[0]
    assert len(whole[0]) == 40
    assert read(inference.Stream(pb.StreamRequest(request_id="a", from_position=[25])), 25)[0][0] == whole[0][25:]
    assert read(inference.Stream(pb.StreamRequest(request_id="a", from_position=[40])), 40)[0][0] == []
    job = inference.Get(pb.GetRequest(request_id="a"))
    assert job.state == pb.FINISHED
    assert (list(job.choices[0].token_ids), job.choices[0].text) == whole[:2]
    assert job.seed == 5
    assert not inference.Get(pb.GetRequest(request_id="a", include_output=False)).choices[0].token_ids
    assert inference.Cancel(pb.JobRef(request_id="a")).choices[0].finish.reason == pb.LENGTH  # no effect any more


def test_cancel_ends_the_stream_and_frees_the_engine(inference: InferenceStub, service: Service) -> None:
    message = request("long", stopping=pb.Stopping(max_tokens=2000))
    stream = inference.Generate(message)
    first = next(stream)
    inference.Cancel(pb.JobRef(request_id="long"))
    finish = read([first, *stream])[0][2]
    assert finish.reason == pb.CANCELLED
    service.wait_until(lambda: not service.core.replicas[0].jobs)


def test_client_that_goes_away_cancels_at_once(inference: InferenceStub, service: Service) -> None:
    stream = inference.Generate(request("gone", stopping=pb.Stopping(max_tokens=2000)))
    next(stream)
    stream.cancel()
    started = time.monotonic()
    service.wait_until(lambda: service.core.jobs["gone"].state == "finished")
    assert time.monotonic() - started < 1
    assert inference.Get(pb.GetRequest(request_id="gone")).choices[0].finish.reason == pb.CANCELLED


def test_detached_job_survives_its_reader(inference: InferenceStub, service: Service) -> None:
    stream = inference.Generate(request("detached", stopping=pb.Stopping(max_tokens=100), on_disconnect=pb.DETACH))
    next(stream)
    stream.cancel()
    service.wait_until(lambda: service.core.jobs["detached"].readers == 0)
    assert len(read(inference.Stream(pb.StreamRequest(request_id="detached")))[0][0]) == 100


def test_deadlines(inference: InferenceStub) -> None:
    message = request("late", stopping=pb.Stopping(max_tokens=2000))
    message.deadline.FromMilliseconds(200)
    ids, _, finish = read(inference.Generate(message))[0]
    assert finish.reason == pb.DEADLINE
    assert 5 < len(ids) < 2000
    assert list(inference.Get(pb.GetRequest(request_id="late")).choices[0].token_ids) == ids


def test_job_takes_the_deadline_of_its_call(inference: InferenceStub) -> None:
    stream = inference.Generate(request("late-call", stopping=pb.Stopping(max_tokens=2000)), timeout=0.8)
    with contextlib.suppress(grpc.RpcError):  # on a busy machine the call ends before the finish has come
        assert read(stream)[0][2].reason == pb.DEADLINE
    assert inference.Get(pb.GetRequest(request_id="late-call")).choices[0].finish.reason == pb.DEADLINE


def test_waiting_stream_says_that_it_is_alive(inference: InferenceStub, engine: FakeEngine) -> None:
    stream = inference.Generate(request("idle", stopping=pb.Stopping(max_tokens=2000)))
    next(stream)
    engine.is_frozen = True
    states = []
    for chunk in stream:
        states += [chunk.state] if chunk.HasField("state") else []
        if len(states) == 2:
            break
    engine.is_frozen = False
    stream.cancel()
    assert states == [pb.RUNNING, pb.RUNNING]


def test_logprobs_come_with_their_tokens(inference: InferenceStub) -> None:
    chunks = list(inference.Generate(request(output=pb.Output(logprobs=2))))
    for chunk in chunks:
        assert [entry.token_id for entry in chunk.logprobs] == list(chunk.token_ids)
        assert all(list(entry.top_ids) == [entry.token_id, 7] for entry in chunk.logprobs)


def test_readers_are_bounded(inference: InferenceStub) -> None:
    inference.Submit(request("popular", stopping=pb.Stopping(max_tokens=2000)))
    streams = [inference.Stream(pb.StreamRequest(request_id="popular")) for _ in range(4)]
    for stream in streams:
        next(stream)
    error = refusal(inference.Stream(pb.StreamRequest(request_id="popular")))
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    for stream in streams:
        stream.cancel()
    inference.Cancel(pb.JobRef(request_id="popular"))


REFUSED = {
    "empty prompt": ({"prompt_token_ids": pb.TokenIds()}, "INVALID_ARGUMENT", "empty"),
    "no prompt": (None, "INVALID_ARGUMENT", "no prompt"),
    "prompt too long": ({"prompt_token_ids": pb.TokenIds(ids=[1] * 5000)}, "OUT_OF_RANGE", "2048"),
    "output too long": ({"stopping": pb.Stopping(max_tokens=2045)}, "OUT_OF_RANGE", "2044"),
    "id out of range": ({"prompt_token_ids": pb.TokenIds(ids=[256])}, "INVALID_ARGUMENT", "256"),
    "negative temperature": ({"sampling": pb.Sampling(temperature=-1)}, "INVALID_ARGUMENT", "temperature"),
    "temperature NaN": ({"sampling": pb.Sampling(temperature=float("nan"))}, "INVALID_ARGUMENT", "temperature"),
    "huge temperature": ({"sampling": pb.Sampling(temperature=1e30)}, "INVALID_ARGUMENT", "temperature"),
    "infinite penalty": ({"sampling": pb.Sampling(presence_penalty=float("inf"))}, "INVALID_ARGUMENT", "presence"),
    "top_p 0": ({"sampling": pb.Sampling(top_p=0)}, "INVALID_ARGUMENT", "top_p"),
    "huge top_k": ({"sampling": pb.Sampling(top_k=2**32 - 1)}, "INVALID_ARGUMENT", "top_k"),
    "n 0": ({"sampling": pb.Sampling(num_choices=0)}, "INVALID_ARGUMENT", "n (0)"),
    "n 129": ({"sampling": pb.Sampling(num_choices=129)}, "INVALID_ARGUMENT", "128"),
    "max_tokens 0": ({"stopping": pb.Stopping(max_tokens=0)}, "INVALID_ARGUMENT", "max_tokens"),
    "logprobs 21": ({"output": pb.Output(logprobs=21)}, "INVALID_ARGUMENT", "20"),
    "bias twice": (
        {"sampling": pb.Sampling(logit_bias=[pb.LogitBias(token_id=1), pb.LogitBias(token_id=1)])},
        "INVALID_ARGUMENT",
        "twice",
    ),
    "unknown model": ({"model": "other"}, "NOT_FOUND", "'tiny'"),
    "bad id": ({"request_id": "a b"}, "INVALID_ARGUMENT", "request_id"),
    "negative deadline": ({"deadline": {"seconds": -1}}, "INVALID_ARGUMENT", "deadline"),
    "unknown on_disconnect": ({"on_disconnect": 77}, "INVALID_ARGUMENT", "on_disconnect"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused(case: str, inference: InferenceStub) -> None:
    fields, code, text = REFUSED[case]
    if fields is None:
        message = pb.SubmitRequest()
    else:
        message = request(**{name: value for name, value in fields.items() if name != "prompt_token_ids"})
        if "prompt_token_ids" in fields:
            message.prompt_token_ids.CopyFrom(fields["prompt_token_ids"])
    error = refusal(inference.Generate(message))
    assert error.code().name == code
    assert text in error.details()
    assert rpc_status.from_call(error) is not None


def test_unknown_ids(inference: InferenceStub) -> None:
    assert refusal(inference.Stream(pb.StreamRequest(request_id="nope"))).code() == grpc.StatusCode.NOT_FOUND
    for method, message in (
        (inference.Get, pb.GetRequest(request_id="nope")),
        (inference.Cancel, pb.JobRef(request_id="nope")),
    ):
        error = unary_refusal(method, message)
        assert error.code() == grpc.StatusCode.NOT_FOUND
        assert "'nope' is unknown" in error.details()
    assert unary_refusal(inference.Submit, request("")).code() == grpc.StatusCode.INVALID_ARGUMENT


def test_position_past_the_end(inference: InferenceStub) -> None:
    read(inference.Generate(request("short")))
    error = refusal(inference.Stream(pb.StreamRequest(request_id="short", from_position=[41])))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "41" in error.details()


def test_same_id_with_another_body(inference: InferenceStub) -> None:
    inference.Submit(request("twice"))
    error = unary_refusal(inference.Submit, request("twice", sampling=pb.Sampling(top_k=3)))
    assert error.code() == grpc.StatusCode.ALREADY_EXISTS
    assert "'twice'" in error.details()


def test_damaged_bytes(channel: grpc.Channel) -> None:
    submit = channel.unary_unary("/phalanx.v1.Inference/Submit")
    surrogate = b"\x0a\x01a\x1a\x03\xed\xa0\x80"  # request_id "a", prompt_text of half a surrogate pair
    for data in (b"\xff\xff", b"\x0a\x05a", surrogate):
        error = unary_refusal(submit, data)
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert "phalanx.v1.SubmitRequest" in error.details()
        assert "DecodeError" not in error.details()
    stream = channel.unary_stream("/phalanx.v1.Inference/Stream")
    assert refusal(stream(b"\xff")).code() == grpc.StatusCode.INVALID_ARGUMENT


def test_message_of_20_mb(inference: InferenceStub) -> None:
    message = request("big", prompt_text="x" * 20_000_000)
    assert unary_refusal(inference.Submit, message).code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_long_text_is_refused_with_a_sentence(inference: InferenceStub) -> None:
    error = unary_refusal(inference.Submit, request("text", prompt_text="x" * 5000))
    assert error.code() == grpc.StatusCode.OUT_OF_RANGE
    assert "5000" in error.details()


def test_our_bugs_are_internal_without_details(
    service: Service, inference: InferenceStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*args: object) -> None:
        raise KeyError("secret/path")

    monkeypatch.setattr(service.core, "job", explode)
    error = unary_refusal(inference.Get, pb.GetRequest(request_id="a"))
    assert error.code() == grpc.StatusCode.INTERNAL
    assert "incident" in error.details()
    assert "secret" not in error.details()
    assert "KeyError" not in error.details()


def test_status(channel: grpc.Channel, service: Service) -> None:
    service.wait_until(lambda: service.core.replicas[0].heartbeat is not None)
    state = ClusterStub(channel).Status(pb.StatusRequest())
    replica = state.replicas[0]
    assert (state.model, state.draining, state.version) == ("tiny", False, "0.1.0")
    assert (replica.state, replica.incarnation, list(replica.ranks)) == ("ready", 1, ["rank 0: pid 1 cpu replica 0"])
    assert dict(replica.startup_s) == {"load": 0.5, "warm_up": 0.25}
    assert (replica.num_total_blocks, replica.block_size, replica.max_request_tokens) == (100, 16, 2048)
    assert state.jobs.finished > 5


def test_health(channel: grpc.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    for name in ("", "inference", "model/tiny"):
        assert (
            health.Check(health_pb2.HealthCheckRequest(service=name)).status == health_pb2.HealthCheckResponse.SERVING
        )
    error = unary_refusal(health.Check, health_pb2.HealthCheckRequest(service="other"))
    assert error.code() == grpc.StatusCode.NOT_FOUND
    watch = health.Watch(health_pb2.HealthCheckRequest(service="inference"))
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    watch.cancel()


def test_unknown_method(channel: grpc.Channel) -> None:
    error = unary_refusal(channel.unary_unary("/phalanx.v1.Inference/Explode"), b"")
    assert error.code() == grpc.StatusCode.UNIMPLEMENTED


def test_regenerating_the_stubs_changes_nothing(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    subprocess.run(
        [root / "scripts/protos", tmp_path], check=True, env={"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"}
    )
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    kept = {path.name: path.read_text() for path in (root / "phalanx/deploy/server").glob("phalanx_pb2*")}
    assert made == kept

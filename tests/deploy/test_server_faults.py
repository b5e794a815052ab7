"""Replicas that die, hang, repeat themselves and lie, over real sockets (about 9 s)."""

import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from google.rpc.error_details_pb2 import RetryInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from phalanx.deploy.client import Client, Job
from phalanx.deploy.server import phalanx_pb2 as pb
from phalanx.deploy.server import supervise
from phalanx.deploy.server.phalanx_pb2_grpc import InferenceStub
from phalanx.errors import OverloadedError, UnavailableError
from phalanx.runtime.sampling_params import SamplingParams
from tests.deploy.fake_engine import Service, serving
from tests.runtime.controller.world import expected

PARAMS = SamplingParams(max_tokens=150, seed=11, n=2, stop=("baab", "aaaa"))


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with serving(tmp_path) as service:
        yield service


def whole(client: Client, request_id: str, params: SamplingParams = PARAMS) -> None:
    """The finished job is what an undisturbed run gives."""
    job = client.get(request_id)
    assert job.state == "finished"
    for index, choice in enumerate(job.choices):
        assert params.seed is not None
        assert (list(choice.token_ids), choice.text, choice.finish_reason) == expected(params.seed, index, params)


def follow(client: Client, params: SamplingParams = PARAMS, request_id: str = "job") -> Iterator[int]:
    """Generate, counting tokens; afterwards the stream and the job equal the oracle."""
    ids: dict[int, list[int]] = {}
    text: dict[int, str] = {}
    for chunk in client.generate([1, 2, 3], params, request_id=request_id):
        ids[chunk.choice] = [*ids.get(chunk.choice, []), *chunk.token_ids]
        text[chunk.choice] = text.get(chunk.choice, "") + chunk.text
        yield sum(map(len, ids.values()))
    for index in range(params.n):
        assert params.seed is not None
        assert (ids[index], text[index]) == expected(params.seed, index, params)[:2]
    whole(client, request_id, params)


def test_second_replica_continues_with_identical_tokens(service: Service) -> None:
    first, second = service.engine(0), service.engine(1)
    with service.client() as client:
        lost = False
        for count in follow(client):
            if count > 40 and not lost:
                lost = True
                service.run(first.drop_link())
        assert lost
    assert second.placed[-1].outputs != [b"", b""]
    assert service.core.meters.migrations["link"] == 1
    state = service.client().status()
    assert [replica.state for replica in state.replicas] == ["lost", "ready"]


def test_silent_replica_is_fenced_and_its_late_tokens_dropped(service: Service) -> None:
    first = service.engine(0)
    supervisor = service.supervisor()
    with service.client() as client:
        stream = follow(client)
        next(stream)
        first.is_mute = True  # but it goes on making tokens
        started = time.monotonic()
        service.wait_until(lambda: service.core.replicas[0].state == "lost")
        assert time.monotonic() - started < 1.5  # lease 1 s
        service.engine(1)
        for _ in stream:
            pass
    assert service.core.meters.losses["lease"] == 1
    service.wait_until(lambda: first.stopped)
    assert "no heartbeat" in first.stopped
    service.wait_until(lambda: supervise.Reclaim(0, 1, "lease") in supervisor.received)


def test_last_words_of_an_engine_are_kept(service: Service) -> None:
    engine = service.engine(0)
    service.run(_call(engine.fail, "Traceback: CUDA error"))
    service.wait_until(lambda: service.core.replicas[0].state == "lost")
    with service.client() as client:
        replica = client.status().replicas[0]
    assert "CUDA error" in str(replica.error)
    assert "rank 3 on node-b" in str(replica.error)
    assert "/tmp/rank3.log" in str(replica.error)


async def _call(function: object, *args: object) -> None:
    function(*args)


def test_duplicates_and_stale_epochs_are_dropped(service: Service) -> None:
    service.engine(0, sends_twice=True, sends_stale=True)
    with service.client() as client:
        for _ in follow(client):
            pass
    assert service.core.meters.fenced["position"] > 50
    assert service.core.meters.fenced["epoch"] > 50


def test_old_incarnation_is_told_to_end(service: Service) -> None:
    service.engine(0, incarnation=3)
    for incarnation in (2, 3):
        late = service.engine(0, incarnation=incarnation)
        service.wait_until(late.closed.is_set)
        assert late.stopped is not None
        assert str(incarnation) in late.stopped
        assert not late.is_welcome
    with service.client() as client:
        for _ in follow(client):
            pass


def test_restarted_replica_takes_its_jobs_back(service: Service) -> None:
    supervisor = service.supervisor()
    first = service.engine(0)
    with service.client() as client:
        stream = follow(client)
        next(stream)
        service.run(supervisor.send(supervise.ReplicaGone(0, 1, "sigkill", "killed by signal 9")))
        service.wait_until(lambda: service.core.replicas[0].state == "lost")
        assert service.core.jobs["job"].state == "queued"
        assert client.status().replicas[0].error == "killed by signal 9"
        service.run(supervisor.send(supervise.ReplicaStarting(0, 2)))
        service.wait_until(lambda: service.core.replicas[0].incarnation == 2)
        service.engine(0, incarnation=2)
        for _ in stream:
            pass
    assert first.stopped
    assert service.core.meters.losses["sigkill"] == 1


def test_reclaim_is_repeated_for_a_new_supervisor(service: Service) -> None:
    engine = service.engine(0)
    service.run(engine.drop_link())
    service.wait_until(lambda: service.core.replicas[0].state == "lost")
    supervisor = service.supervisor()
    service.wait_until(lambda: supervisor.received == [supervise.Reclaim(0, 1, "link")])


def test_engine_refuses_one_request(service: Service) -> None:
    service.engine(0, refusal="the KV pool holds 100 blocks, the request needs 200")
    with service.client() as client:
        chunks = list(client.generate([1, 2], SamplingParams(max_tokens=4)))
    assert [chunk.finish_reason for chunk in chunks] == ["error"]
    assert "needs 200" in str(chunks[0].error)


def test_stop_string_stops_the_engine(service: Service) -> None:
    engine = service.engine(0)
    params = SamplingParams(max_tokens=2000, seed=1, stop=("ab",))
    with service.client() as client:
        for _ in follow(client, params):
            pass
    service.wait_until(lambda: not engine.rows)
    assert [(abort.job, abort.choice) for abort in engine.aborted] == [("job", 0)]


def test_garbage_from_an_engine_ends_its_link_only(service: Service) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{service.ports.engine_listen}") as channel:
        call = channel.stream_stream("/phalanx.v1.EngineLink/Connect")(iter([b"\xc1garbage"]))
        with pytest.raises(grpc.RpcError, match="not a frame"):
            next(call)
    service.engine(0)
    with service.client() as client:
        for _ in follow(client):
            pass


def test_queue_is_bounded_and_ordered_by_priority(tmp_path: Path) -> None:
    with serving(tmp_path, core={"max_queue": 3}) as service, service.client() as client:
        jobs = [client.submit([1], SamplingParams(max_tokens=3), priority=-number) for number in range(3)]
        with pytest.raises(OverloadedError, match="3 requests wait") as caught:
            client.submit([1], SamplingParams(max_tokens=3))
        assert caught.value.retry_after_s > 0
        engine = service.engine(0)
        for job in jobs:
            assert len(finished(client, job).choices[0].token_ids) == 3
        assert [place.job for place in engine.placed] == [job.request_id for job in reversed(jobs)]
        assert service.core.meters.rejected["queue_full"] == 1


def finished(client: Client, job: Job) -> Job:
    for _ in client.stream(job.request_id):
        pass
    return client.get(job.request_id)


def test_drain(service: Service) -> None:
    service.engine(0)
    supervisor = service.supervisor()
    with service.client() as client, grpc.insecure_channel(service.address) as channel:
        running = client.submit([1], SamplingParams(max_tokens=100, seed=2))
        assert client.drain().running == 1
        with pytest.raises(UnavailableError, match="draining"):
            client.submit([1])
        with pytest.raises(grpc.RpcError) as caught:
            list(InferenceStub(channel).Generate(pb.SubmitRequest(prompt_text="x")))
        status = rpc_status.from_call(caught.value)
        assert status.details[0].Is(RetryInfo.DESCRIPTOR)
        health = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(service="inference"))
        while next(watch).status != health_pb2.HealthCheckResponse.NOT_SERVING:
            pass
        assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
        assert client.submit([1], SamplingParams(max_tokens=100, seed=2), request_id=running.request_id) is not None
        assert finished(client, running).choices[0].finish_reason == "length"  # re-attach stays open
        service.wait_until(lambda: supervise.DrainDone() in supervisor.received)
        assert not client.status().jobs.running
        client.drain(undo=True)
        assert finished(client, client.submit([1], SamplingParams(max_tokens=2))).state == "finished"


def test_grace_after_disconnect(tmp_path: Path) -> None:
    with serving(tmp_path, core={"detach_grace_s": 0.3}) as service:
        service.engine(0)
        with grpc.insecure_channel(service.address) as channel:
            inference = InferenceStub(channel)
            message = pb.SubmitRequest(prompt_text="x", on_disconnect=pb.CANCEL_AFTER_GRACE)
            for request_id in ("left", "came-back"):
                message.request_id = request_id
                stream = inference.Generate(message)
                next(stream)
                stream.cancel()
            service.wait_until(lambda: not any(job.readers for job in service.core.jobs.values()))
            back = inference.Stream(pb.StreamRequest(request_id="came-back"))
            service.wait_until(lambda: service.core.jobs["left"].state == "finished")
            assert service.core.jobs["left"].choices[0].finish.reason == "cancelled"
            assert service.core.jobs["came-back"].state == "running"
            back.cancel()

"""PlanScale and ApplyScale over real sockets, with an engine and a supervisor that are told what to say (about 4 s)."""

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from phalanx.deploy import cli
from phalanx.deploy.client import AsyncClient, Client, ScaleOperation
from phalanx.deploy.client_scale import ReplicaScale, StageBytes
from phalanx.deploy.server import cluster, supervise
from phalanx.errors import ConfigError, DuplicateRequestError, InvalidRequestError, UnavailableError
from phalanx.runtime.frames import AbortScale, Scale
from tests.deploy.fake_engine import FakeEngine, FakeSupervisor, Service, serving


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with serving(tmp_path) as service:
        yield service


@pytest.fixture
def client(service: Service) -> Iterator[Client]:
    with service.client() as client:
        yield client


async def call(function: Callable[..., None], *args: object, **options: object) -> None:
    function(*args, **options)


def begun(service: Service, client: Client, op_id: str = "grow") -> tuple[FakeEngine, FakeSupervisor]:
    """An engine that prepares to have two dp ranks, and the supervisor that was asked for one more."""
    supervisor, engine = service.supervisor(), service.engine()
    assert client.apply_scale(op_id, 2).phase == "PREPARING"
    service.wait_until(lambda: engine.scales == [Scale(op_id, 2)])
    service.run(call(engine.tell_scale, op_id, "PREPARING", 1))
    service.wait_until(lambda: supervise.StartRanks(0, 1, op_id, [[1]]) in supervisor.received)
    return engine, supervisor


def wait_phase(service: Service, op_id: str, phase: str) -> None:
    service.wait_until(lambda: service.core.scaling.find(op_id).phase == phase)


def test_plan(service: Service, client: Client) -> None:
    service.engine()
    plan = client.plan_scale(3)
    (one,) = plan.replicas
    assert (one.replica, one.old, one.new, one.slots_per_rank, one.num_experts) == (0, 1, 3, 8, 16)
    assert one.stages == (StageBytes(2**20, 2**21, 2**22, 2**23),)
    assert (one.num_added, one.num_removed, one.loaded_bytes, one.refusal) == (2, 0, 2 * 3 * 2**20, None)
    assert client.plan_scale(3, replica=0) == plan
    assert client.plan_scale(2).plan_id != plan.plan_id
    assert client.plan_scale(9).replicas[0].refusal == "data 9: too many"


def test_grow(service: Service, client: Client) -> None:
    engine, supervisor = begun(service, client)
    assert client.status().replicas[0].scale == ReplicaScale(0, 1, 2, "PREPARING", "", "grow")
    service.run(call(engine.tell_scale, "grow", "COMMITTING", 1))
    wait_phase(service, "grow", "COMMITTING")
    service.run(call(engine.tell_scale, "grow", "DONE", 2))
    wait_phase(service, "grow", "DONE")
    replica = client.status().replicas[0]
    assert (replica.data, replica.scale, replica.ranks) == (2, None, ("rank 0: pid 0", "rank 1: pid 1"))
    assert client.apply_scale("grow", 2) == ScaleOperation(
        "grow", 2, "DONE", (ReplicaScale(0, 1, 2, "DONE", "", "grow"),)
    )
    assert engine.scales == [Scale("grow", 2)], "asked once"
    service.run(supervisor.send(supervise.ReplicaStarting(0, 2)))
    service.wait_until(lambda: supervise.Start(0, 2, 2) in supervisor.received)


def test_nodes_to_leave(service: Service, client: Client) -> None:
    engine = service.engine()
    client.plan_scale(3, leave=["a"])
    assert client.plan_scale(2, leave="c").replicas[0].refusal == "leave c: no rank is there; ranks are on a, b"
    with pytest.raises(ConfigError, match="leave c: no rank is there"):
        client.apply_scale("elsewhere", 2, leave=["a", "c"])
    assert client.plan_scale(2, leave=["a"]).plan_id != client.plan_scale(2).plan_id
    client.apply_scale("leave", 2, leave=["b", "a", "b"])
    service.wait_until(lambda: engine.scales == [Scale("leave", 2, ("a", "b"))])
    assert [(asked.data, asked.leave) for asked in engine.asked][-1] == (2, ("a", "b"))
    client.apply_scale("leave", 2, leave=["a", "b"])
    with pytest.raises(DuplicateRequestError, match="data 2 of all replicas without a, b"):
        client.apply_scale("leave", 2)


def test_no_room(service: Service, client: Client) -> None:
    engine, supervisor = begun(service, client)
    service.run(supervisor.send(supervise.GrowFailed(0, 1, "grow", "0 of 4 CPU free")))
    service.wait_until(lambda: engine.scales[1:] == [AbortScale("grow", "0 of 4 CPU free")])
    service.run(call(engine.tell_scale, "grow", "ABORTED", 1, gone=[1], detail="0 of 4 CPU free"))
    service.wait_until(lambda: supervise.EndRanks(0, 1, [1]) in supervisor.received)
    assert client.apply_scale("grow", 2).replicas[0].detail == "0 of 4 CPU free"


def test_the_engine_dies(service: Service, client: Client) -> None:
    engine, supervisor = begun(service, client)
    service.run(engine.drop_link())
    wait_phase(service, "grow", "ABORTED")
    assert "restarts at its former size" in client.apply_scale("grow", 2).replicas[0].detail
    service.run(supervisor.send(supervise.ReplicaStarting(0, 2)))
    service.wait_until(lambda: supervise.Start(0, 2, None) in supervisor.received)


def test_refusals(service: Service, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnavailableError, match="no replica is up yet"):
        client.plan_scale(2)
    engine, _ = begun(service, client)
    with pytest.raises(ConfigError, match=r"'grow' to data 2 is under way \(PREPARING\)"):
        client.apply_scale("other", 3)
    with pytest.raises(DuplicateRequestError, match="'grow' is for data 2"):
        client.apply_scale("grow", 3)
    service.run(call(engine.tell_scale, "grow", "DONE", 2))
    wait_phase(service, "grow", "DONE")
    with pytest.raises(ConfigError, match="replica 0: data 9: too many"):
        client.apply_scale("many", 9)
    with pytest.raises(ConfigError, match="plan 123 is outdated"):
        client.apply_scale("planned", 3, plan_id="123")
    for size in (0, 5000):
        with pytest.raises(InvalidRequestError, match=rf"data \({size}\) must be 1 to 4096"):
            client.plan_scale(size)
    with pytest.raises(InvalidRequestError, match="there is no replica 5; the replicas are 0"):
        client.apply_scale("nobody", 3, 5)
    monkeypatch.setattr(cluster, "ANSWER_S", 0.1)
    engine.is_silent = True
    with pytest.raises(UnavailableError, match="replica 0 was asked what scaling takes and has not answered"):
        client.plan_scale(3)


def test_async_client(service: Service) -> None:
    engine = service.engine()

    async def work() -> None:
        async with AsyncClient(service.address) as client:
            plan = await client.plan_scale(2)
            assert (await client.apply_scale("a", 2, plan_id=plan.plan_id)).phase == "PREPARING"
            engine.tell_scale("a", "DONE", 2)
            while not (await client.apply_scale("a", 2)).is_over:
                await asyncio.sleep(0.01)

    service.run(work())


def test_command(service: Service, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is printed before and after, and the exit codes."""
    engine = service.engine()

    def run(*words: str) -> tuple[int, str, str]:
        code = cli.main(["scale", "--address", service.address, *words])
        return code, *capsys.readouterr()

    code, out, _ = run("--data", "3", "--plan")
    assert code == 0
    assert out.splitlines() == [
        "replica 0: data 1 -> 3: 1 -> 3 ranks, 8 -> 24 expert slots per layer (8 per rank) for 16 experts",
        "  2 new ranks load 6 MiB from disk, each:",
        "    stage 0: 1 MiB of weights without experts, 2 MiB of experts",
        "  memory of a rank of stage 0: 15 MiB (3 MiB of weights, 4 MiB of workspace, 8 MiB of KV)",
    ]
    code, _, err = run("--data", "9", "--yes")
    assert (code, "replica 0: data 9: too many" in err) == (2, True)
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    code, _, err = run("--data", "3")
    assert (code, "add --yes" in err) == (2, True)
    assert engine.scales == []

    engine.tell_when_asked = "DONE"
    assert run("--data", "3", "--yes", "--op-id", "a")[:2] == (0, f"{out}a: replica 0 has data 3 now (as told)\n")
    code, out, _ = run("--data", "3", "--json", "--op-id", "a")
    plan, operation = map(json.loads, out.splitlines())
    assert (code, plan["replicas"][0]["old"], operation["phase"]) == (0, 3, "DONE")
    engine.tell_when_asked = "ABORTED"
    code, out, _ = run("--data", "2", "--yes", "--op-id", "b")
    assert code == 1
    assert "1 ranks leave; before, 3 expert rows (3 MiB) move to ranks that stay" in out
    assert out.splitlines()[-1] == "b: replica 0 was not scaled from 3 to 2 (as told)"

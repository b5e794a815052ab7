"""The controller as a process: ports, end of stdin, drain, refusals to start (about 7 s, most of it imports)."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from phalanx.deploy.client import Client
from phalanx.deploy.server.addresses import split_address
from phalanx.deploy.server.options import read_options
from phalanx.deploy.server.server import Server
from phalanx.errors import ConfigError, PhalanxError
from phalanx.runtime.sampling_params import SamplingParams
from tests.deploy.fake_engine import FakeEngine, write_tokenizer


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Any]:
    processes: list[subprocess.Popen[str]] = []

    def start(**options: Any) -> tuple[subprocess.Popen[str], dict[str, Any]]:
        plan = {"model_name": "tiny", "model_path": str(write_tokenizer(tmp_path)), "vocab_size": 256}
        plan |= {"max_model_len": 4096, "listen": "127.0.0.1:0", **options}
        (tmp_path / "plan.json").write_text(json.dumps(plan))
        process = subprocess.Popen(
            [sys.executable, "-m", "phalanx.deploy.server.main", "--plan", tmp_path / "plan.json"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        processes.append(process)
        assert process.stdout is not None
        line = process.stdout.readline()
        return process, json.loads(line) if line else {}

    yield start
    for process in processes:
        with process:
            process.kill()


def test_ends_with_its_supervisor(started: Any) -> None:
    process, ports = started(metrics_listen="127.0.0.1:0")
    assert set(ports) == {"listen", "engine_listen", "metrics"}
    assert all(ports.values())
    began = time.monotonic()
    process.stdin.close()
    assert process.wait(5) == 0
    assert time.monotonic() - began < 2


def test_drain_then_second_signal(started: Any) -> None:
    process, ports = started(drain_s=30)
    with Client(f"127.0.0.1:{ports['listen']}") as client:

        async def run() -> None:
            engine = FakeEngine(f"127.0.0.1:{ports['engine_listen']}", step_s=0.01)
            job = await asyncio.to_thread(client.submit, [1], SamplingParams(max_tokens=60, seed=1))
            stream = client.stream(job.request_id)
            await asyncio.to_thread(next, stream)
            process.send_signal(signal.SIGTERM)
            # The job runs to its end, and can be read to its end.
            rest = await asyncio.to_thread(list, stream)
            assert rest[-1].finish_reason == "length"
            assert await asyncio.to_thread(process.wait, 5) == 0
            await engine.drop_link()

        asyncio.run(run())
    process, ports = started(drain_s=30)
    with Client(f"127.0.0.1:{ports['listen']}") as client:
        client.submit([1])  # waits for a replica for ever
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert process.poll() is None
        assert client.status().draining
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 0


def test_drain_has_an_end(started: Any) -> None:
    process, ports = started(drain_s=0.3)
    with Client(f"127.0.0.1:{ports['listen']}") as client:
        client.submit([1])
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 0


def test_refusals_to_start(started: Any, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for key in ("listen", "engine_listen", "metrics_listen"):
            process, ports = started(**{key: address})
            assert not ports
            assert process.wait(5) == 2
            error = process.stderr.read()
            assert f"cannot listen on {address}: Address already in use" in error
            assert "configure another address" in error
            assert "Traceback" not in error
    process, _ = started(lissten="x")
    assert process.wait(5) == 2
    assert "lissten" in process.stderr.read()
    (tmp_path / "deep.json").write_text(
        '{"model_name": "", "vocab_size": 1, "max_model_len": 1, "core": {"leese_s": 1}}'
    )
    with pytest.raises(ConfigError, match=r"deep.json.*leese_s"):
        read_options(tmp_path / "deep.json")
    with pytest.raises(ConfigError, match="nowhere"):
        read_options(tmp_path / "nowhere.json")


def test_a_second_controller_cannot_share_the_port(tmp_path: Path) -> None:
    options = {"model_name": "tiny", "vocab_size": 10, "max_model_len": 10, "listen": "127.0.0.1:0"}
    (tmp_path / "plan.json").write_text(json.dumps(options))
    plan = read_options(tmp_path / "plan.json")

    async def run() -> None:
        first = Server(plan, None)
        ports = await first.start()
        second = Server(msgspec.structs.replace(plan, listen=f"127.0.0.1:{ports.listen}"), None)
        with pytest.raises(ConfigError, match="Address already in use"):
            await second.start()
        await first.stop()

    asyncio.run(run())


@pytest.mark.parametrize("address", ["", "50051", "localhost", "host:", "host:99999", ":1", "host:1x"])
def test_addresses(address: str) -> None:
    with pytest.raises(PhalanxError, match="host:port"):
        split_address(address)
    assert split_address("[::1]:5") == ("::1", 5)

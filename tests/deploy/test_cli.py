"""The program `phalanx`: exit codes and sentences without Ray (about 10 s), then one deployment from `up` to `down`.

The deployment is a real one on a local Ray cluster of two nodes and takes about 30 s on two quiet cores.
"""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from phalanx import errors
from phalanx.deploy import cli, detached
from phalanx.deploy.client import ClusterState, JobCounts, ReplicaStatus
from phalanx.deploy.client_scale import ReplicaScale
from phalanx.deploy.commands import down, status
from phalanx.deploy.state import Deployment, Deployments, process_started
from phalanx.deploy.up_report import UpReport
from tests.support.census import Census
from tests.support.deployment import ROOT, short_folder

Run = Callable[..., tuple[int, str, str]]
TINY = "model: {path: tiny, dtype: float32}\ndevice: cpu\n"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run a command line in this process: (exit code, stdout, stderr). Its records are in a folder of the test."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))

    def call(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main([str(word) for word in words])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "cluster.yaml"
        path.write_text(text)
        return path

    return write


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


# --- parsing and exit codes


def test_help_lists_every_command_and_brings_nothing_heavy() -> None:
    code = (
        "import sys\nfrom phalanx.deploy import cli\n"
        "try: cli.main(['--help'])\nexcept SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'ray', 'grpc', 'yaml', 'rich', 'msgspec'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    files = {path.stem for path in Path(cli.__file__).parent.joinpath("commands").glob("*.py")}
    assert set(cli.COMMANDS) <= files
    for word in (*cli.COMMANDS, "exit codes:", "PHALANX_DEBUG"):
        assert word in done.stdout


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_documents_its_flags(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([name, "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert "exit codes:" in out
    assert "--json" in out


@pytest.mark.parametrize("words", [[], ["nonsense"], ["up"], ["plan", "a", "b"], ["generate", "x", "--top-k", "many"]])
def test_wrong_command_line_is_bad_input(words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == cli.BAD_INPUT
    assert "usage: phalanx" in capsys.readouterr().err


def test_every_error_has_an_exit_code() -> None:
    expected = {
        2: "ConfigError CheckpointError InvalidRequestError RequestTooLongError UnknownRequestError "
        "DuplicateRequestError",
        3: "OverloadedError UnavailableError",
        1: "DeadlineError ReplicaLostError StepError",
    }
    for code, names in expected.items():
        for name in names.split():
            assert cli.exit_code(getattr(errors, name)("x")) == code
    known = {name for names in expected.values() for name in names.split()} | {"PhalanxError"}
    assert known == {name for name in dir(errors) if name.endswith("Error")}


def test_error_is_a_sentence_and_a_traceback_only_on_demand(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PHALANX_DEBUG", raising=False)
    code, out, err = run("plan", "missing.yaml")
    assert (code, out, err) == (2, "", "phalanx: missing.yaml: cannot be read: No such file or directory\n")
    code, out, err = run("plan", "missing.yaml", "--json")
    assert (code, err) == (2, "")
    assert json.loads(out) == {
        "error": "missing.yaml: cannot be read: No such file or directory",
        "kind": "ConfigError",
        "exit_code": 2,
    }
    monkeypatch.setenv("PHALANX_DEBUG", "1")
    code, out, err = run("plan", "missing.yaml")
    assert code == 2
    assert "Traceback" in err


# --- plan and the refusals of up


def test_plan_prints_text_and_json(run: Run, file: Callable[[str], Path]) -> None:
    path = file(TINY + "parallel: {tensor: 2, pipeline: 2}\nray: {nodes: 2}\nworkers: {threads: 1}\n")
    code, out, _ = run("plan", path)
    assert code == 0
    assert "# Ranks" in out
    assert "num_kv_heads" in out
    code, out, _ = run("plan", path, "--json")
    assert code == 0
    plan = json.loads(out)
    assert [rank["node"] for rank in plan["ranks"]] == ["local-0", "local-0", "local-1", "local-1"]


@pytest.mark.parametrize("command", ["plan", "up"])
@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("model: {path: /no/such/folder}\n", "model.path '/no/such/folder' is not a folder"),
        (TINY + "parallel: {tensor: 3}\n", "parallel.tensor (3) does not divide"),
        (TINY + "parallel: {tensor: 2}\nworkers: {threads: 1024}\n", "a group of 2 ranks (2048 CPUs) must sit on one"),
        (TINY + "server: {listn: 1}\n", "unknown key 'server.listn'"),
    ],
)
def test_what_cannot_work_is_refused_before_ray_starts(
    run: Run, file: Callable[[str], Path], command: str, text: str, sentence: str
) -> None:
    ports = "" if "server" in text else "server: {listen: '127.0.0.1:0', metrics: 'off'}\n"
    code, _, err = run(command, file(text + ports))
    assert code == 2
    assert sentence in err
    assert "Traceback" not in err


@pytest.mark.parametrize("key", ["listen", "metrics", "engine_listen"])
def test_up_refuses_a_taken_port_at_once(run: Run, file: Callable[[str], Path], key: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        addresses = {"listen": "127.0.0.1:0", "metrics": "'off'", "engine_listen": "127.0.0.1:0"}
        addresses[key] = f"127.0.0.1:{server.getsockname()[1]}"
        section = ", ".join(f"{name}: {value}" for name, value in addresses.items())
        code, _, err = run("up", file(TINY + f"server: {{{section}}}\n"))
    assert code == 2
    assert f"server.{key}: cannot listen on {addresses[key]}: Address already in use" in err


def test_detached_failure_comes_back_with_type_and_log(file: Callable[[str], Path], run: Run, tmp_path: Path) -> None:
    code, _, err = run("up", file("model: {path: /no/such/folder}\nserver: {metrics: 'off'}\n"), "--detach")
    assert code == 2
    assert "model.path '/no/such/folder' is not a folder" in err
    (log,) = (tmp_path / "phalanx").glob("up-*.log")
    assert f"the whole log is {log}" in err
    assert Deployments().running() == []


def test_detached_process_that_dies_without_a_word_shows_its_log(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run: Run
) -> None:
    program = tmp_path / "dies"
    program.write_text("#!/bin/sh\necho last words\nkill -9 $$\n")
    program.chmod(0o700)
    monkeypatch.setattr(detached.sys, "executable", str(program))
    with pytest.raises(errors.ReplicaLostError, match=r"status -9(.|\n)*last words"):
        detached.start(tmp_path / "cluster.yaml", UpReport(Console(file=io.StringIO()), as_json=True))


def test_report_writes_lines_for_people_and_objects_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    out = io.StringIO()
    with UpReport(Console(file=out, width=40), as_json=False) as report:
        report.waiting("for something")
        report.event("ready", "replica 0 is [ready] " + "x" * 60, {"replica": 0})
    assert out.getvalue() == "replica 0 is [ready] " + "x" * 60 + "\n"
    with UpReport(Console(), as_json=True) as report:
        report.event("ready", "text", {"replica": 0})
        report.log('{"source": "phalanx.controller", "event": "up"}')
        report.log("Traceback")
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["source"] for row in rows] == ["up", "phalanx.controller", "phalanx.controller"]
    assert rows[0]["replica"] == 0
    assert rows[2]["text"] == "Traceback"


# --- commands that need a deployment, without one


@pytest.mark.parametrize(
    "words", [["status"], ["drain"], ["generate", "x"], ["submit", "x"], ["attach", "x"], ["cancel", "x"]]
)
def test_nothing_at_the_address_is_unreachable(run: Run, monkeypatch: pytest.MonkeyPatch, words: Sequence[str]) -> None:
    monkeypatch.setattr("phalanx.deploy.commands.connection.RETRY_S", 0.0)
    address = f"127.0.0.1:{free_port()}"
    code, _, err = run(*words, "--address", address)
    assert code == 3
    assert f"{address} cannot be reached" in err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--temperature", "-1"], "temperature (-1.0) must be a number in [0, 100]"),
        (["--top-p", "nan"], "top_p (nan)"),
        (["-n", "0"], "n (0) must be an integer from 1"),
        (["--address", "nowhere"], "address 'nowhere' is not host:port"),
    ],
)
def test_bad_request_is_refused_before_anything_is_sent(run: Run, words: Sequence[str], sentence: str) -> None:
    code, _, err = run("generate", "x", *words)
    assert code == 2
    assert sentence in err


@pytest.mark.parametrize("words", [[], ["--address", "127.0.0.1:1"], ["FILE"], ["--now", "FILE"]])
def test_down_without_a_deployment_is_no_failure(run: Run, file: Callable[[str], Path], words: Sequence[str]) -> None:
    path = file(TINY + "server: {listen: '127.0.0.1:1'}\n")
    code, out, _ = run("down", *(path if word == "FILE" else word for word in words))
    assert (code, out) == (0, "nothing is running\n")


STAND_IN = """
import signal, subprocess, sys, time
def leave(*_):
    time.sleep(0.2)
    sys.exit()
signal.signal(signal.SIGTERM, leave)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
print(child.pid, flush=True)
if len(sys.argv) > 1:
    signal.signal(signal.SIGTERM, lambda *_: (child.kill(), child.wait(), leave()))
while True:
    time.sleep(0.05)
"""


@pytest.fixture
def stand_in(run: Run) -> Iterator[Callable[..., Deployment]]:
    """Starts a process that stands in for a supervisor and has a child, which it ends only if it is `tidy`."""
    started: list[tuple[subprocess.Popen[str], int]] = []

    def start(*, is_tidy: bool, file: str = "/a") -> Deployment:
        process = subprocess.Popen(
            [sys.executable, "-c", STAND_IN, *["tidy"] * is_tidy], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        started.append((process, int(process.stdout.readline())))
        begun = process_started(process.pid)
        assert begun is not None
        deployment = Deployment(
            pid=process.pid,
            process_started=begun,
            listen=f"127.0.0.1:{free_port()}",
            file=file,
            log="",
            started=time.time(),
        )
        Deployments().add(deployment)
        return deployment

    yield start
    for process, child in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
        if process_started(child) is not None:
            os.kill(child, signal.SIGKILL)


def test_down_ends_a_supervisor_and_finds_what_it_leaves(
    run: Run, stand_in: Callable[..., Deployment], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(down, "GONE_S", 0.5)
    deployment = stand_in(is_tidy=True)
    code, out, _ = run("down", "--json")
    assert code == 0
    assert json.loads(out) == {"stopped": deployment.listen, "left": []}
    assert not deployment.is_running
    assert Deployments().running() == []

    untidy = stand_in(is_tidy=False)
    with socket.create_server(("127.0.0.1", untidy.port)):
        code, out, _ = run("down", "--address", untidy.listen)
    assert code == 1
    assert "time.sleep(60)" in out
    assert f"port {untidy.listen} is taken" in out


def test_one_of_several_deployments_must_be_named(run: Run, stand_in: Callable[..., Deployment]) -> None:
    first, second = stand_in(is_tidy=True), stand_in(is_tidy=True, file="/b")
    code, _, err = run("down")
    assert code == 2
    assert "2 deployments are running" in err
    assert first.listen in err
    code, _, _ = run("down", "--address", second.listen)
    assert code == 0
    assert Deployments().running() == [first]


def test_status_shows_every_replica() -> None:
    replica = ReplicaStatus(
        replica=0,
        state="ready",
        incarnation=3,
        ranks=("engine node a pid 1", "rank 0 (pp 0, dp 0, tp 0) node a pid 2 cpu"),
        num_jobs=2,
        num_running=2,
        num_waiting=1,
        num_free_blocks=90,
        num_total_blocks=100,
        block_size=16,
        startup_s={"load": 1.0},
        max_model_len=2048,
        max_request_tokens=2048,
        error="rank 1 died [x]",
        num_preemptions=0,
        prefix_queries=200,
        prefix_hits=50,
        num_generated_tokens=7,
        data=1,
        scale=ReplicaScale(0, 1, 2, "PREPARING", "", "grow"),
        expert_load=(30, 10),
        num_dropped=0,
        num_moved=0,
        num_single_experts=3,
    )
    out = io.StringIO()
    state = ClusterState("0.1.0", "tiny", True, JobCounts(1, 2, 3), (replica,))
    status.print_state(Console(file=out, width=100, color_system=None), state, "127.0.0.1:1")
    text = out.getvalue()
    assert "tiny at 127.0.0.1:1: draining, phalanx 0.1.0" in text
    assert "jobs: 2 running, 1 queued, 3 finished and kept" in text
    assert text.splitlines()[3].split() == ["0", "ready", "#3", "1", "2", "1", "90", "of", "100", "25", "%", "7"]
    assert "replica 0: rank 0 (pp 0, dp 0, tp 0) node a pid 2 cpu" in text
    assert "replica 0: scaling 1 -> 2 (grow): PREPARING" in text
    assert "expert load per rank: 30, 10 tokens (balancedness 0.67), 0 moved, 3 experts have one copy" in text
    assert "last failure: rank 1 died [x]" in text


# --- the whole life of a deployment


def rows(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


@pytest.mark.slow
def test_life_of_a_deployment(capsys: pytest.CaptureFixture[str]) -> None:
    """up --detach, status, generate, submit, attach, cancel, drain, a second up, doctor, down: as a user types them."""

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main([str(word) for word in words])
        return code, *capsys.readouterr()

    with Census() as census, short_folder() as folder:
        listen = f"127.0.0.1:{free_port()}"
        file = folder / "cluster.yaml"
        tiny = (ROOT / "examples" / "tiny.yaml").read_text()
        file.write_text(tiny + f"server: {{listen: '{listen}', metrics: 'off'}}\n")
        try:
            started = subprocess.run(
                [sys.executable, "-m", "phalanx.deploy.cli", "up", str(file), "--detach", "--json"],
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=150,
            )
            assert started.returncode == 0, started.stdout + started.stderr
            census.note_sockets()
            check_start(rows(started.stdout), listen)
            check_use(run, file, listen)
            code, out, err = run("down", file, "--json")
            assert (code, json.loads(out)) == (0, {"stopped": listen, "left": []}), err
            census.assert_gone(within_s=1.0)
            assert Deployments().running() == []
            assert run("down", file)[1] == "nothing is running\n"
        finally:
            run("down", file, "--now")


def check_start(events: list[dict[str, Any]], listen: str) -> None:
    kinds = [event["event"] for event in events]
    assert kinds == ["plan", "ray", "controller", "ready", "serving", "detached"]
    serving = events[4]
    assert list(serving["startup_s"]) == ["ray", "placement", "import", "rendezvous", "load", "warm_up"]
    assert serving["listen"] == listen
    assert f"phalanx generate 'def main():' --address {listen}" in serving["text"]
    (deployment,) = Deployments().running()
    assert (deployment.pid, deployment.listen, deployment.log) == (serving["pid"], listen, events[5]["log"])


def check_use(run: Run, file: Path, listen: str) -> None:
    code, out, _ = run("status", file, "--json")
    (replica,) = json.loads(out)["replicas"]
    assert (code, replica["state"], len(replica["ranks"])) == (0, "ready", 5)
    nodes = [line.split(" node ")[1].split()[0] for line in replica["ranks"][1:]]
    assert nodes[0] == nodes[1] != nodes[2] == nodes[3], "a tensor group sits on one node, the stages on two"
    assert "serving" in run("status")[1]  # found by its record, without file and address

    flags = ("--max-tokens", 24, "--temperature", 0, "--ignore-eos")
    code, out, _ = run("generate", "import os\n", *flags, "--json")
    assert code == 0
    streamed = rows(out)
    token_ids = [token for chunk in streamed for token in chunk["token_ids"]]
    assert (len(token_ids), streamed[-1]["finish_reason"]) == (24, "length")
    code, out, err = run("generate", "import os\n", *flags)
    assert (code, out) == (0, "".join(chunk["text"] for chunk in streamed) + "\n")
    assert "24 tokens" in err
    assert "end: length" in err
    code, out, _ = run("generate", "import os\n", *flags, "-n", 2)
    assert out.count("--- choice ") == 2

    code, out, _ = run("submit", "import os\n", *flags, "--request-id", "job-1")
    assert code == 0
    assert out.startswith("job-1 is ")
    code, out, _ = run("attach", "job-1", "--json")
    assert (code, [token for chunk in rows(out) for token in chunk["token_ids"]]) == (0, token_ids)
    code, out, _ = run("cancel", "job-1")
    assert (code, out) == (0, "job-1 is finished\n")
    code, _, err = run("attach", "job-2")
    assert (code, "job-2" in err) == (2, True)
    code, _, err = run("generate", "x", "--max-tokens", 10**6)
    assert code == 2, err

    assert run("drain", file)[0] == 0
    code, _, err = run("generate", "x", *flags)
    assert (code, "drain" in err) == (3, True)
    assert run("drain", file, "--undo")[0] == 0
    assert run("generate", "x", *flags)[0] == 0

    code, _, err = run("up", file)
    assert (code, f"cannot listen on {listen}: Address already in use" in err) == (2, True)

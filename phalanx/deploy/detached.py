"""`phalanx up --detach`: the same program again as a process of its own session, watched until it serves."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from phalanx import errors
from phalanx.deploy.state import Deployments
from phalanx.deploy.up_report import SOURCE, UpReport
from phalanx.errors import PhalanxError, ReplicaLostError

POLL_S = 0.1
STOP_S = 30.0
LAST_LINES = 20


def start(file: Path, report: UpReport) -> None:
    """Start `phalanx up FILE` in the background and pass its progress on; returns once it serves.

    Its output goes to a log file beside the record of the deployment. Ctrl-C while it starts ends it.

    Raises:
        PhalanxError: what made it fail, of the same type as there.
    """
    log = Deployments().folder / f"up-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    command = [sys.executable, "-m", "phalanx.deploy.cli", "up", str(file), "--json", "--log", str(log)]
    with log.open("xb") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    report.waiting(f"starting in the background; log {log}")
    try:
        for row in _rows(log, process):
            if "exit_code" in row:
                raise _error(row, log)
            if row.get("source") == SOURCE:
                event = row.pop("event")
                report.event(event, row.pop("text"), row)
                if event == "serving":
                    report.event("detached", f"runs on as pid {process.pid}; its log is {log}", {"log": str(log)})
                    return
    except BaseException:
        _stop(process)
        raise
    end = "\n".join(log.read_text(errors="replace").splitlines()[-LAST_LINES:])
    raise ReplicaLostError(f"`phalanx up` ended with status {process.returncode}; the end of its log {log}:\n{end}")


def _rows(log: Path, process: "subprocess.Popen[bytes]") -> Iterator[dict[str, Any]]:
    """The JSON objects among the lines of the log, as they come, until the process has ended."""
    with log.open("r", errors="replace") as lines:
        rest = ""
        while True:
            has_ended = process.poll() is not None
            rest += lines.read()
            *complete, rest = rest.split("\n")
            for line in complete:
                with contextlib.suppress(ValueError):
                    row = json.loads(line)
                    if isinstance(row, dict):
                        yield row
            if has_ended:
                return
            time.sleep(POLL_S)


def _error(row: dict[str, Any], log: Path) -> PhalanxError:
    """The error that the command line of the background process printed."""
    kind = getattr(errors, str(row.get("kind")), ReplicaLostError)
    error: PhalanxError = kind(f"{row.get('error')}\nthe whole log is {log}")
    return error


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """Both signals of an impatient user: what does not serve yet has nothing to finish."""
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S / 2)

"""How `phalanx up` tells its progress: with a spinner on a terminal, plain lines elsewhere, JSON lines for programs."""

import json
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.status import Status
from rich.text import Text

SOURCE = "up"
"""Marks a JSON line of `up` among those of the controller's log, which have the same shape."""

STYLES = {"lost": "red", "failed": "bold red", "ready": "green", "serving": "bold green", "drain": "yellow"}


class UpReport:
    """Takes progress from any thread; a context manager, so that the terminal is left clean.

    Args:
        console: where people read.
        as_json: JSON lines to stdout instead.
        is_verbose: show the controller's log on a terminal, too; elsewhere it is always shown.
    """

    def __init__(self, console: Console, *, as_json: bool, is_verbose: bool = False) -> None:
        self._console, self._as_json = console, as_json
        self._shows_log = is_verbose or as_json or not console.is_terminal
        self._lock = threading.Lock()
        self._spinner: Status | None = None
        if console.is_terminal and not as_json:
            self._spinner = console.status("")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.waiting("")

    def event(self, event: str, text: str, data: Mapping[str, Any] | None = None) -> None:
        """Something has happened: `event` is its key, `text` for people, `data` for programs."""
        if self._as_json:
            now = time.strftime("%Y-%m-%dT%H:%M:%S")
            row = {"time": now, "source": SOURCE, "event": event, "text": text, **(data or {})}
            with self._lock:
                print(json.dumps(row), flush=True)
        else:
            self._console.print(Text(text, style=STYLES.get(event, "")), soft_wrap=True)

    def waiting(self, text: str) -> None:
        """What is being waited for, on a terminal only; "" = nothing any more."""
        if self._spinner is None:
            return
        if text:
            self._spinner.update(text)
            self._spinner.start()
        else:
            self._spinner.stop()

    def log(self, line: str) -> None:
        """A line of the controller's log."""
        if self._as_json and not line.startswith("{"):
            line = json.dumps({"source": "phalanx.controller", "event": "stderr", "text": line})
        if self._shows_log:
            with self._lock:
                print(line, flush=True)

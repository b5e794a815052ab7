"""JSON lines on stderr: one line per state change, with the fields that identify it."""

import json
import logging
import sys
from typing import Any


class JsonFormatter(logging.Formatter):
    """One JSON object per record; `extra={"fields": {...}}` adds keys."""

    def format(self, record: logging.LogRecord) -> str:
        """Render a record as one line."""
        row: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S"),
            "level": record.levelname.lower(),
            "source": record.name,
            "event": record.getMessage(),
        }
        row.update(getattr(record, "fields", {}))
        if record.exc_info:
            row["traceback"] = self.formatException(record.exc_info)
        return json.dumps(row, default=str)


def configure(level: int = logging.INFO) -> None:
    """Send the `phalanx` loggers of this process to stderr. Called by programs, never on import."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger("phalanx")
    root.handlers[:] = [handler]
    root.setLevel(level)
    root.propagate = False


def get(name: str) -> logging.Logger:
    """The logger of a component, for example `get("engine")`."""
    return logging.getLogger(f"phalanx.{name}")


def fields(**values: Any) -> dict[str, dict[str, Any]]:
    """Keyword for a logging call: `logger.info("placed", extra=fields(job=job, replica=replica))`."""
    return {"fields": values}

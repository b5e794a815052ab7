"""What the controller process is told: one JSON file, written by the supervisor from the resolved plan."""

from pathlib import Path

import msgspec

from phalanx.errors import ConfigError
from phalanx.runtime.controller.core import CoreConfig


class ServerOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of the controller process.

    Attributes:
        model_name: what clients may call the model.
        model_path: folder with tokenizer.json; None = requests carry token ids and answers no text.
        vocab_size: of the model; ids are below it.
        max_model_len: longest prompt + output, tokens.
        num_tasks: that requests may name; 0 = the model has no task-level routing.
        listen: host:port of the public gRPC API; port 0 = any free one.
        engine_listen: host:port that engines and the supervisor dial; an internal interface.
        metrics_listen: host:port of the Prometheus endpoint; None = off.
        drain_s: how long a drain by SIGTERM waits for running jobs.
        state_interval_s: a stream with nothing to send gets a state chunk this often.
        max_message_bytes: largest request.
        core: limits and timers of the controller core.
    """

    model_name: str
    model_path: str | None = None
    vocab_size: int
    max_model_len: int
    num_tasks: int = 0
    listen: str = "127.0.0.1:50051"
    engine_listen: str = "127.0.0.1:0"
    metrics_listen: str | None = None
    drain_s: float = 60.0
    state_interval_s: float = 15.0
    max_message_bytes: int = 16 * 2**20
    core: CoreConfig = CoreConfig()


def read_options(path: Path) -> ServerOptions:
    """Read the file of `--plan`.

    Raises:
        ConfigError: it cannot be read, is not JSON, or a key is unknown or of another type.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=ServerOptions)
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError(f"{path}: {error}; it must be the JSON object that `phalanx up` writes") from error

"""The controller as a program: `python -m phalanx.deploy.server.main --plan FILE`.

Prints one JSON line with the bound ports when it is up. Ends when its stdin does (its supervisor is gone), or after a
drain (SIGTERM; a second SIGTERM ends at once). Exit status 0, or 2 with one sentence on stderr when it cannot start.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
import threading
from pathlib import Path

from phalanx import log
from phalanx.deploy.server.options import ServerOptions, read_options
from phalanx.deploy.server.server import Server
from phalanx.errors import PhalanxError
from phalanx.runtime.tokenizer import Tokenizer


def main() -> int:
    """Parse the command line and serve."""
    parser = argparse.ArgumentParser(prog="phalanx.deploy.server.main", description=__doc__)
    parser.add_argument("--plan", type=Path, required=True, help="JSON file of ServerOptions")
    arguments = parser.parse_args()
    log.configure()
    try:
        asyncio.run(serve(read_options(arguments.plan)))
    except PhalanxError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


async def serve(options: ServerOptions) -> None:
    """Run one controller to its end.

    Raises:
        ConfigError, CheckpointError: it cannot start.
    """
    tokenizer = None if options.model_path is None else Tokenizer.from_folder(options.model_path)
    server = Server(options, tokenizer)
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    # Before the ports are announced: whoever has read the line may send signals.
    loop.add_signal_handler(signal.SIGTERM, lambda: ended.set() if server.is_draining else server.drain())
    loop.add_signal_handler(signal.SIGINT, ended.set)
    ports = await server.start()
    threading.Thread(target=_wait_for_eof, args=(loop, ended), daemon=True).start()
    print(json.dumps(ports._asdict()), flush=True)
    tasks = [asyncio.create_task(server.serve_until_drained()), asyncio.create_task(ended.wait())]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await server.stop()


def _wait_for_eof(loop: asyncio.AbstractEventLoop, ended: asyncio.Event) -> None:
    # Not sys.stdin: a thread inside its buffer's lock would abort the interpreter's exit.
    while os.read(0, 4096):
        pass
    with contextlib.suppress(RuntimeError):  # the loop has ended for another reason
        loop.call_soon_threadsafe(ended.set)


if __name__ == "__main__":
    sys.exit(main())

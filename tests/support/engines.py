"""`LLM` whose ranks start by a fork instead of as fresh interpreters; and a record of every logit they compute.

Starting Python and torch costs seconds per rank; a fork server has both loaded. Nothing else differs: a forked process
runs `phalanx.runtime.rank.main` with its bootstrap on stdin, under the product's own executor, link and engine.
"""

import contextlib
import functools
import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import msgspec
import torch
from torch import Tensor

from phalanx.runtime import rank
from phalanx.runtime.executor import processes
from phalanx.runtime.rank import Bootstrap
from phalanx.runtime.sampler import Sampler
from tests.support import ranks

PRELOAD = [*ranks.PRELOAD, "phalanx.runtime.worker", "tests.support.engines"]

SHARING_CORES = {"device": "cpu", "dtype": "float32", "workers": {"threads": 1}}
"""Arguments of `LLM` for ranks that share two cores and are compared with an fp32 oracle."""


class Record(NamedTuple):
    """A row of logits, and the token ids it was computed from; `rank` says where."""

    rank: int
    token_ids: tuple[int, ...]
    logits: Tensor


Hook = Callable[[int], None]
"""Called in a forked rank, with its number, before it begins; must be importable: it may patch what it wants there."""


@contextlib.contextmanager
def forked_ranks(folder: Path | None = None, hook: Hook | None = None) -> Iterator[None]:
    """While it lasts, an `LLM` forks its ranks; with a folder, all ranks record their logits into it."""
    with contextlib.ExitStack() as stack:
        start = mock.patch.object(processes, "_start", lambda bootstrap: ForkedRank(bootstrap, folder, hook))
        stack.enter_context(start)
        if folder is not None:  # a single rank runs in this process
            sample = recording(Sampler.sample, folder / "0")
            stack.enter_context(mock.patch.object(Sampler, "sample", sample))
        yield


def read_records(folder: Path) -> Iterator[Record]:
    """Every row of logits that was sampled from, or asked for as a prompt's, on any rank of the last stage."""
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            while file.peek(1):
                contexts, logits = pickle.load(file)
                for context, row in zip(contexts, torch.from_numpy(logits), strict=True):
                    yield Record(int(path.name), context, row)


def recording(sample: Callable[..., Any], path: Path) -> Callable[..., Any]:
    """`Sampler.sample` that first writes down its logits, before they are biased or penalized."""
    file = path.open("wb", buffering=0)  # a rank ends by `os._exit`

    def record_and_sample(self: Sampler, logits: Tensor, rows: Any) -> Any:
        ends = list(zip(rows.slots.tolist(), rows.lengths.tolist(), strict=True))
        for part in rows.prompt:
            ends += [(part.slot, part.start + i + 1) for i in range(part.count)]
        contexts = [tuple(self._table.tokens[slot, :length].tolist()) for slot, length in ends]
        if contexts:
            file.write(pickle.dumps((contexts, logits.clone().numpy())))
        return sample(self, logits, rows)

    return record_and_sample


class ForkedRank:
    """What `ProcessExecutor` needs of a `subprocess.Popen`."""

    def __init__(self, bootstrap: Bootstrap, folder: Path | None, hook: Hook | None = None) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        theirs, ours = context.Pipe(duplex=False)
        record = folder / str(bootstrap.rank) if folder is not None else None
        begin = functools.partial(hook, bootstrap.rank) if hook is not None else None
        self._process = context.Process(target=_be_rank, args=(theirs, record, begin), daemon=True)
        self._process.start()
        theirs.close()
        self.pid = self._process.pid
        self.stdin = os.fdopen(os.dup(ours.fileno()), "wb", buffering=0)
        ours.close()
        self.stdin.write(msgspec.json.encode(bootstrap) + b"\n")

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout_s: float | None = None) -> None:
        self._process.join(timeout_s)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("rank", timeout_s or 0.0)

    def kill(self) -> None:
        self._process.kill()


def _be_rank(stdin: Connection, record: Path | None, begin: Callable[[], None] | None) -> None:
    sys.stdin = os.fdopen(os.dup(stdin.fileno()))
    stdin.close()
    if begin is not None:
        begin()
    if record is not None:
        Sampler.sample = recording(Sampler.sample, record)  # type: ignore[method-assign]
    rank.main()

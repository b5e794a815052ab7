"""Requests that run offline and over gRPC, followed by one thread each, and the sources of the prompts."""

import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

from phalanx import LLM, SamplingParams
from phalanx.deploy.client import Chunk
from phalanx.errors import PhalanxError
from tests.support.engines import SHARING_CORES, forked_ranks

CODE = (Path(__file__).parents[2] / "phalanx/runtime/scheduler.py").read_text()
"""The embedded model was made to continue Python."""


def a_prompt(rng: random.Random, length: int) -> str:
    """`length` characters of code from anywhere."""
    start = rng.randrange(len(CODE) - length)
    return CODE[start : start + length]


class Ask(NamedTuple):
    """A request as both front ends take it."""

    prompt: str
    params: SamplingParams


class Answer(NamedTuple):
    """One choice; `finish` is None while it lasts."""

    token_ids: list[int]
    text: str
    finish: str | None


class Reader:
    """Follows streams, one thread each; `answers[i][choice]` grows while they run."""

    def __init__(self, streams: Sequence[Iterator[Chunk]]) -> None:
        self.answers: list[dict[int, Answer]] = [{} for _ in streams]
        self.errors: list[PhalanxError] = []
        self.longest_gap_s = 0.0
        self._threads = [Thread(target=self._follow, args=item, daemon=True) for item in enumerate(streams)]
        for thread in self._threads:
            thread.start()

    def tokens(self, number: int) -> int:
        """Of all choices of a stream, so far."""
        return sum(len(answer.token_ids) for answer in self.answers[number].values())

    def wait(self, timeout_s: float) -> list[dict[int, Answer]]:
        """Until every stream has ended; the first error is raised."""
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        stuck = [number for number, thread in enumerate(self._threads) if thread.is_alive()]
        assert not stuck, f"streams {stuck} have not ended after {timeout_s:g} s"
        if self.errors:
            raise self.errors[0]
        return self.answers

    def _follow(self, number: int, chunks: Iterator[Chunk]) -> None:
        answers, heard = self.answers[number], time.monotonic()
        try:
            for chunk in chunks:
                before = answers.get(chunk.choice, Answer([], "", None))
                assert chunk.position == len(before.token_ids), "the client lets no gap and no repeat through"
                ids, text = [*before.token_ids, *chunk.token_ids], before.text + chunk.text
                answers[chunk.choice] = Answer(ids, text, chunk.finish_reason)
                now = time.monotonic()
                self.longest_gap_s, heard = max(self.longest_gap_s, now - heard), now
        except PhalanxError as error:
            self.errors.append(error)


def offline(asks: Sequence[Ask], **layout: Any) -> list[list[Answer]]:
    """What `LLM` answers to the same requests on the embedded model, all choices of each.

    To be called while no census is open: the fork server of the ranks stays for other tests.
    """
    options: dict[str, Any] = {"kv": {"num_blocks": 1500}, **SHARING_CORES, **layout}
    with forked_ranks(), LLM("tiny", **options) as llm:
        outputs = llm.generate([ask.prompt for ask in asks], [ask.params for ask in asks])
    return [[Answer(c.token_ids, c.text, c.finish_reason) for c in output.choices] for output in outputs]

"""How `generate` and `attach` print a stream."""

import sys
import time
from collections.abc import Iterator

from phalanx.deploy.client import Chunk
from phalanx.deploy.commands import connection


def print_stream(chunks: Iterator[Chunk], *, as_json: bool, num_choices: int = 1) -> int:
    """Print chunks as they come, and a summary on stderr; returns 1 if a choice ended with an error.

    Text of a single choice appears at once; of several, each one when it has ended, so that they do not mix.
    """
    begun = time.perf_counter()
    first_s, num_tokens = 0.0, 0
    texts: dict[int, list[str]] = {}
    ends: list[Chunk] = []
    for chunk in chunks:
        num_tokens += len(chunk.token_ids)
        first_s = first_s or time.perf_counter() - begun
        if chunk.finish_reason is not None:
            ends.append(chunk)
        if as_json:
            connection.print_json(chunk)
        elif num_choices == 1:
            print(chunk.text, end="", flush=True)
        else:
            texts.setdefault(chunk.choice, []).append(chunk.text)
            if chunk.finish_reason is not None:
                print(f"--- choice {chunk.choice}\n{''.join(texts[chunk.choice])}", flush=True)
    if not as_json:
        _print_end(ends, num_tokens, first_s, time.perf_counter() - begun, num_choices)
    return 1 if any(end.finish_reason == "error" for end in ends) else 0


def _print_end(ends: list[Chunk], num_tokens: int, first_s: float, took_s: float, num_choices: int) -> None:
    if num_choices == 1:
        print(flush=True)
    reasons = ", ".join(f"{end.finish_reason}{f' ({end.error})' if end.error else ''}" for end in ends)
    usage = next((end.usage for end in ends if end.usage is not None), None)
    prompt = "" if usage is None else f"{usage.prompt_tokens} prompt tokens ({usage.cached_tokens} cached), "
    seed = "".join(f", seed {end.seed}" for end in ends[:1] if end.seed is not None)
    rate = num_tokens / took_s if took_s else 0.0
    print(
        f"[{prompt}{num_tokens} tokens in {took_s:.2f} s ({rate:.0f}/s, first after {first_s:.2f} s), end: {reasons}"
        f"{seed}]",
        file=sys.stderr,
    )

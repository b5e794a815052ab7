"""The codec between controller and engines: round trips, and bytes of a broken or hostile peer. About 2 s."""

import random
from collections.abc import Iterator
from typing import get_args

import msgspec
import pytest

from phalanx.runtime import frames
from phalanx.runtime.frames import (
    Abort,
    AbortScale,
    AskScale,
    Failed,
    Frame,
    Heartbeat,
    Hello,
    Place,
    Scale,
    ScaleEstimate,
    ScaleState,
    Shutdown,
    StageBytes,
    TokenEvents,
    TokenLogprobs,
    TokenRow,
    Welcome,
    WireError,
)
from phalanx.runtime.sampling_params import SamplingParams

PARAMS = SamplingParams(
    temperature=0.5, logit_bias={3: -1.5}, stop=("a", "é"), stop_token_ids=(7,), seed=2**64 - 1, n=2
)
ENTRY = TokenLogprobs(5, -0.25, 1, [5, 6], [-0.25, -1.5])
ROWS = [
    TokenRow("job-1", 3, 0, 17, [5]),
    TokenRow("job-2", 3, 1, 0, [], None, "error", "the model's logits held NaN", [ENTRY], 64),
    TokenRow("job-3", 9, 0, 2, [1, 2], [ENTRY, ENTRY], "stop"),
]
EXAMPLES: list[Frame] = [
    Welcome(1, 7),
    Place("job-1", 3, b"\1\0\0\0", [b"", None, b"\2\0\0\0"], PARAMS, 2**64 - 1, -5),
    Abort("job-1", 3),
    Abort("job-1", 3, 1),
    Shutdown("drained"),
    Hello(1, 0, 7, "digest", 4096, 4000, 65, 64, 2, {"load": 1.5}, ["rank 0: é"]),
    TokenEvents(12, ROWS),
    TokenEvents(13, []),
    Heartbeat(*range(11)),
    Failed(3, "node", "/log", "Traceback ..."),
    AskScale(7, 4),
    Scale("grow", 4),
    AskScale(7, 1, ("node é", "b")),
    Scale("shrink", 1, ("node é",)),
    AbortScale("grow", "no room"),
    ScaleEstimate(7, "", 2, 2, 4, 1, 1, 8, 16, [StageBytes(5, 6, 7, 2**40)], 3, 2**40),
    ScaleState("grow", "PREPARING", "", 2, [[2], [3]], [], []),
    ScaleState("grow", "ABORTED", "rank 2 died", 2, [], [2, 3], ["rank 0: é"]),
]


@pytest.mark.parametrize("frame", EXAMPLES, ids=lambda frame: type(frame).__name__)
def test_round_trip(frame: Frame) -> None:
    data = frames.encode(frame)
    assert frames.decode(data) == frame
    assert frames.encode(frames.decode(data)) == data


def test_every_kind_is_among_the_examples_and_has_its_own_number() -> None:
    assert {type(frame) for frame in EXAMPLES} == set(get_args(Frame))
    kinds = [msgspec.msgpack.decode(frames.encode(frame))[0] for frame in EXAMPLES]
    assert len(set(kinds)) == len(get_args(Frame))


def damaged(data: bytes, rng: random.Random, count: int) -> Iterator[bytes]:
    """All truncations, all single bytes changed in three ways, then random edits."""
    yield from (data[:end] for end in range(len(data)))
    for i, byte in enumerate(data):
        for other in (byte ^ 1 << rng.randrange(8), rng.randrange(256), 0xC1):
            yield data[:i] + bytes([other]) + data[i + 1 :]
    for _ in range(count):
        edited = bytearray(data)
        for _ in range(rng.randrange(1, 6)):
            i = rng.randrange(len(edited) + 1)
            edited[i : i + rng.randrange(3)] = rng.randbytes(rng.randrange(4))
        yield bytes(edited)


@pytest.mark.parametrize("frame", EXAMPLES, ids=lambda frame: type(frame).__name__)
def test_damaged_bytes_are_a_frame_or_a_wire_error(frame: Frame) -> None:
    refused = 0
    for data in damaged(frames.encode(frame), random.Random(1), 2000):
        try:
            frames.encode(frames.decode(data))
        except WireError as error:
            refused += len(str(error)) < 2000
    assert refused > 100


def test_random_bytes() -> None:
    rng, refused = random.Random(2), 0
    for _ in range(20_000):
        try:
            frames.decode(bytes([0x90 + rng.randrange(16), rng.randrange(20)]) + rng.randbytes(rng.randrange(20)))
        except WireError:
            refused += 1
    assert refused > 19_900


def test_bytes_that_are_no_text() -> None:
    with pytest.raises(WireError):
        frames.decode(b"\x92\x04\xa2\xff\xfe")


def test_nesting_without_end() -> None:
    with pytest.raises(WireError):
        frames.decode(b"\x93\x04\xa1x" + b"\x91" * 200_000)


REFUSED = {
    "nothing": b"",
    "no array": msgspec.msgpack.encode({"kind": 1}),
    "an unknown kind": msgspec.msgpack.encode([8, 1, 7]),
    "an unknown phase": msgspec.msgpack.encode([16, "grow", "READY", "", 2, [], [], []]),
    "a missing field": msgspec.msgpack.encode([1, 1]),
    "another type": msgspec.msgpack.encode([1, 1, "7"]),
    "a job without a name": msgspec.msgpack.encode([3, "", 1]),
    "a job with a long name": msgspec.msgpack.encode([3, "x" * 129, 1]),
    "parameters out of range": frames.encode(EXAMPLES[1]).replace(
        b"\xcb\x3f\xe0\0\0\0\0\0\0", b"\xcb\x7f\xf8\0\0\0\0\0\0"
    ),
    "an unknown finish": msgspec.msgpack.encode([12, 1, [["job", 1, 0, 0, [], None, "done"]]]),
    "two frames": frames.encode(EXAMPLES[0]) * 2,
    "a list that is said to be huge": b"\x93\x0c\x01\xdd\xff\xff\xff\xff",
    "bytes that are said to be huge": b"\x98\x02\xa1x\x01\xc6\xff\xff\xff\xff",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    with pytest.raises(WireError, match="not a frame of version 1"):
        frames.decode(REFUSED[name])


def test_a_frame_over_the_limit_is_not_even_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    data = frames.encode(EXAMPLES[5])
    monkeypatch.setattr(frames, "MAX_FRAME_BYTES", len(data))
    assert frames.decode(data) == EXAMPLES[5]
    monkeypatch.setattr(frames, "MAX_FRAME_BYTES", len(data) - 1)
    with pytest.raises(WireError, match=f"frame of {len(data)} bytes; at most {len(data) - 1}"):
        frames.decode(data)

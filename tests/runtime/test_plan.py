"""The codec of the rank link, and the running digest of planned rows. About 2 s."""

import os
import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any, get_args

import msgspec
import pytest

from phalanx.runtime import plan as messages
from phalanx.runtime.frames import TokenLogprobs
from phalanx.runtime.plan import (
    Discard,
    DomainPlan,
    Enter,
    ExpertLoad,
    ExpertStep,
    Extend,
    Flip,
    Move,
    MovesDone,
    Order,
    Ping,
    PlanError,
    Prepare,
    Prepared,
    RankFailed,
    RankMessage,
    Ready,
    SlotInit,
    SlotSampling,
    StepFailed,
    StepPlan,
    StepResult,
    decode_message,
    decode_order,
    encode,
    roll_hash,
)
from tests.runtime.test_frames import damaged

SAMPLING = SlotSampling(0.5, 40, 0.9, 0.05, 1.1, 0.5, -0.5, {3: -1.5}, 2**64 - 1, 1, 2, [0, 7], 5, -1)
PLANS = [
    StepPlan(0, 0, 0, []),
    StepPlan(
        7,
        1,
        2**63 - 1,
        [
            DomainPlan(
                [4], [SlotInit(4, b"\1\0\0\0\2\0\0\0", 2, 0, SAMPLING)], [Extend(4, 0, [1, 2])], [0, 1, 1, 4, 2, 1]
            ),
            DomainPlan([], [], [], [], 6),
        ],
    ),
]
ORDERS: list[Order] = [
    *PLANS,
    StepPlan(8, 2, 5, [], ExpertStep("two_hop", 33, True, [Move(1, 0, 3, 9, 1)], [Flip(0, 4, [0, 1, 1], [1, 9])])),
    Prepare(3, 1, ["a", "a", "b"]),
    Enter(3, 9, 77, [[0, 1, 0], [1, 0, 1]], True),
    Discard(3),
]
ENTRY = TokenLogprobs(5, -0.25, 1, [5, 6], [-0.25, -1.5])
MESSAGES: list[RankMessage] = [
    StepResult(7, 0, 1, [0, 4], [5, 6], [1], [None, ENTRY], [(4, [ENTRY])], 0.25),
    Ready(3, "digest", "node", 123, "cuda:3", "/log", {"load": 1.5}),
    Ping(3),
    RankFailed(3, "node", "/log", "Traceback é"),
    ExpertLoad(3, 0, [b"\1" + bytes(7), bytes(8)], 5),
    MovesDone(3, [1, 2], [4]),
    Prepared(3, 2, "why"),
    StepFailed(3, 2, "why"),
]
CASES: list[tuple[Callable[[bytes], Any], Any]] = [(decode_order, order) for order in ORDERS]
CASES += [(decode_message, message) for message in MESSAGES]
by_name = pytest.mark.parametrize(("decode", "message"), CASES, ids=lambda value: type(value).__name__)


@by_name
def test_round_trip(decode: Callable[[bytes], Any], message: Any) -> None:
    data = encode(message)
    assert decode(data) == message
    assert encode(decode(data)) == data


def test_every_message_is_among_the_examples() -> None:
    assert {type(message) for message in MESSAGES} == set(get_args(RankMessage))
    assert {type(order) for order in ORDERS} == set(get_args(Order))


@by_name
def test_damaged_bytes_are_a_message_or_a_plan_error(decode: Callable[[bytes], Any], message: Any) -> None:
    refused = 0
    for data in damaged(encode(message), random.Random(1), 2000):
        try:
            encode(decode(data))
        except PlanError as error:
            refused += len(str(error)) < 2000
    assert refused > 100


@pytest.mark.parametrize("decode", [decode_order, decode_message])
def test_random_bytes(decode: Callable[[bytes], Any]) -> None:
    rng = random.Random(2)
    for _ in range(10_000):
        with pytest.raises(PlanError):
            decode(bytes([0x90 + rng.randrange(16)]) + rng.randbytes(rng.randrange(30)))


def test_bytes_that_are_no_text() -> None:
    with pytest.raises(PlanError):
        decode_message(encode(MESSAGES[3]).replace("é".encode(), b"\xff\xff"))


def test_nesting_without_end() -> None:
    with pytest.raises(PlanError):
        decode_message(b"\x93\xa4Ping\x01" + b"\x91" * 200_000)


@pytest.mark.parametrize(
    ("decode", "data", "message"),
    [
        (decode_order, b"", "not an order"),
        (decode_order, encode(MESSAGES[0]), "not an order"),
        (decode_order, encode(PLANS[0]) + b"\0", "not an order"),
        (decode_order, b"\x96\xa8StepPlan\0\0\0\xdd\xff\xff\xff\xff", "not an order"),
        (decode_message, encode(PLANS[0]), "not a rank message"),
        (decode_message, msgspec.msgpack.encode(["Pong", 1]), "not a rank message"),
        (decode_message, msgspec.msgpack.encode(["Ping", "1"]), "not a rank message"),
        (decode_message, msgspec.msgpack.encode(["Ping"]), "not a rank message"),
    ],
)
def test_refused(decode: Callable[[bytes], Any], data: bytes, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        decode(data)


def test_the_digest_tells_rows_and_their_order_apart() -> None:
    rng = random.Random(3)
    seen = {roll_hash(0, [])}
    for _ in range(5000):
        seen.add(roll_hash(0, [rng.randrange(4096) for _ in range(3 * rng.randrange(1, 5))]))
    assert len(seen) > 4990
    a, b = [0, 1, 1, 2, 5, 0], [2, 5, 0, 0, 1, 1]
    assert roll_hash(roll_hash(0, a), b) != roll_hash(roll_hash(0, b), a)
    assert roll_hash(0, a) != roll_hash(0, b)
    assert all(0 <= digest < 2**63 for digest in seen)


def test_the_digest_is_equal_in_every_process() -> None:
    code = "from phalanx.runtime.plan import roll_hash; print(roll_hash(roll_hash(0, [1, 2, 1]), list(range(300))))"
    expected = str(roll_hash(roll_hash(0, [1, 2, 1]), list(range(300))))
    for salt in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": salt}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
        assert done.stdout.strip() == expected, done.stderr


def test_a_decode_step_costs_few_bytes() -> None:
    rows = [value for slot in range(256) for value in (slot, 1, 1)]
    assert len(messages.encode(StepPlan(10**6, 0, 2**62, [DomainPlan([], [], [], rows, 10**6)]))) < 1100

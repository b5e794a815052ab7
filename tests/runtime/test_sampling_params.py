"""`SamplingParams` refuses whatever is wrong with `InvalidRequestError`, and what it accepts can be sent. About 2 s."""

import decimal
import enum
import math
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from phalanx.errors import InvalidRequestError
from phalanx.runtime.sampling_params import SamplingParams

FIELDS = SamplingParams.__struct_fields__
HUGE = 10**6000  # its repr alone raises


class Level(enum.IntEnum):
    LOW = 1


class Text(str):
    __slots__ = ()


ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    -1,
    0,
    1,
    2**31,
    2**63,
    2**64,
    -(2**64),
    HUGE,
    -HUGE,
    -0.5,
    0.5,
    1e308,
    math.nan,
    math.inf,
    -math.inf,
    1j,
    "a",
    "",
    "x" * 10_000,
    b"a",
    Text("a"),
    Level.LOW,
    np.float64(0.5),
    np.int64(1),
    np.array([0.5]),
    decimal.Decimal("0.5"),
    object(),
    len,
    [],
    [HUGE],
    [1],
    [-1],
    [True],
    [1.5],
    [None],
    ["a"],
    [""],
    ["\ud800"],
    ["x" * 257],
    ["a"] * 17,
    [Text("a")],
    [[]],
    [1] * 129,
    {"a"},
    frozenset({1}),
    range(3),
    (value for value in "ab"),
    {},
    {1: HUGE},
    {HUGE: 1.0},
    {1: math.nan},
    {1: 100.5},
    {-1: 1.0},
    {True: 1.0},
    {"a": 1.0},
    {1: "a"},
    {1: None},
    {None: None},
    dict.fromkeys(range(1025), 1.0),
)

# (field, value, part of the message): value, limit and way out.
REFUSED = [
    ("temperature", -0.1, r"temperature \(-0.1\) must be a number in \[0, 100\]"),
    ("temperature", math.nan, r"temperature \(nan\)"),
    ("temperature", HUGE, r"temperature \(an integer of 19932 bits\)"),
    ("temperature", "a", r"temperature \('a'\) must be a number"),
    ("temperature", [0.5], r"temperature \(a list\)"),
    ("top_p", 0, r"top_p \(0\) must be a number in \(0, 1\]"),
    ("top_p", 1.01, r"top_p \(1.01\)"),
    ("repetition_penalty", 0.0, r"\(0, 100\]"),
    ("top_k", 1.0, r"top_k \(1.0\) must be an integer from 0 to 2147483647"),
    ("n", True, r"n \(True\) must be an integer from 1 to 128"),
    ("n", 129, "from 1 to 128"),
    ("seed", 2**64, r"seed \(an integer of 65 bits\) must be an integer from 0 to 18446744073709551615"),
    ("logprobs", 21, "from 0 to 20"),
    ("max_tokens", 0, r"max_tokens \(0\) must be an integer from 1"),
    ("task", -1, r"task \(-1\) must be an integer from 0 to 2147483647"),
    ("task", True, r"task \(True\) must be an integer"),
    ("ignore_eos", 1, r"ignore_eos \(1\) must be true or false"),
    ("skip_special_tokens", "no", r"skip_special_tokens \('no'\)"),
    ("stop", "end", r"stop must be a sequence of strings, got the string 'end'; use \['end'\]"),
    ("stop", None, "stop must be a sequence of strings, got None"),
    ("stop", [1], r"stop string 1 must have 1 to 256 characters"),
    ("stop", ["\ud800"], r"stop string '\\ud800' must have"),
    ("stop", ["a"] * 17, "stop has 17 entries; at most 16"),
    ("stop_token_ids", 5, "stop_token_ids must be a sequence of token ids, got 5"),
    ("logit_bias", [1], r"logit_bias \(a list\) must be a dict"),
    ("logit_bias", {3: math.inf}, r"logit_bias\[3\] \(inf\) must be a number in \[-100, 100\]"),
    ("logit_bias", {"3": 1.0}, r"logit_bias token id \('3'\)"),
    ("logit_bias", dict.fromkeys(range(1025), 0.0), "logit_bias has 1025 entries; at most 1024"),
]


def accepted(**fields: Any) -> SamplingParams | None:
    """The parameters, if they are accepted; then they survive the wire. Any other error fails the test."""
    message = ""
    try:
        params = SamplingParams(**fields)
    except InvalidRequestError as error:
        params, message = None, str(error)
    assert len(message) < 400
    if params is not None:
        decoded = msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams)
        lists = {"stop": tuple(params.stop), "stop_token_ids": tuple(params.stop_token_ids)}
        assert decoded == msgspec.structs.replace(params, **lists)
    return params


@pytest.mark.parametrize("field", FIELDS)
def test_odd_values_of_every_field(field: str) -> None:
    outcomes = [accepted(**{field: value}) for value in ODD]
    refused = sum(outcome is None for outcome in outcomes)
    assert 0 < refused < len(ODD), "each field takes something, and not everything"


@pytest.mark.parametrize(("field", "value", "message"), REFUSED, ids=[f"{row[0]}-{i}" for i, row in enumerate(REFUSED)])
def test_messages_name_value_and_limit(field: str, value: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        SamplingParams(**{field: value})


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5)
ANYTHING = st.recursive(
    SCALARS | st.integers(0, len(ODD) - 1).map(ODD.__getitem__),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SCALARS, inner, max_size=3) | st.tuples(inner, inner),
    max_leaves=6,
)


@settings(max_examples=600, deadline=None, derandomize=True, database=None)
@given(st.dictionaries(st.sampled_from(FIELDS), ANYTHING, min_size=1, max_size=4))
@example({"min_tokens": 5, "max_tokens": 4})
def test_anything_is_accepted_or_refused(fields: dict[str, Any]) -> None:
    params = accepted(**fields)
    if params is None:
        return
    for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
        assert math.isfinite(getattr(params, name))
    assert params.max_tokens is None or params.min_tokens <= params.max_tokens


def test_the_limits_themselves_are_accepted() -> None:
    low = SamplingParams(
        temperature=0, top_p=5e-324, min_p=0, repetition_penalty=5e-324, presence_penalty=-2, seed=0, max_tokens=1
    )
    high = SamplingParams(
        temperature=100,
        top_k=2**31 - 1,
        top_p=1,
        min_p=1,
        repetition_penalty=100,
        frequency_penalty=2.0,
        logit_bias={i: (-1) ** i * 100 for i in range(1024)},
        seed=2**64 - 1,
        n=128,
        max_tokens=2**31 - 1,
        min_tokens=2**31 - 1,
        stop=["x" * 256] * 16,  # type: ignore[arg-type]
        stop_token_ids=tuple(range(128)),
        logprobs=20,
        prompt_logprobs=20,
    )
    for params in (low, high):
        assert accepted(**msgspec.structs.asdict(params)) == params


def test_a_peer_cannot_send_what_cannot_be_made() -> None:
    for name, value in (("temperature", math.nan), ("n", 0), ("stop", [""]), ("seed", -1)):
        data = msgspec.msgpack.encode({name: value})
        with pytest.raises(InvalidRequestError):
            msgspec.msgpack.decode(data, type=SamplingParams)
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode({"stop": "text"}), type=SamplingParams)

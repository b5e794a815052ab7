import random
from array import array
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.errors import InvalidRequestError
from phalanx.runtime.detokenize import Detokenizer
from phalanx.runtime.frames import FinishReason, TokenLogprobs
from phalanx.runtime.output import MAX_DELTA_TOKENS, ChoiceOutput, Delta, OutputError, choice_outputs
from phalanx.runtime.sampling_params import SamplingParams
from phalanx.runtime.stop_strings import START, StopStrings
from phalanx.runtime.tokenizer import Tokenizer
from tests.support.tokenizer_folders import KINDS

PROPERTY = settings(deadline=None, derandomize=True, max_examples=400)
FINISHES: list[FinishReason | None] = [None, "stop", "length", "cancelled", "deadline", "error"]


@cache
def tokenizer(kind: str = "byte_level") -> Tokenizer:
    return Tokenizer(KINDS[kind]().to_str().encode(), {}, None)


@cache
def letters(kind: str) -> list[int]:
    """Ids that spell few characters in many ways, parts of characters, a special token, an unknown id."""
    size = tokenizer(kind).vocab_size
    texts = {"s", "t", "o", "p", "st", "op", "stop", "th", "h", "e", "the", " ", " the", "é"}
    ids = [i for i in range(size) if tokenizer(kind).decode([i], False) in texts]
    data = ["<0xC3>", "<0xA9>", "<0x73>"] if kind == "byte_fallback" else ["Ã", "©", "<|im_end|>"]
    return [*ids, *(i for i in range(size) if KINDS[kind]().id_to_token(i) in data), size + 1]


def search(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Text before the stop string that ends first, of those the longest, or before what may become one; by trial."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    held = max((k for stop in stops for k in range(len(stop)) if text.endswith(stop[:k])), default=0)
    return text[: len(text) - held], None


class Reference(NamedTuple):
    token_ids: list[int]
    texts: list[str]  # after 0, 1, ... ids
    text: str
    finish: FinishReason | None
    stop_match: str | None


def reference(kind: str, token_ids: list[int], stops: list[str], finish: FinishReason | None) -> Reference:
    detokenizer, whole, texts = Detokenizer(tokenizer(kind)), "", [""]
    for i, token_id in enumerate(token_ids):
        if finish != "stop" or i + 1 < len(token_ids):
            whole += detokenizer.push(token_id)
        text, match = search(whole, stops)
        texts.append(text)
        if match is not None:
            return Reference(token_ids[: i + 1], texts, text, "stop", match)
    if finish is None:
        return Reference(token_ids, texts, texts[-1], None, None)
    whole += detokenizer.flush()
    text, match = search(whole, stops)
    if match is not None:
        whole, finish = text, "stop"
    return Reference(token_ids, [*texts[:-1], whole] if token_ids else texts, whole, finish, match)


def output(kind: str, stops: list[str]) -> ChoiceOutput:
    return ChoiceOutput(Detokenizer(tokenizer(kind)), StopStrings(stops) if stops else None)


def rows(draw: random.Random, num_ids: int) -> list[tuple[int, int]]:
    """A cut of an output into (start, end)."""
    cuts = sorted({0, num_ids, *(draw.randrange(num_ids + 1) for _ in range(draw.randrange(num_ids + 2)))})
    return list(pairwise(cuts)) or [(0, 0)]


def logprob(token_id: int, position: int) -> TokenLogprobs:
    return TokenLogprobs(token_id, -0.5 * position, 1, [], [])


class Client:
    """Holds what it was sent; places text by its offset and insists that nothing is missing or changed."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.utf8 = b""
        self.finish: FinishReason | None = None

    def receive(self, delta: Delta) -> None:
        assert self.finish is None
        assert delta.first_position == len(self.token_ids)
        assert delta.text_offset == len(self.utf8)
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs or ()
        self.utf8 += delta.text_delta.encode()
        self.finish = delta.finish


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, list[int], list[str], FinishReason | None]:
    kind = draw(st.sampled_from(["byte_level", "byte_fallback"]))
    token_ids = draw(st.lists(st.sampled_from(letters(kind)), max_size=16))
    stops = draw(st.lists(st.text("stophe é\N{REPLACEMENT CHARACTER}", min_size=1, max_size=5), max_size=4))
    return kind, token_ids, stops, draw(st.sampled_from(FINISHES))


@PROPERTY
@given(case=cases(), draw=st.randoms(use_true_random=False), in_last_row=st.booleans(), has_logprobs=st.booleans())
def test_any_rows_and_any_reader(
    case: tuple[str, list[int], list[str], FinishReason | None],
    draw: random.Random,
    in_last_row: bool,
    has_logprobs: bool,
) -> None:
    kind, token_ids, stops, finish = case
    in_last_row = (in_last_row or finish == "stop") and bool(token_ids)
    expected = reference(kind, token_ids, stops, finish if in_last_row else None)
    ours, live = output(kind, stops), Client()
    for start, end in rows(draw, len(token_ids)):
        start = max(0, start - draw.randrange(3))  # a row may repeat what is known
        row_finish = finish if in_last_row and end == len(token_ids) else None
        logprobs = [logprob(token_ids[i], i) for i in range(start, end)] if has_logprobs else None
        delta = ours.accept(start, token_ids[start:end], logprobs, row_finish)
        ours.check()
        if live.finish is None:
            live.receive(delta)
        else:
            assert not delta.token_ids
            assert not delta.text_delta
            assert delta.finish is None
        assert live.utf8.decode() == expected.texts[len(ours.token_ids)]
        for position in range(len(ours.token_ids) + 1):
            reader = Client()
            for upto in (position, None):
                for missing in ours.deltas_from(len(reader.token_ids), upto):
                    reader.receive(missing)
                if upto is not None:
                    assert reader.utf8.decode() == expected.texts[position]
            assert (reader.token_ids, reader.utf8, reader.finish) == (live.token_ids, live.utf8, live.finish)
            assert reader.logprobs == live.logprobs
    if not in_last_row and finish is not None and live.finish is None:
        expected = reference(kind, token_ids, stops, finish)
        last = ours.append((), None, finish)
        live.receive(last)
        assert ours.deltas_from(len(token_ids)) == [last]
    ours.check()
    assert list(ours.token_ids) == live.token_ids == expected.token_ids
    assert ours.text == live.utf8.decode() == expected.text
    assert (ours.finish, ours.stop_match) == (expected.finish, expected.stop_match)
    if has_logprobs:
        assert ours.logprobs == [logprob(token_id, i) for i, token_id in enumerate(live.token_ids)]
    again = output(kind, stops)
    again.restore(ours.token_ids, ours.logprobs or None, ours.finish, ours.stop_match)
    assert again.deltas_from(0) == ours.deltas_from(0)


@PROPERTY
@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("abc", min_size=1, max_size=6), min_size=1, max_size=6),
    draw=st.randoms(use_true_random=False),
)
def test_stop_strings_equal_trial(text: str, stops: list[str], draw: random.Random) -> None:
    automaton, state, read, match = StopStrings(stops), START, 0, None
    for start, end in rows(draw, len(text)):
        state, match, num_read = automaton.scan(state, text[start:end])
        read = start + num_read
        before, expected = search(text[:read], stops)
        assert match == expected
        if match is not None:
            assert read - len(match) == len(before)
            assert search(text[: read - 1], stops)[1] is None
            break
        assert read - automaton.depths[state] == len(before)
    assert match == search(text, stops)[1]


def test_many_long_stop_strings_are_cheap() -> None:
    automaton = StopStrings([chr(97 + i) * 255 + "!" for i in range(16)])
    assert len(automaton.depths) == 16 * 256 + 1
    state = automaton.scan(START, "ab" * 100_000 + "a" * 100_000).state
    assert automaton.depths[state] == 255
    assert automaton.scan(state, "!").match == "a" * 255 + "!"


def ids_of(text: str, kind: str = "byte_level") -> list[int]:
    return tokenizer(kind).encode(text, add_special_tokens=False)


def test_text_before_a_stop_string_inside_a_token() -> None:
    ours = output("byte_level", ["to"])
    assert ours.append(ids_of("the stop the")) == Delta(0, ids_of("the stop"), "the s", 0, None, "stop", "to")


def test_a_candidate_is_held_and_released() -> None:
    ours = output("byte_level", ["stop the"])
    deltas = [ours.append([token_id]).text_delta for token_id in ids_of(" stop stop theste")]
    assert "".join(deltas) == ours.text == " stop "
    assert ours.finish == "stop"
    ours = output("byte_level", ["stop!"])
    assert [ours.append([token_id]).text_delta for token_id in ids_of("stoph")] == ["", "stoph"]
    assert ours.append(ids_of("stop"), None, "length") == Delta(2, ids_of("stop"), "stop", 5, None, "length")


def test_a_stop_id_adds_no_text_but_ends_characters() -> None:
    the, eos = ids_of("the"), ids_of("<|im_end|>")
    ours = output("byte_level", [])
    assert ours.append([*the, *eos], None, "stop") == Delta(0, [*the, *eos], "the", 0, None, "stop")
    ours = output("byte_level", ["he"])  # the stop id is an ordinary token that spells a stop string
    assert ours.append(the, None, "stop") == Delta(0, the, "", 0, None, "stop")
    part = ids_of("\N{ROCKET}")[:1]
    ours = output("byte_level", [])
    assert ours.append([*part, *eos], None, "stop").text_delta == "\N{REPLACEMENT CHARACTER}"


def test_a_stop_string_found_in_the_last_withheld_text() -> None:
    run = [KINDS["byte_fallback"]().token_to_id(f"<0x{byte:02X}>") for byte in b" stop"]
    for finish in ("length", "cancelled", "error"):
        ours = output("byte_fallback", ["to"])
        assert ours.append(run, None, None).text_delta == ""
        delta = ours.append((), None, finish)  # type: ignore[arg-type]
        assert (delta.text_delta, delta.finish, delta.stop_match) == ("s", "stop", "to")


def test_without_a_tokenizer() -> None:
    params = SamplingParams(n=2, stop=("x",))
    for ours in choice_outputs(None, params):
        assert ours.append([5, 2**32 - 1], None, "length") == Delta(0, [5, 2**32 - 1], "", 0, None, "length")
        ours.check()


def test_choices_share_stop_strings_and_nothing_else() -> None:
    one, two = choice_outputs(tokenizer(), SamplingParams(n=2, stop=("stop",), skip_special_tokens=False))
    assert one.append(ids_of("<|im_end|>the")).text_delta == "<|im_end|>the"
    assert two.append(ids_of("stop")).stop_match == "stop"
    assert (one.finish, two.text) == (None, "")


def test_after_the_finish_everything_is_dropped() -> None:
    ours = output("byte_level", ["stop"])
    ours.append(ids_of("the stop"))
    held = len(ours.token_ids)
    for delta in (ours.append(ids_of("the"), None, "length"), ours.accept(held + 9, ids_of("the"))):
        assert delta == Delta(held, (), "", 4)
    assert (ours.text, ours.finish) == ("the ", "stop")


def test_gaps_and_contradictions_are_refused() -> None:
    ours = output("byte_level", [])
    ours.append([1, 2, 3])
    with pytest.raises(OutputError, match="row starts at position 5, the output ends at 3"):
        ours.accept(5, [9])
    with pytest.raises(OutputError, match=r"row finishes \(length\) at position 2, the output has 3 ids"):
        ours.accept(0, [1, 2], None, "length")
    with pytest.raises(OutputError, match="1 log-probabilities for 4 ids"):
        ours.append([4], [logprob(4, 3)])
    ours = output("byte_level", [])
    ours.append([1, 2], [logprob(1, 0), logprob(2, 1)])
    with pytest.raises(OutputError, match="2 log-probabilities for 3 ids; every row"):
        ours.append([3])
    assert ours.accept(0, [1], [logprob(1, 0)]) == Delta(2, (), "", len(ours.text))
    assert len(ours.accept(0, [1, 2, 3], [logprob(i, 0) for i in (1, 2, 3)]).logprobs or ()) == 1
    for position in (-1, 4):
        with pytest.raises(InvalidRequestError, match=rf"position \({position}\) must be from 0 to 3"):
            ours.deltas_from(position)
    with pytest.raises(InvalidRequestError, match="from 0 to 1"):
        ours.deltas_from(2, upto=1)


def test_a_long_output_comes_in_bounded_deltas() -> None:
    ours = output("byte_level", [])
    num_ids = 2 * MAX_DELTA_TOKENS + 5
    ours.append(ids_of("the") * num_ids, None, "length")
    deltas = ours.deltas_from(3)
    assert [len(delta.token_ids) for delta in deltas] == [MAX_DELTA_TOKENS, MAX_DELTA_TOKENS, 2]
    assert [delta.finish for delta in deltas] == [None, None, "length"]
    assert "".join(delta.text_delta for delta in deltas) == "the" * (num_ids - 3)
    assert ours.token_ids.tobytes() == array("I", ids_of("the") * num_ids).tobytes()

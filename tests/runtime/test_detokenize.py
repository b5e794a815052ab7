import json
from functools import cache
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders

from phalanx.errors import CheckpointError
from phalanx.runtime.detokenize import Detokenizer, decode_rule
from phalanx.runtime.tokenizer import Tokenizer
from tests.support.tokenizer_folders import KINDS, byte_fallback, byte_level

TINY = Path(__file__).parents[2] / "phalanx" / "assets" / "tiny"
PROPERTY = settings(deadline=None, derandomize=True, max_examples=300)


@cache
def tokenizer(kind: str) -> Tokenizer:
    if kind == "tiny":
        loaded = Tokenizer.from_folder(TINY)
        assert loaded is not None
        return loaded
    return Tokenizer(KINDS[kind]().to_str().encode(), {}, None)


@cache
def oracle(kind: str) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json")) if kind == "tiny" else KINDS[kind]()


@cache
def some_ids(kind: str) -> st.SearchStrategy[list[int]]:
    """Ids of the vocabulary, those of incomplete characters far more often than by chance, and ids past its end."""
    size = tokenizer(kind).vocab_size
    table = tokenizer(kind).pieces(False)
    partial = [i for i in range(size) if table[i][0] is None] or [0]
    added = sorted(oracle(kind).get_added_tokens_decoder()) or [0]
    one = st.one_of(
        st.integers(0, size + 8), st.sampled_from(partial), st.sampled_from(partial), st.sampled_from(added)
    )
    return st.lists(one, max_size=24)


def pushes(kind: str, token_ids: list[int], skip: bool) -> list[str]:
    detokenizer = Detokenizer(tokenizer(kind), skip)
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.flush()]


@pytest.mark.parametrize("kind", [*KINDS, "tiny"])
def test_equals_the_librarys_decode_of_every_prefix(kind: str) -> None:
    @PROPERTY
    @given(token_ids=some_ids(kind), skip=st.booleans())
    def check(token_ids: list[int], skip: bool) -> None:
        parts = pushes(kind, token_ids, skip)
        for end in range(len(token_ids) + 1):
            expected = oracle(kind).decode(token_ids[:end], skip_special_tokens=skip)
            assert "".join(pushes(kind, token_ids[:end], skip)) == expected
            assert expected.startswith("".join(parts[:end]))
        assert tokenizer(kind).decode(token_ids, skip) == oracle(kind).decode(token_ids, skip_special_tokens=skip)

    check()


@pytest.mark.parametrize("kind", [*KINDS, "tiny"])
def test_every_id_alone_and_second(kind: str) -> None:
    for skip in (False, True):
        for token_id in range(tokenizer(kind).vocab_size + 2):
            for token_ids in ([token_id], [1, token_id], [token_id, token_id]):
                expected = oracle(kind).decode(token_ids, skip_special_tokens=skip)
                assert "".join(pushes(kind, token_ids, skip)) == expected


@PROPERTY
@given(data=st.binary(max_size=40))
def test_any_bytes_one_by_one(data: bytes) -> None:
    ids = {byte: oracle("byte_level").token_to_id(char) for char, byte in _alphabet().items()}
    parts = pushes("byte_level", [ids[byte] for byte in data], False)
    assert "".join(parts) == data.decode(errors="replace") == oracle("byte_level").decode([ids[byte] for byte in data])
    for end in range(len(data) + 1):
        # Nothing certain is late: at most the three bytes of one unfinished character wait (ED A0 makes two U+FFFD).
        text, certain = data[:end].decode(errors="replace"), "".join(parts[:end])
        assert text == certain or (not _is_utf8(data[:end]) and len(text) - len(certain) <= 3)


def _is_utf8(data: bytes) -> bool:
    return "\N{REPLACEMENT CHARACTER}" not in data.decode(errors="replace")


@cache
def _alphabet() -> dict[str, int]:
    # Found from outside: what the library's pre-tokenizer makes of texts that together hold every byte of UTF-8; the
    # bytes no text contains stand for themselves.
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    texts = "".join(chr(code) for code in (*range(0x800), *range(0x800, 0xD800, 0x800), 0xE000, 0xF000))
    texts += "".join(chr(code) for code in (0x10000, 0x40000, 0x80000, 0xC0000, 0x100000))
    ((token, _),) = level.pre_tokenize_str(texts)
    spelled = dict(zip(token, texts.encode(), strict=True))
    missing = set(range(256)) - set(spelled.values())
    assert missing == {0xC0, 0xC1, *range(0xF5, 0x100)}
    return spelled | {chr(byte): byte for byte in missing}


def test_a_character_is_never_split() -> None:
    spelled = [oracle("byte_fallback").token_to_id(f"<0x{byte:02X}>") for byte in "\N{ROCKET}".encode()]
    assert pushes("byte_fallback", spelled, True) == ["", "", "", "", "\N{ROCKET}"]
    end = oracle("byte_fallback").token_to_id("a")
    assert pushes("byte_fallback", [*spelled, end], True) == ["", "", "", "", "\N{ROCKET}a", ""]
    rocket = oracle("byte_level").encode("\N{ROCKET}the").ids
    assert pushes("byte_level", rocket, True)[-3:] == ["\N{ROCKET}", "the", ""]
    assert set(pushes("byte_level", rocket, True)[:-3]) == {""}


def test_one_bad_byte_changes_its_whole_run_of_byte_tokens() -> None:
    run = [oracle("byte_fallback").token_to_id(f"<0x{byte:02X}>") for byte in b"\xe4\xbd\xa0\xff"]
    assert pushes("byte_fallback", run[:3], True) == ["", "", "", "你"]
    assert pushes("byte_fallback", run, True) == ["", "", "", "", "\N{REPLACEMENT CHARACTER}" * 4]


def test_skipped_and_unknown_ids_do_not_end_a_run() -> None:
    run = [oracle("byte_fallback").token_to_id(f"<0x{byte:02X}>") for byte in "é".encode()]
    unknown, eos = tokenizer("byte_fallback").vocab_size + 3, 2
    assert "".join(pushes("byte_fallback", [run[0], unknown, eos, run[1]], True)) == "é"
    assert "".join(pushes("byte_fallback", [run[0], eos, run[1]], False)) == "\ufffd</s>\ufffd"


def test_only_ids_of_the_vocabulary_are_kept() -> None:
    table = Tokenizer(byte_level().to_str().encode(), {}, None).pieces(True)
    for token_id in (-1, 10**6, 2**32, 2**64):
        assert table[token_id] == ("", b"")
    assert not table


def test_long_outputs_cost_the_same_per_token() -> None:
    # Quadratic work would show as a hundredfold: a run of byte tokens that never ends, then text.
    detokenizer = Detokenizer(tokenizer("byte_fallback"))
    run = [oracle("byte_fallback").token_to_id(f"<0x{byte:02X}>") for byte in "\N{ROCKET}".encode()]
    assert all(detokenizer.push(token_id) == "" for token_id in run * 50_000)
    assert detokenizer.flush() == "\N{ROCKET}" * 50_000


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.WordPiece(),
        decoders.CTC(),
        decoders.BPEDecoder(),
        decoders.Sequence([decoders.ByteFallback(), decoders.Replace("▁", " ")]),
        decoders.Sequence([decoders.Fuse(), decoders.Replace("▁", " ")]),
        decoders.Sequence([decoders.Strip(" ", 1, 0), decoders.Fuse()]),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)]),
        decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
        decoders.Replace(tokenizers.Regex("▁+"), " "),
    ],
)
def test_other_decoders_are_refused(decoder: decoders.Decoder) -> None:
    with pytest.raises(CheckpointError, match=r"decoder .* is not supported; supported are ByteLevel"):
        decode_rule(json.loads(decoder.__getstate__()))


def test_nested_sequences_are_flattened() -> None:
    tokenizer = byte_fallback()
    inner = json.loads(tokenizer.decoder.__getstate__())
    assert decode_rule({"type": "Sequence", "decoders": [inner]}) == decode_rule(inner)

"""Token ids to text, one id at a time.

`tokenizers` decodes a whole list. Its decoders of language models have two shapes, and both can be followed id by id,
so that nothing is decoded twice and text that went out never changes:

    byte level (GPT-2, Llama 3)      id -> bytes         text = UTF-8 of all bytes, U+FFFD per maximal invalid part
    byte fallback (Llama 2, Gemma)   id -> text | byte   a run of bytes = its UTF-8, or, if any part of the run is
                                                         invalid, one U+FFFD per byte

Withheld until certain: the start of an unfinished character (byte level), a run of bytes until a text token ends it
(byte fallback: one bad byte changes the whole run).
"""

import re
from codecs import utf_8_decode
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

from phalanx.errors import CheckpointError

# (text, bytes): text is None where the bytes alone are no whole characters; bytes are empty for text of byte fallback.
Piece = tuple[str | None, bytes]
IGNORED: Final[Piece] = ("", b"")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    # Source: GPT-2 `bytes_to_unicode`: printable Latin-1 stands for itself, the other bytes for U+0100 and up.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_ALPHABET: Final = _byte_alphabet()


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeRule:
    """How tokens become text, read from the `decoder` of a tokenizer.json.

    Attributes:
        replacements: (old, new) applied to each token, in order.
        separator: put before each token but the first.
        dropped_in_first: removed from the first token, before the replacements.
        is_byte_level: tokens spell bytes in the GPT-2 alphabet.
        has_byte_fallback: tokens `<0x00>` to `<0xFF>` are bytes.
        strip, max_strip: at most so many of this character are cut from the start of the text.
    """

    replacements: tuple[tuple[str, str], ...] = ()
    separator: str = ""
    dropped_in_first: str = ""
    is_byte_level: bool = False
    has_byte_fallback: bool = False
    strip: str = " "
    max_strip: int = 0


def decode_rule(decoder: Mapping[str, Any] | None) -> DecodeRule:
    """Read the `decoder` section of a tokenizer.json.

    Raises:
        CheckpointError: a decoder, or an order of decoders, that cannot be followed token by token.
    """
    if decoder is None:
        return DecodeRule(separator=" ")
    steps = _flatten(decoder)
    if [step["type"] for step in steps] == ["Metaspace"]:
        mark = steps[0]["replacement"]
        dropped = "" if steps[0].get("prepend_scheme") == "never" else mark
        return DecodeRule(replacements=((mark, " "),), dropped_in_first=dropped)
    rule, is_whole = DecodeRule(), False  # is_whole: the tokens so far are one string
    for step in steps:
        kind, has_bytes = step["type"], rule.is_byte_level or rule.has_byte_fallback
        if kind == "Replace" and "String" in step["pattern"] and not has_bytes and not is_whole:
            rule = replace(rule, replacements=(*rule.replacements, (step["pattern"]["String"], step["content"])))
        elif kind == "ByteLevel" and not has_bytes and not is_whole:
            rule, is_whole = replace(rule, is_byte_level=True), True
        elif kind == "ByteFallback" and not has_bytes and not is_whole:
            rule = replace(rule, has_byte_fallback=True)
        elif kind == "Fuse":
            is_whole = True
        elif kind == "Strip" and is_whole and not step["stop"] and not rule.max_strip:
            rule = replace(rule, strip=step["content"], max_strip=step["start"])
        else:
            raise CheckpointError(
                f"tokenizer.json: decoder {step} in {[step['type'] for step in steps]} is not supported; supported are "
                "ByteLevel, Metaspace, or Replace (a string), ByteFallback, Fuse, Strip (the start) in this order"
            )
    return rule


def _flatten(decoder: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for part in decoder["decoders"] for step in _flatten(part)]


class PieceTable(dict[int, Piece]):
    """What each id adds to a text; filled as ids are met, shared by all outputs of a tokenizer.

    Args:
        rule: how tokens become text.
        token_of: id -> token, None for an id without one.
        skipped: tokens that add nothing.
    """

    def __init__(self, rule: DecodeRule, token_of: Callable[[int], str | None], skipped: Collection[str]) -> None:
        super().__init__()
        self.rule = rule
        self._token_of = token_of
        self._skipped = skipped

    def __missing__(self, token_id: int) -> Piece:
        token = self._token_of(token_id)
        if token is None:
            return IGNORED  # padding of the model's vocabulary; not kept, so that ids from outside cannot fill memory
        piece = IGNORED if token in self._skipped else self._piece(self.rule.separator + token)
        self[token_id] = piece
        return piece

    def first(self, token_id: int) -> Piece:
        """The piece of an id that starts the text; `token_id` is not one that adds nothing."""
        token = self._token_of(token_id) or ""
        return self._piece(token.replace(self.rule.dropped_in_first, "") if self.rule.dropped_in_first else token)

    def _piece(self, token: str) -> Piece:
        for old, new in self.rule.replacements:
            token = token.replace(old, new)
        if self.rule.is_byte_level:
            # A token with any character outside the alphabet (an added token, say) stands for itself as a whole.
            spelled = [BYTE_ALPHABET.get(char, -1) for char in token]
            data = token.encode() if -1 in spelled else bytes(spelled)
            try:
                return data.decode(), data
            except UnicodeDecodeError:
                return None, data
        byte = _BYTE_TOKEN.fullmatch(token) if self.rule.has_byte_fallback else None
        return (None, bytes.fromhex(byte[1])) if byte else (token, b"")


class HasPieces(Protocol):
    """What a `Detokenizer` needs of a `Tokenizer`."""

    def pieces(self, skip_special_tokens: bool) -> PieceTable:
        """The table of all ids, with or without the special tokens."""


class Detokenizer:
    """The text of one growing list of ids, O(1) amortised per id; the inverse of `Tokenizer.encode`.

    What `push` and a last `flush` return, concatenated, equals `Tokenizer.decode` of all ids. Ids the tokenizer does
    not know (padding of the model's vocabulary) add nothing.
    """

    __slots__ = ("_is_first", "_is_started", "_max_strip", "_pending", "_pieces")

    def __init__(self, tokenizer: HasPieces, skip_special_tokens: bool = True) -> None:
        self._pieces = tokenizer.pieces(skip_special_tokens)
        self._pending = bytearray()
        self._max_strip = self._pieces.rule.max_strip
        self._is_first = True
        self._is_started = False  # the rules of the first token and of the start of the text are behind us

    def push(self, token_id: int) -> str:
        """Add an id; returns the text that has become certain, whole characters, often empty."""
        piece = self._pieces[token_id]
        if self._is_started and not self._pending:
            text = piece[0]
            if text is not None:
                return text
        return "" if piece is IGNORED else self._push(token_id, piece)

    def flush(self) -> str:
        """End the text: returns what was withheld, unfinished characters as U+FFFD. Nothing may be pushed after."""
        return self._strip_start(self._end_of_bytes())

    def _push(self, token_id: int, piece: Piece) -> str:
        if self._is_first:
            self._is_first = False
            piece = self._pieces.first(token_id)
        text, data = piece
        if self._pieces.rule.is_byte_level:
            self._pending += data
            certain, num_bytes = utf_8_decode(self._pending, "replace", False)
            del self._pending[:num_bytes]
            return self._strip_start(certain)
        if text is None:
            self._pending += data
            return ""
        return self._strip_start(self._end_of_bytes() + text)

    def _end_of_bytes(self) -> str:
        data = bytes(self._pending)
        self._pending.clear()
        try:
            return data.decode()
        except UnicodeDecodeError:
            if self._pieces.rule.is_byte_level:
                return data.decode(errors="replace")
            return "\N{REPLACEMENT CHARACTER}" * len(data)

    def _strip_start(self, text: str) -> str:
        while self._max_strip and text:
            if text[0] != self._pieces.rule.strip:
                self._max_strip = 0
                break
            text, self._max_strip = text[1:], self._max_strip - 1
        self._is_started = not self._max_strip
        return text

"""Keys: known answers, namespaces that must differ, incremental = at once (well under 1 s)."""

import hashlib
import itertools
import struct
from array import array

import pytest

from phalanx.runtime.kv.hashing import HashCursor, chain, root_hash


def test_chain_is_sha256_of_parent_and_tokens() -> None:
    parent, tokens = bytes(range(32)), struct.pack("<4I", 1, 2, 3, 2**32 - 1)
    assert chain(parent, tokens) == hashlib.sha256(parent + tokens).digest()
    assert chain(parent, tokens, b"img") == hashlib.sha256(parent + tokens + b"\x03\0\0\0img").digest()


def test_roots_differ_wherever_kv_may_not_be_shared() -> None:
    fields: list[dict[str, str | int | float | bytes | None]] = [
        {},
        {"adapter": "x"},
        {"salt": "x"},
        {"adapter": "x", "salt": "x"},
        {"adapter": None, "salt": "x"},
        {"adapter": ""},
        {"adapter": b"x"},
        {"ad": "apterx"},
        {"block_size": 1},
        {"block_size": 16},
        {"block_size": "1"},
        {"block_size": 1.0},
        {"block_size": True},
        {"a": "b", "c": "d"},
        {"a": "b\x01\0\0\0c\x02\0\0\0sd"},
    ]
    roots = [root_hash(each) for each in fields]
    for (a, root_a), (b, root_b) in itertools.combinations(zip(fields, roots, strict=True), 2):
        assert root_a != root_b, f"{a} and {b} share a namespace"


def test_root_does_not_depend_on_order_or_process() -> None:
    assert root_hash({"b": 1, "a": "x"}) == root_hash({"a": "x", "b": 1})
    # Written out by hand, so that a changed encoding (which would orphan every stored key) is a visible decision.
    encoded = b"phalanx-kv-1" + b"\x01\0\0\0a" + b"\x02\0\0\0sx" + b"\x01\0\0\0b" + b"\x02\0\0\0i1"
    assert root_hash({"a": "x", "b": 1}) == hashlib.sha256(encoded).digest()


def test_root_refuses_what_it_cannot_encode() -> None:
    with pytest.raises(TypeError, match="root field 'rope' is a list"):
        root_hash({"rope": [1]})  # type: ignore[dict-item]


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_cursor_incremental_equals_at_once(block_size: int) -> None:
    tokens, root = array("I", range(50)), root_hash({})
    at_once, by_step = HashCursor(root), HashCursor(root)
    at_once.extend(tokens, block_size, 50 // block_size)
    for n in range(50 // block_size + 1):
        by_step.extend(tokens, block_size, n)
        by_step.extend(tokens, block_size, n)
    assert by_step.hashes == at_once.hashes
    assert by_step.contents == at_once.contents
    parent = root
    for i, h in enumerate(at_once.hashes):
        parent = chain(parent, struct.pack(f"<{block_size}I", *tokens[i * block_size : (i + 1) * block_size]))
        assert h == parent
    tokens.append(7)  # no view of the array may be left open


def test_equal_blocks_after_different_prefixes_have_different_keys() -> None:
    keys = []
    for tokens in ([1, 2, 9, 9], [3, 4, 9, 9], [9, 9, 9, 9]):
        cursor = HashCursor(root_hash({}))
        cursor.extend(array("I", tokens), 2, 2)
        keys += cursor.hashes
    assert len(set(keys)) == 6

"""Keys of KV blocks: a SHA-256 chain over a sequence's full blocks, started by a namespace root.

    root = sha256("phalanx-kv-1" + fields)      key 0 = chain(root, tokens 0)      key i = chain(key i-1, tokens i)

A key names a block *and everything before it*, so equal keys mean equal KV contents and a lookup needs no tree. The
root holds whatever changes KV contents besides the tokens (weights, KV dtype, rope, adapter digest, block size) and
whatever must not be shared (tenant, cache salt). One root serves every tier and the controller's index, so no field can
be missing in one of them. Always SHA-256: a key that a client can predict or collide would serve one tenant's cache to
another (GHSA-rm76-4mrf-v9r8).
"""

import struct
from array import array
from collections.abc import Mapping
from hashlib import sha256


def root_hash(fields: Mapping[str, str | int | float | bytes | None]) -> bytes:
    """Namespace root, the parent of every sequence's first block.

    Fields are sorted by name, tagged with their type and length-prefixed, so no two different mappings share an
    encoding: adapter "x" is not salt "x", `1` is not `"1"`, and an absent field is not `None`.

    Returns:
        32 bytes.

    Raises:
        TypeError: a value of a type that has no encoding here.
    """
    digest = sha256(b"phalanx-kv-1")
    for name in sorted(fields):
        for part in (name.encode(), _tagged(name, fields[name])):
            digest.update(struct.pack("<I", len(part)) + part)
    return digest.digest()


def _tagged(name: str, value: object) -> bytes:
    match value:
        case None:
            return b"n"
        case bool():
            return b"?1" if value else b"?0"
        case int():
            return b"i%d" % value
        case float():
            return b"f" + struct.pack("<d", value)
        case str():
            return b"s" + value.encode()
        case bytes():
            return b"b" + value
    raise TypeError(f"root field {name!r} is a {type(value).__name__}; use str, int, float, bytes or None")


def chain(parent: bytes, tokens: bytes, extra: bytes = b"") -> bytes:
    """Key of the full block that follows the one keyed `parent`.

    Args:
        parent: 32 bytes, the previous block's key, or the root for the first block.
        tokens: token ids of the block, u32 little-endian; always block_size of them, which the root fixes.
        extra: what else the block's contents depend on, such as the media items that lie in it.

    Returns:
        32 bytes.
    """
    data = parent + tokens
    if extra:
        data += struct.pack("<I", len(extra)) + extra
    return sha256(data).digest()


class HashCursor:
    """Keys and contents of one sequence's leading full blocks; every block is hashed once, in order.

    hashes: key of block i.
    contents: token ids of block i, u32 little-endian; the pool shares these objects with its index.
    """

    __slots__ = ("contents", "hashes", "root")

    def __init__(self, root: bytes) -> None:
        self.root = root
        self.hashes: list[bytes] = []
        self.contents: list[bytes] = []

    def extend(self, tokens: "array[int]", block_size: int, num_blocks: int) -> None:
        """Hash blocks until `num_blocks` are covered; the tokens of covered blocks must not change afterwards."""
        first = len(self.hashes)
        if first >= num_blocks:
            return
        parent = self.hashes[-1] if first else self.root
        data = tokens[first * block_size : num_blocks * block_size].tobytes()
        stride = block_size * tokens.itemsize
        for start in range(0, len(data), stride):
            content = data[start : start + stride]
            parent = chain(parent, content)
            self.hashes.append(parent)
            self.contents.append(content)

    def clear(self) -> None:
        """Forget every block, so that the sequence's tokens may be replaced."""
        self.hashes = []
        self.contents = []

"""Cost of the KV metadata on the engine's thread, against the goals of the design.

    python benchmarks/kv_metadata.py

Every figure is measured here (best of several runs on one core); the last column is the goal it is held against.
"""

import itertools
import sys
import time
from array import array
from collections.abc import Callable

from phalanx.runtime.kv.hashing import HashCursor, root_hash
from phalanx.runtime.kv.pool import BlockPool
from phalanx.runtime.kv.prefix_cache import PrefixCache, Table
from phalanx.runtime.kv.spec import KVSpec

ROOT = root_hash({"model": "benchmark"})
REPEATS = 7


def best(run: Callable[[], float], repeats: int = REPEATS) -> float:
    """Smallest result, seconds: what the work costs when nobody else uses the core."""
    return min(run() for _ in range(repeats))


def allocate_release(sealed: bool) -> float:
    """Nanoseconds per block for one handed out and taken back; `sealed` = with contents to evict and to keep."""
    num_blocks, n = 20_001, 100
    pool = BlockPool(num_blocks)
    keys = itertools.count()
    if sealed:
        everything = pool.allocate(num_blocks - 1) or []
        for block in everything:
            pool.seal(block, next(keys).to_bytes(32, "little"), b"tokens")
        pool.release(reversed(everything))

    def run() -> float:
        seconds = 0.0
        for _ in range(num_blocks // n):
            start = time.perf_counter()
            blocks = pool.allocate(n) or []
            seconds += time.perf_counter() - start
            if sealed:
                for block in blocks:
                    pool.seal(block, next(keys).to_bytes(32, "little"), b"tokens")
            start = time.perf_counter()
            pool.release(blocks[::-1])
            seconds += time.perf_counter() - start
        return seconds / (num_blocks // n * n)

    return best(run) * 1e9


def hash_tokens(block_size: int) -> float:
    """Nanoseconds per token to hash a prompt on arrival."""
    tokens = array("I", range(131_072))

    def run() -> float:
        cursor = HashCursor(ROOT)
        start = time.perf_counter()
        cursor.extend(tokens, block_size, len(tokens) // block_size)
        return (time.perf_counter() - start) / len(tokens)

    return best(run) * 1e9


def match(block_size: int) -> float:
    """Nanoseconds per block of a full hit whose hashes are known."""
    num_tokens = 131_072
    tokens = array("I", range(num_tokens))
    cache = PrefixCache(
        KVSpec(block_size=block_size, num_blocks=num_tokens // block_size + 1, max_model_len=num_tokens)
    )
    first, second = Table(tokens, ROOT), Table(array("I", tokens), ROOT)
    cache.admit(first, cache.match(first), num_tokens, use_watermark=False)
    cache.commit(first, num_tokens)
    cache.match(second)

    def run() -> float:
        start = time.perf_counter()
        num_blocks = len(cache.match(second).blocks)
        return (time.perf_counter() - start) / num_blocks

    return best(run) * 1e9


def decode_step(block_size: int, enabled: bool) -> float:
    """Microseconds per step of 256 decoding sequences at mixed offsets, block boundaries included (mean of a block)."""
    num_sequences, length = 256, 1024
    spec = KVSpec(block_size=block_size, num_blocks=num_sequences * (4096 // block_size), max_model_len=4096)
    cache = PrefixCache(spec, enabled=enabled)
    tables = []
    for i in range(num_sequences):
        table = Table(array("I", range(i, i + length + i % block_size)), ROOT)
        cache.admit(table, cache.match(table), len(table.tokens))
        cache.commit(table, len(table.tokens))
        tables.append(table)

    def run() -> float:
        seconds = 0.0
        for _ in range(block_size):
            for table in tables:
                table.tokens.append(7)
            start = time.perf_counter()
            for table in tables:
                num_tokens = len(table.tokens)
                if table.capacity < num_tokens:
                    cache.append(table, num_tokens)
                cache.commit(table, num_tokens)
            seconds += time.perf_counter() - start
        return seconds / block_size

    return best(run) * 1e6


def bytes_inside_block() -> float:
    """Memory blocks kept per append + commit of a sequence that stays inside its last block."""
    cache = PrefixCache(KVSpec(block_size=64, num_blocks=10, max_model_len=512))
    table = Table(array("I", range(1)), ROOT)
    cache.admit(table, cache.match(table), 1)
    before = 0  # bound twice, so that the counter itself is not counted
    before = sys.getallocatedblocks()
    before = sys.getallocatedblocks()
    for num_tokens in range(1, 63):
        cache.append(table, num_tokens)
        cache.commit(table, num_tokens)
    return float(sys.getallocatedblocks() - before)


def main() -> None:
    rows = [
        ("allocate + release, clean block", allocate_release(False), 100, "ns/block"),
        ("evict + release, sealed block", allocate_release(True), None, "ns/block"),
        ("match, B=16", match(16), 80, "ns/block"),
        ("match, B=64", match(64), 80, "ns/block"),
        ("hash, B=16", hash_tokens(16), 35, "ns/token"),
        ("hash, B=64", hash_tokens(64), 15, "ns/token"),
        ("decode step of 256, B=16", decode_step(16, True), 60, "us"),
        ("decode step of 256, B=64", decode_step(64, True), 60, "us"),
        ("decode step of 256, B=16, cache off", decode_step(16, False), 60, "us"),
        ("kept by 62 tokens inside a block", bytes_inside_block(), 0, "objects"),
    ]
    for name, value, goal, unit in rows:
        verdict = "" if goal is None else f"goal <= {goal:3}  {'ok' if value <= goal else 'MISSED'}"
        print(f"{name:38} {value:8.1f} {unit:9} {verdict}".rstrip())


if __name__ == "__main__":
    main()

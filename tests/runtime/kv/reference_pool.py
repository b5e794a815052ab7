"""A slow, obvious block pool: two lists and no pointers. The real one must do exactly the same."""

import random
from types import ModuleType, SimpleNamespace

KEYS = tuple(bytes([i]) * 32 for i in range(6))


class ReferencePool:
    def __init__(self, num_blocks: int) -> None:
        self.ref = [0] * num_blocks
        self.gen = [0] * num_blocks
        self.key: list[bytes | None] = [None] * num_blocks
        self.owner: dict[bytes, int] = {}
        self.clean = list(range(1, num_blocks))
        self.cached: list[int] = []

    def allocate(self, n: int) -> list[int] | None:
        order = self.clean + self.cached
        if n > len(order):
            return None
        for i in order[:n]:
            if i in self.cached:
                del self.owner[self.key[i]]
                self.key[i] = None
            self.ref[i] = 1
            self.gen[i] += 1
        self.clean = [i for i in self.clean if i not in order[:n]]
        self.cached = [i for i in self.cached if i not in order[:n]]
        return order[:n]

    def acquire(self, ids: list[int]) -> None:
        for i in ids:
            self.ref[i] += 1
            self.cached = [j for j in self.cached if j != i]

    def release(self, ids: list[int], cold: bool) -> None:
        chilled = []
        for i in ids:
            self.ref[i] -= 1
            if self.ref[i]:
                continue
            if self.key[i] is not None and self.owner.setdefault(self.key[i], i) != i:
                self.key[i] = None
            if self.key[i] is None:
                self.clean.insert(0, i)
            elif cold:
                chilled.append(i)
            else:
                self.cached.append(i)
        self.cached = chilled + self.cached

    def seal(self, i: int, key: bytes) -> bool:
        self.key[i] = key
        return self.owner.setdefault(key, i) == i

    def unseal(self, i: int) -> None:
        if self.key[i] is not None and self.owner.get(self.key[i]) == i:
            del self.owner[self.key[i]]
        self.key[i] = None

    def reset(self) -> None:
        self.key = [None] * len(self.key)
        self.owner = {}
        self.clean, self.cached = list(range(1, len(self.ref))), []
        for i in self.clean:
            self.gen[i] += 1


def compare(kv: SimpleNamespace | ModuleType, seed: int, num_steps: int, num_blocks: int = 12) -> None:
    """Drive the pool of `kv` and the reference with the same random calls; after each, everything must be equal."""
    rng = random.Random(seed)
    real, reference = kv.pool.BlockPool(num_blocks), ReferencePool(num_blocks)
    held: list[int] = []
    for _ in range(num_steps):
        operation = rng.choice(("allocate", "allocate", "acquire", "release", "release", "seal", "seal", "unseal"))
        if operation == "allocate":
            n = rng.randrange(5)
            got, want = real.allocate(n), reference.allocate(n)
            assert (got and [block.id for block in got]) == want
            held += want or []
        elif operation == "acquire":
            hit = real.get(rng.choice(KEYS))
            if hit is not None:
                real.acquire([hit])
                reference.acquire([hit.id])
                held.append(hit.id)
        elif operation == "release":
            ids = rng.sample(held, rng.randrange(1 + min(4, len(held))))
            cold = rng.random() < 0.3
            real.release([real.blocks[i] for i in ids], cold=cold)
            reference.release(ids, cold)
            for i in ids:
                held.remove(i)
        elif operation == "seal":
            opened = [i for i in held if reference.key[i] is None]
            if opened:
                i, key = rng.choice(opened), rng.choice(KEYS)
                assert real.seal(real.blocks[i], key, key[:4]) == reference.seal(i, key)
        elif held and rng.random() < 0.3:
            i = rng.choice(held)
            real.unseal(real.blocks[i])
            reference.unseal(i)
        if rng.random() < 0.02:
            real.release([real.blocks[i] for i in held])
            reference.release(held, False)
            held = []
            real.reset()
            reference.reset()
        real.check()
        assert [block.id for block in real.free_order()] == reference.clean + reference.cached
        assert [block.ref for block in real.blocks] == reference.ref
        assert [block.gen for block in real.blocks] == reference.gen
        assert [block.hash for block in real.blocks] == reference.key
        for key in KEYS:
            found = real.get(key)
            assert (found and found.id) == reference.owner.get(key)

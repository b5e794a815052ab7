"""`SlotTable` against one plain object per sequence, over random joins, chunks, decodes and leaves. About 2 s."""

import random
from typing import Any

import msgspec
import pytest
import torch

from phalanx.moe.group import EpStep
from phalanx.runtime.kv.spec import KVSpec
from phalanx.runtime.plan import DomainPlan, Extend, PlanError, SlotInit, SlotSampling
from phalanx.runtime.slot_table import SampleRows, SlotTable

NUM_SLOTS = 6
SPEC = KVSpec(block_size=4, num_blocks=200, max_model_len=50)
PLAIN = SlotSampling(1.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0, {}, 7, 0, 0, [], -1, -1)


def pack(token_ids: list[int]) -> bytes:
    return b"".join(token_id.to_bytes(4, "little") for token_id in token_ids)


class Reference:
    """What the table must know of one slot."""

    def __init__(self, tokens: list[int], num_prompt: int, num_computed: int, wants_prompt: bool) -> None:
        self.tokens, self.num_prompt, self.num_computed = tokens, num_prompt, num_computed
        self.wants_prompt = wants_prompt
        self.block_ids: list[int] = []


class History:
    """Random plans, and what they must lead to, row by row."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.table = SlotTable(NUM_SLOTS, SPEC, torch.device("cpu"))
        self.slots: dict[int, Reference] = {}
        self.released: list[int] = []
        self.count = 0

    def plan(self) -> tuple[DomainPlan, list[tuple[int, int, bool]]]:
        rng, admit, extend = self.rng, [], []
        release, self.released = self.released, []
        for slot in sorted(set(range(NUM_SLOTS)) - set(self.slots)):
            if rng.random() < 0.4:
                tokens = rng.choices(range(1000), k=rng.randrange(1, 40))
                num_prompt = rng.randrange(1, len(tokens) + 1)
                num_computed = rng.randrange(0, (len(tokens) - 1) // 4 + 1) * 4
                wants = rng.random() < 0.3
                new = self.slots[slot] = Reference(tokens, num_prompt, num_computed, wants)
                sampling = msgspec.structs.replace(PLAIN, prompt_logprobs=5) if wants else PLAIN
                admit.append(SlotInit(slot, pack(tokens), num_prompt, num_computed, sampling))
                extend.append(Extend(slot, 0, self.grow(new, len(tokens))))
        singles: list[tuple[int, int, bool]] = []
        chunks: list[tuple[int, int, bool]] = []
        for slot, own in self.slots.items():
            remaining = len(own.tokens) - own.num_computed
            if rng.random() < 0.2:
                continue
            num_tokens = rng.randrange(1, remaining + 1)
            if own.num_computed + num_tokens > len(own.block_ids) * 4:
                first = len(own.block_ids)
                extend.append(Extend(slot, first, self.grow(own, own.num_computed + num_tokens)))
            (singles if num_tokens == 1 else chunks).append((slot, num_tokens, num_tokens == remaining))
        rows = singles + chunks
        return DomainPlan(release, admit, extend, [int(x) for row in rows for x in row]), rows

    def grow(self, own: Reference, num_tokens: int) -> list[int]:
        new = [self.rng.randrange(1, SPEC.num_blocks) for _ in range(SPEC.max_blocks(num_tokens) - len(own.block_ids))]
        own.block_ids += new
        return new

    def turn(self) -> None:
        plan, rows = self.plan()
        self.table.apply(plan)
        batch, sampled = self.table.build(plan.rows)
        owns = [self.slots[slot] for slot, _, _ in rows]
        positions = [range(own.num_computed, own.num_computed + n) for own, (_, n, _) in zip(owns, rows, strict=True)]
        flat = [(own, p) for own, part in zip(owns, positions, strict=True) for p in part]
        starts = [sum(len(part) for part in positions[:i]) for i in range(len(rows) + 1)]
        assert batch.num_tokens == len(flat) == starts[-1]
        assert batch.positions.tolist() == [p for _, p in flat]
        assert batch.token_ids.tolist() == [own.tokens[p] for own, p in flat]
        assert batch.slot_mapping.tolist() == [own.block_ids[p // 4] * 4 + p % 4 for own, p in flat]
        assert batch.meta.cu_seqlens_q.tolist() == starts
        ends = [part.stop for part in positions]
        assert batch.meta.seq_lens.tolist() == ends
        self.check_meta(batch, owns, ends, rows)
        self.check_sampled(batch.sample_rows.tolist(), sampled, rows, starts)
        for own, end in zip(owns, ends, strict=True):
            own.num_computed = end
        self.sample(sampled, rows)

    def check_meta(self, batch: Any, owns: list[Reference], ends: list[int], rows: list[tuple[int, int, bool]]) -> None:
        meta, lengths = batch.meta, [n for _, n, _ in rows]
        assert (meta.num_decodes, meta.max_q_len) == (lengths.count(1), max(lengths, default=0))
        assert meta.max_seq_len == max(ends, default=0)
        width = SPEC.max_blocks(meta.max_seq_len) + 1  # one entry past the longest sequence can be read
        tables = [(own.block_ids + [0] * width)[:width] for own in owns]
        assert meta.block_tables.tolist() == tables
        types = (batch.token_ids, batch.positions, meta.cu_seqlens_q, meta.seq_lens, meta.block_tables)
        assert {tensor.dtype for tensor in types} == {torch.int32}
        assert {batch.slot_mapping.dtype, batch.sample_rows.dtype} == {torch.int64}
        assert all(tensor.is_contiguous() for tensor in (*types, batch.slot_mapping, batch.sample_rows))

    def check_sampled(
        self, sample_rows: list[int], sampled: SampleRows, rows: list[tuple[int, int, bool]], starts: list[int]
    ) -> None:
        chosen = [i for i, (_, _, sample) in enumerate(rows) if sample]
        assert sampled.slots.tolist() == [rows[i][0] for i in chosen]
        assert sampled.lengths.tolist() == [len(self.slots[rows[i][0]].tokens) for i in chosen]
        expected = [starts[i + 1] - 1 for i in chosen]
        parts = []
        for i, (slot, num_tokens, _) in enumerate(rows):
            own = self.slots[slot]
            about = [p for p in range(own.num_computed, own.num_computed + num_tokens) if p + 1 < own.num_prompt]
            if own.wants_prompt and about:
                parts.append((slot, about[0], len(about), starts[i], len(expected)))
                expected += [starts[i] + p - own.num_computed for p in about]
        assert [(p.slot, p.start, p.count, p.first_row, p.first_logit) for p in sampled.prompt] == parts
        assert sample_rows == expected

    def sample(self, sampled: SampleRows, rows: list[tuple[int, int, bool]]) -> None:
        """The sampled ids become the next inputs; some sequences leave."""
        token_ids = [self.rng.randrange(1000) for _ in sampled.slots]
        self.table.store(sampled, torch.tensor(token_ids, dtype=torch.int64))
        for slot, token_id in zip(sampled.slots.tolist(), token_ids, strict=True):
            self.slots[slot].tokens.append(token_id)
        for slot in [slot for slot, own in self.slots.items() if len(own.tokens) > 45 or self.rng.random() < 0.05]:
            del self.slots[slot]
            self.released.append(slot)
        self.count += len(rows)


@pytest.mark.parametrize("seed", range(4))
def test_random_histories(seed: int) -> None:
    history = History(seed)
    for _ in range(400):
        history.turn()
    assert history.count > 1000


def test_a_step_without_rows() -> None:
    batch, sampled = SlotTable(2, SPEC, torch.device("cpu")).build([])
    assert batch.num_tokens == len(batch.positions) == len(batch.sample_rows) == len(sampled.slots) == 0
    assert batch.meta.cu_seqlens_q.tolist() == [0]
    assert (batch.meta.num_decodes, batch.meta.max_q_len, batch.meta.max_seq_len) == (0, 0, 0)


def test_the_longest_sequence_fits() -> None:
    table = SlotTable(1, SPEC, torch.device("cpu"))
    blocks = list(range(1, SPEC.max_blocks(50) + 1))
    table.apply(DomainPlan([], [SlotInit(0, pack([5] * 50), 50, 0, PLAIN)], [Extend(0, 0, blocks)], []))
    batch, sampled = table.build([0, 50, 1])
    assert batch.meta.block_tables.tolist() == [[*blocks, 0]]
    table.store(sampled, torch.tensor([9]))
    assert table.tokens[0, 50] == 9


def ready() -> SlotTable:
    """Slot 0 holds 6 tokens in 2 blocks, slot 1 a decode; slot 2 is free."""
    table = SlotTable(3, SPEC, torch.device("cpu"))
    admit = [SlotInit(0, pack([1] * 6), 6, 0, PLAIN), SlotInit(1, pack([1] * 5), 5, 4, PLAIN)]
    table.apply(DomainPlan([], admit, [Extend(0, 0, [1, 2]), Extend(1, 0, [3, 4])], []))
    return table


def init(slot: int, token_ids: bytes = pack([1, 2]), num_prompt: int = 2, num_computed: int = 0) -> DomainPlan:
    return DomainPlan([], [SlotInit(slot, token_ids, num_prompt, num_computed, PLAIN)], [], [])


BAD_PLANS = {
    "release of a free slot": (DomainPlan([2], [], [], []), "slot 2 is not in use"),
    "release of no slot": (DomainPlan([-1], [], [], []), "slot -1 is not one of 3"),
    "admit to a used slot": (init(0), "slot 0 is in use already"),
    "admit to no slot": (init(3), "slot 3 is not one of 3"),
    "half a token": (init(2, b"\1\0\0\0\1\0"), "6 bytes"),
    "too many tokens": (init(2, pack([1] * 51)), "204 bytes .* 1..50 tokens"),
    "no tokens": (init(2, b""), "do not fit 0 tokens"),
    "more prompt than tokens": (init(2, num_prompt=3), "3 of the prompt do not fit 2"),
    "no prompt": (init(2, num_prompt=0), "0 of the prompt"),
    "everything computed": (init(2, num_computed=2), "2 tokens computed"),
    "less than nothing computed": (init(2, num_computed=-1), "-1 tokens computed"),
    "blocks for a free slot": (DomainPlan([], [], [Extend(2, 0, [1])], []), "slot 2 is not in use"),
    "the null block": (DomainPlan([], [], [Extend(0, 2, [0])], []), r"block ids \[0\] outside 1..199"),
    "no such block": (DomainPlan([], [], [Extend(0, 2, [200])], []), r"block ids \[200\] outside"),
    "a table before its start": (DomainPlan([], [], [Extend(0, -1, [5])], []), "outside its table"),
    "a table beyond its end": (DomainPlan([], [], [Extend(0, 13, [5])], []), r"blocks 13..13 are outside its table"),
}
BAD_ROWS = {
    "no triples": ([0, 1], "2 integers are no triples"),
    "a free slot": ([2, 1, 1], r"slots \[2\] have work; in use are \[0, 1\]"),
    "a slot below": ([-1, 1, 1], r"slots \[-1\] have work"),
    "a slot above": ([3, 1, 1], r"slots \[3\] have work"),
    "a slot twice": ([1, 1, 0, 1, 1, 1], "one of them twice"),
    "no token": ([0, 0, 1], r"rows of \[0\] tokens"),
    "too long": ([0, 51, 1], r"end at \[51\] of 50"),
    "a decode after a chunk": ([0, 6, 1, 1, 1, 1], "those of one token come first"),
    "beyond its blocks": ([1, 1, 1, 0, 9, 1], r"slots \[0\] have tokens beyond their blocks"),
}


@pytest.mark.parametrize("name", BAD_PLANS)
def test_bad_changes_are_refused(name: str) -> None:
    plan, message = BAD_PLANS[name]
    with pytest.raises(PlanError, match=message):
        ready().apply(plan)


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_refused(name: str) -> None:
    rows, message = BAD_ROWS[name]
    with pytest.raises(PlanError, match=message):
        ready().build(rows)


def test_arbitrary_integers_raise_nothing_else() -> None:
    rng = random.Random(5)
    for _ in range(300):
        table = ready()
        few = [rng.randrange(-3, 60) for _ in range(rng.randrange(12))]
        ids = rng.randbytes(rng.randrange(20))
        plan = DomainPlan(
            few[:1],
            [SlotInit(rng.randrange(-2, 5), ids, rng.randrange(-2, 6), rng.randrange(-2, 6), PLAIN)],
            [Extend(rng.randrange(-2, 5), rng.randrange(-3, 20), [rng.randrange(-3, 300) for _ in few])],
            few,
        )
        try:
            table.apply(plan)
            table.build(plan.rows)
        except PlanError:
            continue


def test_every_token_has_its_requests_task() -> None:
    """In a model with tasks; a slot's next owner brings its own."""
    step, device = EpStep("local", 8), torch.device("cpu")
    for has_tasks in (True, False):
        table = SlotTable(3, SPEC, device, has_tasks=has_tasks)
        for first, second in ((4, 0), (1, 2)):
            admit = [
                SlotInit(slot, pack([1] * 3), 3, 0, msgspec.structs.replace(PLAIN, task=task))
                for slot, task in ((0, first), (2, second))
            ]
            table.apply(DomainPlan([], admit, [Extend(0, 0, [1]), Extend(2, 0, [2])], []))
            batch, _ = table.build([2, 1, 0, 0, 3, 1], step)
            assert batch.ep is not None
            got = None if batch.ep.task_T is None else batch.ep.task_T.tolist()
            assert got == ([second, first, first, first] if has_tasks else None)
            table.apply(DomainPlan([0, 2], [], [], []))

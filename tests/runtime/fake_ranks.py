"""Ranks without a model, and a client without a network: they execute real plans and know every answer in advance.

A fake rank keeps its own slots and a symbolic KV pool: a written cell holds the digest of the token prefix it belongs
to, a cell of a block that was handed out anew holds `None`. Every row reads all cells its table exposes; one wrong cell
is a wrong hit, an early seal, a use after free or a mixed-up table, whatever caused it. The "model" is a function of
the prefix alone, so `oracle` knows the undisturbed stream of every request.

A row can be poisoned: its cells hold a `NaN`, so does everything computed from them, and sampling from them fails. Once
the engine has been told that a placement failed, nobody may be admitted onto cells which that placement wrote.

Results wait until `deliver`: the driver decides how late every dp rank answers.
"""

from collections import deque
from typing import NamedTuple

from phalanx.models.spec import DecoderConfig
from phalanx.parallel.mesh import MeshShape
from phalanx.runtime import plan as messages
from phalanx.runtime.engine_config import EngineConfig
from phalanx.runtime.executor.executor import Event, HasFileno
from phalanx.runtime.frames import TokenLogprobs
from phalanx.runtime.kv.spec import KVSpec
from phalanx.runtime.plan import DomainPlan, Order, Ready, SlotInit, StepPlan, StepResult
from phalanx.runtime.sampling_params import SamplingParams

VOCABULARY = 40
EOS = 0
MODULUS = 2**61 - 1


def digest(parent: int, token_id: int) -> int:
    """Names a token prefix: that of its parent plus one token; 1 is the empty prefix."""
    return (parent * 0x9E3779B97F4A7C15 + token_id + 1) % MODULUS


def digest_of(token_ids: list[int]) -> int:
    value = 1
    for token_id in token_ids:
        value = digest(value, token_id)
    return value


def next_token(prefix: int, salt: int, choice: int, banned: frozenset[int]) -> int:
    """The model: `salt` is what tells the streams of equal prompts apart, as a seed would."""
    token_id = (digest(digest(prefix, salt), choice) >> 20) % VOCABULARY
    while token_id in banned:
        token_id = (token_id + 1) % VOCABULARY
    return token_id


def logprob(prefix: int, token_id: int) -> float:
    return -float(digest(prefix, token_id) % 1000)


class Answer(NamedTuple):
    token_ids: list[int]
    finish: str


def oracle(prompt: list[int], params: SamplingParams, choice: int) -> Answer:
    """The undisturbed stream. The salt travels as `top_k`, because the seed names the placement here."""
    assert params.max_tokens is not None
    stops = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else frozenset([EOS]))
    prefix, output = digest_of(prompt), list[int]()
    while len(output) < params.max_tokens:
        banned = stops if len(output) < params.min_tokens else frozenset[int]()
        output.append(next_token(prefix, params.top_k, choice, banned))
        prefix = digest(prefix, output[-1])
        if output[-1] in stops:
            return Answer(output, "stop")
    return Answer(output, "length")


class NaN(NamedTuple):
    """A poisoned cell, and the placement (seed, choice) that wrote it."""

    writer: tuple[int, int]


class Slot:
    """A sequence on a rank. `prefixes[i]` names tokens 0 ... i."""

    def __init__(self, init: SlotInit) -> None:
        data, self.sampling = init.token_ids, init.sampling
        self.num_prompt, self.num_computed = init.num_prompt_tokens, init.num_computed_tokens
        self.tokens: list[int] = []
        self.prefixes: list[int] = []
        for i in range(0, len(data), 4):
            self.append(int.from_bytes(data[i : i + 4], "little"))
        self.block_ids: list[int] = []
        self.key = (init.sampling.seed, init.sampling.choice)

    def append(self, token_id: int) -> None:
        self.prefixes.append(digest(self.prefixes[-1] if self.prefixes else 1, token_id))
        self.tokens.append(token_id)


class FakeRank:
    """Executes the plans of one dp rank, in order.

    With stages it is the first one, which learns sampled ids late: those of steps below `num_settled`, before it takes
    the changes of a plan.
    """

    def __init__(self, config: EngineConfig, dp_rank: int) -> None:
        self.config, self.dp_rank, self.block_size = config, dp_rank, config.kv.block_size
        self.slots: list[Slot | None] = [None] * config.max_sequences
        self.cells: list[list[object]] = [[None] * self.block_size for _ in range(config.kv.num_blocks)]
        self.max_prompt_logprobs = 0  # in one step so far
        self._arriving: deque[tuple[int, Slot, int]] = deque()  # step, slot, sampled id

    def execute(self, plan: StepPlan, failed: frozenset[tuple[int, int]], poison: int | None) -> StepResult:
        """Run a step.

        Args:
            failed: placements the engine knew to have failed when it made the plan.
            poison: index (modulo their number) of the row whose computation goes wrong.
        """
        part = plan.domains[self.dp_rank]
        self._take_tokens(part.num_settled)
        self._apply(part, failed)
        rows = list(zip(part.rows[::3], part.rows[1::3], part.rows[2::3], strict=True))
        self._check_rows(rows)
        slots, token_ids, broken, prompt = list[int](), list[int](), list[int](), []
        logprobs: list[TokenLogprobs | None] = []
        for index, (slot_id, num_tokens, sample) in enumerate(rows):
            slot = self._slot(slot_id)
            start, end = slot.num_computed, slot.num_computed + num_tokens
            assert end <= len(slot.tokens), f"slot {slot_id} computes up to {end}, but knows {len(slot.tokens)} tokens"
            is_sound = self._compute(slot, start, end, is_poisoned=poison is not None and index == poison % len(rows))
            slot.num_computed = end
            if entries := self._prompt_logprobs(slot, start, end):
                prompt.append((slot_id, entries))
            if sample:
                assert end == len(slot.tokens), f"slot {slot_id} samples after {end} of {len(slot.tokens)} tokens"
                if not is_sound:
                    broken.append(len(slots))
                slots.append(slot_id)
                token_ids.append(self._sample(slot, logprobs))
                self._arriving.append((plan.step, slot, token_ids[-1]))
        if self.config.shape.pp == 1:
            self._take_tokens(plan.step + 1)
        self.max_prompt_logprobs = max(self.max_prompt_logprobs, sum(len(entries) for _, entries in prompt))
        logprobs = logprobs if any(logprobs) else []
        return StepResult(plan.step, plan.generation, self.dp_rank, slots, token_ids, broken, logprobs, prompt, 0.0)

    def keys(self, slot_ids: list[int]) -> list[tuple[int, int]]:
        return [self._slot(slot_id).key for slot_id in slot_ids]

    def _take_tokens(self, num_settled: int) -> None:
        while self._arriving and self._arriving[0][0] < num_settled:
            _, slot, token_id = self._arriving.popleft()
            assert slot in self.slots, "a sampled id arrives after its slot was released"
            slot.append(token_id)

    def _slot(self, slot_id: int) -> Slot:
        slot = self.slots[slot_id]
        assert slot is not None, f"slot {slot_id} was never admitted"
        return slot

    def _apply(self, part: DomainPlan, failed: frozenset[tuple[int, int]]) -> None:
        for slot_id in part.release:
            assert self.slots[slot_id] is not None, f"slot {slot_id} is released twice"
            self.slots[slot_id] = None
        num_hits = {init.slot: init.num_computed_tokens for init in part.admit}
        assert len(num_hits) == len(part.admit), "a slot is admitted twice in a step"
        for init in part.admit:
            assert self.slots[init.slot] is None, f"slot {init.slot} is admitted while in use"
            self.slots[init.slot] = slot = Slot(init)
            assert slot.num_computed % self.block_size == 0
            assert slot.num_computed < len(slot.tokens) <= self.config.kv.max_model_len
        for slot_id, first, block_ids in ((e.slot, e.first_index, e.block_ids) for e in part.extend):
            slot = self._slot(slot_id)
            assert first == len(slot.block_ids), f"slot {slot_id}: table of {len(slot.block_ids)} grows at {first}"
            assert block_ids, "an extend without blocks"
            assert not set(block_ids) & set(slot.block_ids), "a block twice in a table"
            slot.block_ids += block_ids
            num_shared = num_hits.pop(slot_id, 0) // self.block_size
            for block_id in block_ids[:num_shared]:
                bad = {cell.writer for cell in self.cells[block_id] if isinstance(cell, NaN)} & failed
                assert not bad, f"slot {slot_id} starts on block {block_id}, which the failed {bad} wrote"
            for block_id in block_ids[num_shared:]:
                assert 0 < block_id < self.config.kv.num_blocks
                self.cells[block_id] = [None] * self.block_size
        assert not num_hits, f"slots {list(num_hits)} enter without blocks"

    def _check_rows(self, rows: list[tuple[int, int, int]]) -> None:
        counts = [num_tokens for _, num_tokens, _ in rows]
        assert len({slot for slot, _, _ in rows}) == len(rows), "a slot has two rows in a step"
        assert sum(counts) <= self.config.max_batch_tokens, "the step is over its token budget"
        assert min(counts, default=1) >= 1
        assert [count > 1 for count in counts] == sorted(count > 1 for count in counts), "rows of one token come first"

    def _compute(self, slot: Slot, start: int, end: int, *, is_poisoned: bool) -> bool:
        """Write the cells of tokens [start, end) and read [0, end); False if there is a NaN among them."""
        size, value = self.block_size, NaN(slot.key)
        assert len(slot.block_ids) * size >= end, f"a table of {len(slot.block_ids)} blocks holds no {end} tokens"
        is_sound = not is_poisoned and self._read(slot, start)
        for position in range(start, end):
            cell = slot.prefixes[position] if is_sound else value
            self.cells[slot.block_ids[position // size]][position % size] = cell
        return is_sound

    def _read(self, slot: Slot, end: int) -> bool:
        """Whether tokens [0, end) are sound; they must be this sequence's or NaN."""
        size, is_sound = self.block_size, True
        for first in range(0, end, size):
            count = min(size, end - first)
            cells, expected = self.cells[slot.block_ids[first // size]][:count], slot.prefixes[first : first + count]
            if cells != expected:
                wrong = [i for i in range(count) if cells[i] != expected[i] and not isinstance(cells[i], NaN)]
                assert not wrong, f"{slot.key} reads the cell of another prefix at position {first + wrong[0]}"
                is_sound = False
        return is_sound

    def _sample(self, slot: Slot, logprobs: list[TokenLogprobs | None]) -> int:
        sampling, prefix = slot.sampling, slot.prefixes[-1]
        is_early = len(slot.tokens) - slot.num_prompt < sampling.min_tokens
        banned = frozenset(sampling.stop_token_ids if is_early else [])
        token_id = next_token(prefix, sampling.top_k, sampling.choice, banned)
        wants = sampling.logprobs >= 0
        logprobs.append(TokenLogprobs(token_id, logprob(prefix, token_id), 1, [], []) if wants else None)
        return token_id

    def _prompt_logprobs(self, slot: Slot, start: int, end: int) -> list[TokenLogprobs]:
        if slot.sampling.prompt_logprobs < 0:
            return []
        positions = range(start, min(end, slot.num_prompt - 1))
        ids = [(slot.prefixes[p], slot.tokens[p + 1]) for p in positions]
        return [TokenLogprobs(token_id, logprob(prefix, token_id), 1, [], []) for prefix, token_id in ids]


class FakeExecutor:
    """All ranks of a replica. Plans are executed when the driver says so; `poll` never waits."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.ready: dict[int, Ready] = {}
        self.nodes: dict[int, str] = {}
        self.members: set[int] = set()
        self.spare: set[int] = set()
        self.ranks = [FakeRank(config, dp_rank) for dp_rank in range(config.shape.dp)]
        self.admitted: list[list[tuple[int, int]]] = []  # per plan: placements that enter; the driver takes them
        self.failed: set[tuple[int, int]] = set()  # placements the engine has been told failed
        self.num_nans = 0
        self._queues: list[deque[tuple[StepPlan, frozenset[tuple[int, int]]]]] = [deque() for _ in self.ranks]
        self._arrived: list[tuple[StepResult, list[tuple[int, int]]]] = []
        self._hash = 0
        self._next_step = 0
        self._unanswered: dict[int, set[int]] = {}  # step -> dp ranks whose result the engine has not seen

    @property
    def num_unanswered(self) -> int:
        return len(self._unanswered)

    def submit(self, plan: StepPlan) -> None:
        """Take a plan as a rank would see it, after the codec."""
        order = messages.decode_order(messages.encode(plan))
        assert isinstance(order, StepPlan)
        plan = order
        assert plan.step == self._next_step
        assert len(plan.domains) == len(self.ranks)
        for part in plan.domains:
            self._hash = messages.roll_hash(self._hash, part.rows)
        inits = [init for part in plan.domains for init in part.admit]
        self.admitted.append([(init.sampling.seed, init.sampling.choice) for init in inits])
        assert plan.schedule_hash == self._hash
        self._next_step += 1
        self._check_slots_in_flight(plan)
        self._unanswered[plan.step] = set(range(len(self.ranks)))
        assert len(self._unanswered) <= self.config.max_in_flight, "the engine runs too far ahead"
        for queue in self._queues:
            queue.append((plan, frozenset(self.failed)))

    def deliver(self, dp_rank: int, poison: int | None = None) -> bool:
        """Execute the oldest plan of a rank and answer it; False if there is none."""
        if not self._queues[dp_rank]:
            return False
        plan, failed = self._queues[dp_rank].popleft()
        rank = self.ranks[dp_rank]
        result = rank.execute(plan, failed, poison if plan.domains[dp_rank].rows else None)
        broken = rank.keys([result.slots[index] for index in result.failed])
        self.num_nans += len(broken)
        message = messages.decode_message(messages.encode(result))
        assert isinstance(message, StepResult)
        self._arrived.append((message, broken))
        return True

    def poll(self, timeout_s: float, wake: HasFileno | None = None) -> list[Event]:
        """What was delivered since the last call."""
        arrived, self._arrived = self._arrived, []
        for result, broken in arrived:
            self.failed.update(broken)
            self._unanswered[result.step].remove(result.dp_rank)
            if not self._unanswered[result.step]:
                del self._unanswered[result.step]
        return [result for result, _ in arrived]

    def send(self, rank: int, order: Order) -> None:
        raise AssertionError("a dense replica sends plans only")

    def grow(self, ranks: object) -> None:
        raise AssertionError("a dense replica does not grow")

    brief = drop = grow

    def close(self) -> None:
        self._queues = [deque() for _ in self.ranks]

    def _check_slots_in_flight(self, plan: StepPlan) -> None:
        for dp_rank, part in enumerate(plan.domains):
            busy: set[int] = set()
            for earlier, _ in self._queues[dp_rank]:
                busy.update(earlier.domains[dp_rank].rows[::3])
            for result, _ in self._arrived:  # the engine has not read these yet
                busy.update(result.slots if result.dp_rank == dp_rank else [])
            assert not busy & set(part.release), "a slot is released while a step in flight uses it"
            if self.config.shape.pp > 1:
                assert not busy & set(part.rows[::3]), "stages hold two steps of one sequence"


def make_config(
    *,
    pp: int = 1,
    dp: int = 1,
    device: str = "cpu",
    block_size: int = 4,
    num_blocks: int = 40,
    max_model_len: int = 40,
    max_batch_tokens: int = 8,
    max_sequences: int = 4,
    prefix_cache: bool = True,
) -> EngineConfig:
    """An engine over fake ranks: `device="cuda"` runs one step ahead, `pp` > 1 is pipelined that deep."""
    model = DecoderConfig(
        model_type="fake",
        vocab_size=VOCABULARY,
        hidden_size=1,
        layers=(),
        max_position=max_model_len,
        norm_eps=1e-6,
        eos_token_ids=(EOS,),
    )
    return EngineConfig(
        model_path="fake",
        model=model,
        shape=MeshShape(pp=pp, dp=dp),
        stage_layers=(),
        device=device,
        dtype="float32",
        kv=KVSpec(block_size=block_size, num_blocks=num_blocks, max_model_len=max_model_len),
        prefix_cache=prefix_cache,
        max_batch_tokens=max_batch_tokens,
        max_sequences=max_sequences,
    )

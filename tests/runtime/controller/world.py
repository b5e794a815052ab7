"""A simulated service around the real controller core: virtual clock, engines, a network with faults, clients.

Every token is a pure function of (seed, choice, position), so what a client must see is known without any run.
"""

import codecs
import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from itertools import count

from phalanx.errors import DuplicateRequestError, UnknownRequestError
from phalanx.runtime.controller import events as ev
from phalanx.runtime.controller.core import Core, CoreConfig
from phalanx.runtime.controller.jobs import Job, JobRequest, body_digest, pack_ids, unpack_ids
from phalanx.runtime.detokenize import BYTE_ALPHABET, DecodeRule, PieceTable
from phalanx.runtime.frames import VERSION, Abort, Heartbeat, Hello, Place, Shutdown, TokenEvents, TokenRow
from phalanx.runtime.output import choice_outputs
from phalanx.runtime.sampling_params import SamplingParams

STEP_S, HEARTBEAT_S, TICK_S, READ_S = 0.02, 0.25, 0.05, 0.03
BYTES = b"aab \xc3\xa9"  # both halves of a letter among them: text is withheld, cut, and sometimes invalid
LETTERS = {byte: letter for letter, byte in BYTE_ALPHABET.items()}


class ByteTokenizer:
    """Id = byte."""

    def __init__(self) -> None:
        self._table = PieceTable(DecodeRule(is_byte_level=True), LETTERS.get, ())

    def pieces(self, skip_special_tokens: bool) -> PieceTable:
        return self._table


def token(seed: int, choice: int, position: int) -> int:
    """The model of this world."""
    digest = blake2b(f"{seed}/{choice}/{position}".encode(), digest_size=8).digest()
    return BYTES[int.from_bytes(digest) % len(BYTES)]


def expected(seed: int, choice: int, params: SamplingParams) -> tuple[list[int], str, str]:
    """(ids, text, finish reason) of a choice nothing happens to: the oracle."""
    assert params.max_tokens is not None
    decoder, text = codecs.getincrementaldecoder("utf-8")("replace"), ""
    ids = []
    for position in range(params.max_tokens):
        ids.append(token(seed, choice, position))
        text += decoder.decode(bytes(ids[-1:]), final=position == params.max_tokens - 1)
        found = min((text.index(stop) for stop in params.stop if stop in text), default=None)
        if found is not None:
            return ids, text[:found], "stop"
    return ids, text, "length"


@dataclass
class Row:
    """What an engine runs for one choice."""

    epoch: int
    seed: int
    position: int
    max_tokens: int


@dataclass
class Engine:
    replica: int
    incarnation: int
    link: int
    rows: dict[tuple[str, int], Row] = field(default_factory=dict)
    is_dead: bool = False
    hung_until: float = 0.0
    mute_until: float = 0.0


@dataclass
class Reader:
    """A client that follows one life of a job."""

    job: Job
    ids: list[list[int]]
    text: list[str]
    finishes: list[int]

    def read(self) -> None:
        for index, choice in enumerate(self.job.choices):
            if self.finishes[index]:
                continue
            for delta in choice.output.deltas_from(len(self.ids[index])):
                assert delta.first_position == len(self.ids[index])
                assert delta.text_offset == len(self.text[index].encode())
                self.ids[index] += delta.token_ids
                self.text[index] += delta.text_delta
                self.finishes[index] += delta.finish is not None

    def compare(self) -> None:
        """Equal to the oracle, or the start of it where the job was ended on purpose."""
        request = self.job.request
        for index, choice in enumerate(self.job.choices):
            ids, text, reason = expected(request.seed, index, request.params)
            assert choice.finish is not None
            assert self.finishes[index] == 1
            if choice.finish.reason in ("cancelled", "deadline"):
                assert self.ids[index] == ids[: len(self.ids[index])]
                continue
            assert (self.ids[index], self.text[index], choice.finish.reason) == (ids, text, reason), request


class World:
    """One seeded run: `run()` raises AssertionError when a promise is broken."""

    def __init__(self, seed: int, *, faults: bool = True, num_replicas: int = 3, num_jobs: int = 12) -> None:
        self.rng = random.Random(seed)
        self.now = 0.0
        self.faults = faults
        self.trace: list[str] = []
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = count()
        self._links = count(1)
        self.core = Core(
            CoreConfig(max_queue=10_000, max_choices=24, retain_s=0.15, retain_jobs=3, detach_grace_s=0.3),
            partial(choice_outputs, ByteTokenizer()),
        )
        self.engines: dict[int, Engine] = {}  # by link
        self.incarnations = dict.fromkeys(range(num_replicas), 0)
        self.harmed: set[tuple[int, int]] = set()
        self.readers: list[Reader] = []
        self.num_faults = 0
        self.quiet_at = 6.0 if faults else 0.0
        for replica in self.incarnations:
            self.start_replica(replica)
        for number in range(num_jobs):
            self.at(self.rng.uniform(0, 4), partial(self.client, f"job-{number % (num_jobs * 3 // 4)}"))
        self.at(0, self.tick)
        if faults:
            self.at(0.5, self.fault)

    def at(self, when: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (when, next(self._serial), action))

    def after(self, low: float, high: float, action: Callable[[], None]) -> None:
        self.at(self.now + self.rng.uniform(low, high), action)

    def run(self, until: float = 45.0) -> None:
        while self._queue and self._queue[0][0] <= until:
            self.now, _, action = heapq.heappop(self._queue)
            action()
            if self.now > self.quiet_at + 4 and self.core.num_live == 0:
                break
        for job in self.core.jobs.values():
            assert job.state == "finished", (
                f"{job.request.request_id} is {job.state} on {job.replica} at {self.now:.1f}"
            )
        for reader in self.readers:
            reader.read()
            reader.compare()

    def handle(self, event: ev.Event) -> None:
        self.trace.append(f"{self.now:.4f} {event}")
        effects = self.core.handle(event, self.now)
        self.core.check()
        for effect in effects:
            self.act(effect)

    def act(self, effect: ev.Effect) -> None:
        match effect:
            case ev.Send(link, frame):
                # Controller to engine: in order, one delay per link.
                self.at(self.now + 0.001 + link % 5 / 1000, partial(self.deliver, link, frame))
            case ev.Close(link):
                self.after(0.01, 1.0, partial(self.end_link, link))
            case ev.Reclaim(replica, incarnation, cause):
                assert (replica, incarnation) in self.harmed, f"healthy incarnation {incarnation} fenced: {cause}"
                self.after(0.1, 2.0, partial(self.restart, replica, incarnation))

    # Engines

    def start_replica(self, replica: int) -> None:
        self.incarnations[replica] += 1
        incarnation = self.incarnations[replica]
        self.handle(ev.ReplicaStarting(replica, incarnation))
        self.after(0.05, 0.5, partial(self.dial, replica, incarnation))

    def dial(self, replica: int, incarnation: int) -> None:
        link = next(self._links)
        self.engines[link] = engine = Engine(replica, incarnation, link)
        hello = Hello(VERSION, replica, incarnation, "plan", 4096, 4096, 100, 16, 1, {}, [])
        self.handle(ev.FrameReceived(link, hello))
        self.at(self.now, partial(self.step, engine))
        self.at(self.now, partial(self.beat, engine))

    def restart(self, replica: int, incarnation: int) -> None:
        for engine in list(self.engines.values()):
            if (engine.replica, engine.incarnation) == (replica, incarnation):
                self.kill(engine)
        if self.incarnations[replica] == incarnation:
            self.start_replica(replica)

    def kill(self, engine: Engine) -> None:
        engine.is_dead = True
        self.harmed.add((engine.replica, engine.incarnation))
        if engine.link in self.engines:
            # The end of a link may overtake its last frames, and may come after the successor's Hello.
            self.after(0.0, 1.5, partial(self.end_link, engine.link))

    def end_link(self, link: int) -> None:
        if self.engines.pop(link, None) is not None:
            self.handle(ev.LinkLost(link, "connection reset"))

    def deliver(self, link: int, frame: object) -> None:
        engine = self.engines.get(link)
        if engine is None or engine.is_dead:
            return
        match frame:
            case Place():
                for choice, packed in enumerate(frame.outputs):
                    if packed is not None:
                        assert unpack_ids(packed) == [token(frame.seed, choice, i) for i in range(len(packed) // 4)]
                        assert frame.params.max_tokens is not None
                        row = Row(frame.epoch, frame.seed, len(packed) // 4, frame.params.max_tokens)
                        engine.rows[frame.job, choice] = row
            case Abort():
                # The row of a step that is already under way still goes out.
                self.after(0.0, 0.05, partial(self.drop, engine, frame))
            case Shutdown():
                self.harmed.add((engine.replica, engine.incarnation))

    def drop(self, engine: Engine, abort: Abort) -> None:
        for (job, choice), row in list(engine.rows.items()):
            if job == abort.job and row.epoch == abort.epoch and abort.choice in (-1, choice):
                del engine.rows[job, choice]

    def step(self, engine: Engine) -> None:
        if engine.is_dead:
            return
        self.at(max(self.now + STEP_S * self.rng.uniform(0.5, 2), engine.hung_until), partial(self.step, engine))
        rows = []
        for (job, choice), row in list(engine.rows.items()):
            size = min(self.rng.choice((0, 1, 1, 1, 2, 4)), row.max_tokens - row.position)
            ids = [token(row.seed, choice, row.position + i) for i in range(size)]
            is_last = row.position + size == row.max_tokens
            if size or self.faults:
                finish = "length" if is_last else None
                rows.append(TokenRow(job, row.epoch, choice, row.position, ids, finish=finish))
            row.position += size
            if is_last:
                del engine.rows[job, choice]
        if rows:
            self.post(engine, TokenEvents(0, rows))

    def beat(self, engine: Engine) -> None:
        if engine.is_dead:
            return
        quiet_until = max(engine.hung_until, engine.mute_until)
        self.at(max(self.now + HEARTBEAT_S, quiet_until), partial(self.beat, engine))
        if self.now >= quiet_until:
            self.post(engine, Heartbeat(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0))

    def post(self, engine: Engine, frame: TokenEvents | Heartbeat) -> None:
        """Engine to controller: with faults, any order and sometimes twice; frames outlive their sender and link."""
        arrivals = [self.now + self.rng.uniform(0.001, 0.005)]
        if self.faults:
            arrivals[0] += self.rng.choice((0.0, 0.0, 0.0, 0.05))
            if self.rng.random() < 0.15:
                arrivals.append(arrivals[0] + self.rng.uniform(0.0, 0.5))
                self.num_faults += 1
        for arrival in arrivals:
            self.at(arrival, partial(self.handle, ev.FrameReceived(engine.link, frame)))

    # Clients

    def client(self, request_id: str) -> None:
        rng = self.rng
        stop = rng.sample(("ab", "a a", "baa", "\u00e9", "bb "), rng.choice((0, 0, 1, 2)))
        params = SamplingParams(n=rng.choice((1, 1, 2, 3)), max_tokens=rng.randint(1, 120), stop=tuple(stop))
        prompt = pack_ids([rng.randint(0, 255)])
        request = JobRequest(
            request_id=request_id,
            digest=body_digest(prompt, params, 0),
            prompt_token_ids=prompt,
            params=params,
            seed=rng.getrandbits(64),
            priority=rng.choice((0, 0, 1)),
            deadline_s=rng.uniform(0.1, 3) if rng.random() < 0.1 else None,
            on_disconnect=rng.choice(("detach", "detach", "cancel_after_grace")),
        )
        try:
            self.handle(ev.Submit(request))
        except DuplicateRequestError:
            # The id is taken: end that job, and use the id again as soon as the controller has forgotten it.
            self.handle(ev.Cancel(request_id))
            self.after(0.0, 0.3, partial(self.client, request_id))
            return
        if rng.random() < 0.3:
            self.handle(ev.Submit(request))
        job = self.core.jobs[request_id]
        reader = Reader(job, [[] for _ in job.choices], ["" for _ in job.choices], [0 for _ in job.choices])
        self.readers.append(reader)
        self.at(self.now, partial(self.read, reader))
        if rng.random() < 0.2:
            self.after(0.05, 0.8, partial(self.cancel, request_id))
        if rng.random() < 0.3:
            self.after(0.05, 0.8, partial(self.attach_a_while, request_id))

    def read(self, reader: Reader) -> None:
        reader.read()
        if not all(reader.finishes):
            self.at(self.now + READ_S, partial(self.read, reader))

    def cancel(self, request_id: str) -> None:
        if request_id in self.core.jobs:
            self.handle(ev.Cancel(request_id))

    def attach_a_while(self, request_id: str) -> None:
        try:
            self.handle(ev.Attach(request_id))
        except UnknownRequestError:
            return
        self.after(0.0, 0.2, partial(self.handle, ev.Detach(request_id)))

    def tick(self) -> None:
        self.at(self.now + TICK_S, self.tick)
        self.handle(ev.Tick())

    # Faults

    def fault(self) -> None:
        if self.now > self.quiet_at:
            return
        self.after(0.05, 0.6, self.fault)
        engines = [engine for engine in self.engines.values() if not engine.is_dead]
        if not engines:
            return
        self.num_faults += 1
        engine = self.rng.choice(engines)
        who = engine.replica, engine.incarnation
        match self.rng.choice(("kill", "hang", "mute", "cut", "blink", "replace", "redial", "supervisor")):
            case "kill":
                self.kill(engine)
                self.after(0.0, 3.0, partial(self.restart, *who))
            case "hang":
                # A zombie: frozen past its lease, then it goes on with all it had.
                self.harmed.add(who)
                engine.hung_until = self.now + self.rng.choice((2.3, 4.0, 1e6))
            case "mute":
                self.harmed.add(who)
                engine.mute_until = self.now + self.rng.uniform(2.3, 4)
            case "cut":
                self.harmed.add(who)
                self.end_link(engine.link)
            case "blink":
                # Short of the lease, with a heartbeat between two of them: nothing may come of it.
                if self.now > engine.hung_until + 2 * HEARTBEAT_S:
                    engine.hung_until = self.now + self.rng.uniform(0.1, 1.2)
            case "replace":
                # Back faster than anybody noticed that it was away.
                self.kill(engine)
                self.restart(*who)
            case "redial":
                # An old incarnation, or this one a second time, dials again.
                self.dial(engine.replica, self.rng.randint(1, engine.incarnation))
            case "supervisor":
                self.handle(ev.SupervisorUp())

"""Single decisions of the controller core, with a clock and engines made of tuples (well under a second)."""

from functools import partial

import pytest

from phalanx.errors import DuplicateRequestError, OverloadedError, UnavailableError, UnknownRequestError
from phalanx.runtime.controller import events as ev
from phalanx.runtime.controller.core import Core, CoreConfig
from phalanx.runtime.controller.jobs import Finish, JobRequest, body_digest, pack_ids, unpack_ids
from phalanx.runtime.frames import (
    VERSION,
    Abort,
    Failed,
    FinishReason,
    Heartbeat,
    Hello,
    Place,
    Shutdown,
    TokenEvents,
    TokenLogprobs,
    TokenRow,
    Welcome,
)
from phalanx.runtime.output import choice_outputs
from phalanx.runtime.sampling_params import SamplingParams
from tests.runtime.controller.world import ByteTokenizer

BEAT = Heartbeat(1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0)


class Bench:
    """A core under test; `check` runs after every event."""

    def __init__(self, **config: float) -> None:
        self.now = 100.0
        self.core = Core(CoreConfig(**config), partial(choice_outputs, ByteTokenizer()))

    def __call__(self, event: ev.Event, later: float = 0.0) -> list[ev.Effect]:
        self.now += later
        effects = self.core.handle(event, self.now)
        self.core.check()
        return effects

    def submit(self, request_id: str = "a", prompt: int = 1, **given: object) -> list[ev.Effect]:
        params = SamplingParams(**{"max_tokens": 8, **given.pop("params", {})})
        packed = pack_ids([prompt])
        digest = body_digest(packed, params, 0)
        request = JobRequest(
            request_id=request_id, digest=digest, prompt_token_ids=packed, params=params, seed=7, **given
        )
        return self(ev.Submit(request))

    def hello(self, link: int = 1, replica: int = 0, incarnation: int = 1, **given: object) -> list[ev.Effect]:
        fields: dict[str, object] = {"version": VERSION, "fingerprint": "p", "max_request_tokens": 100} | given
        hello = Hello(
            replica=replica,
            incarnation=incarnation,
            max_model_len=100,
            num_blocks=9,
            block_size=16,
            dp_size=1,
            startup_s={},
            ranks=[],
            **fields,
        )
        return self(ev.FrameReceived(link, hello))

    def row(
        self, ids: bytes, position: int = 0, choice: int = 0, job: str = "a", link: int = 1, **given: object
    ) -> list[ev.Effect]:
        epoch = given.pop("epoch", self.core.jobs[job].epoch if job in self.core.jobs else 0)
        row = TokenRow(job, epoch, choice, position, list(ids), **given)
        return self(ev.FrameReceived(link, TokenEvents(1, [row])))

    def ids(self, job: str = "a", choice: int = 0) -> bytes:
        return bytes(list(self.core.jobs[job].choices[choice].output.token_ids))

    def reason(self, job: str = "a", choice: int = 0) -> FinishReason | None:
        finish = self.core.jobs[job].choices[choice].finish
        return None if finish is None else finish.reason


def sent(effects: list[ev.Effect], link: int = 1) -> list[object]:
    return [effect.frame for effect in effects if isinstance(effect, ev.Send) and effect.link == link]


def test_life_of_a_job() -> None:
    bench = Bench()
    assert sent(bench.hello()) == [Welcome(VERSION, 1)]
    (place,) = sent(bench.submit(priority=3))
    assert isinstance(place, Place)
    assert (place.job, unpack_ids(place.prompt_token_ids), place.outputs, place.seed, place.priority) == (
        "a",
        [1],
        [b""],
        7,
        3,
    )
    assert ev.Changed("a") in bench.row(b"hi", num_cached_tokens=1)
    bench.row(b"!", 2, finish="length")
    assert bench.core.jobs["a"].choices[0].finish == Finish("length", None, None, 1, 1, 3)
    assert bench.core.jobs["a"].choices[0].output.text == "hi!"
    assert bench.core.num_live == 0
    assert bench.core.replicas[0].num_choices == 0
    assert bench.core.meters.request_duration_s.counts[0] == 1


def test_submit_is_idempotent() -> None:
    bench = Bench()
    bench.hello()
    assert len(sent(bench.submit())) == 1
    assert bench.submit(deadline_s=5.0, on_disconnect="cancel") == []
    for other in ({"prompt": 2}, {"params": {"top_k": 1}}):
        with pytest.raises(DuplicateRequestError, match="'a'"):
            bench.submit(**other)
    assert bench.core.meters.rejected["duplicate"] == 2
    bench.row(b"x", finish="stop")
    assert bench.submit() == []
    assert bench.reason() == "stop"


def test_logit_bias_order_does_not_make_another_body() -> None:
    one, two = SamplingParams(logit_bias={1: 1.0, 2: 2.0}), SamplingParams(logit_bias={2: 2.0, 1: 1.0})
    assert body_digest(b"", one, 0) == body_digest(b"", two, 0)
    assert body_digest(b"", one, 0) != body_digest(b"", one, 1)


def test_queue() -> None:
    bench = Bench(max_queue=2)
    bench.submit("low", priority=5)
    bench.submit("high", priority=-1)
    with pytest.raises(OverloadedError, match="2 requests wait"):
        bench.submit("more")
    assert [place.job for place in sent(bench.hello())[1:]] == ["high", "low"]


def test_a_replica_takes_so_many_choices() -> None:
    bench = Bench(max_choices=3)
    bench.hello()
    bench.submit("a", params={"n": 2})
    bench.submit("b", params={"n": 2})
    assert sent(bench.submit("c")) == []
    assert sent(bench.row(b"x", job="a", choice=0, finish="stop")) == []
    assert [place.job for place in sent(bench.row(b"x", job="a", choice=1, finish="stop"))] == ["c"]


def test_jobs_spread_by_what_was_placed() -> None:
    bench = Bench()
    bench.hello(1, 0)
    bench.hello(2, 1)
    effects = [effect for number in range(4) for effect in bench.submit(f"job-{number}")]
    assert [effect.link for effect in effects if isinstance(effect, ev.Send)] == [1, 2, 1, 2]


def test_lost_replica_gives_its_jobs_away_with_what_they_have() -> None:
    bench = Bench()
    bench.hello(1, 0)
    bench.submit(params={"n": 2})
    bench.row(b"abc")
    bench.row(b"xy", choice=1, finish="stop")
    bench.hello(2, 1)
    effects = bench(ev.LinkLost(1, "reset"))
    (place,) = sent(effects, 2)
    assert isinstance(place, Place)
    assert place.outputs == [pack_ids(b"abc"), None]
    assert ev.Reclaim(0, 1, "link") in effects
    assert bench.core.meters.migrations["link"] == 1
    bench.row(b"d", 3, link=2, finish="length")
    assert bench.ids() == b"abcd"


def test_rows_of_another_life_of_an_id_are_dropped() -> None:
    bench = Bench(retain_jobs=0)
    bench.hello()
    bench.submit("a")
    old = bench.core.jobs["a"].epoch
    bench(ev.Cancel("a"))
    bench(ev.Tick())
    bench.submit("a", prompt=2)
    bench.row(b"old", epoch=old)
    bench.row(b"x", choice=5)
    assert bench.ids() == b""
    assert bench.core.meters.fenced["epoch"] == 2
    bench.row(b"new")
    assert bench.ids() == b"new"


def test_positions() -> None:
    bench = Bench()
    bench.hello()
    bench.submit()
    bench.row(b"ab")
    bench.row(b"ab")  # again
    bench.row(b"bc", 1)  # half of it known
    bench.row(b"ef", 4, finish="length")  # ahead
    bench.row(b"", 4)
    assert (bench.ids(), bench.reason()) == (b"abc", None)
    bench.row(b"d", 3)
    assert (bench.ids(), bench.reason()) == (b"abcdef", "length")
    bench.row(b"g", 6)
    assert bench.ids() == b"abcdef"
    assert bench.core.meters.fenced == {"position": 1, "finished": 1}


def test_an_early_finish_of_a_repeated_row_does_not_count() -> None:
    bench = Bench()
    bench.hello()
    bench.submit()
    bench.row(b"abc")
    bench.row(b"a", finish="stop")
    assert bench.reason() is None
    bench.row(b"bc", 1, finish="stop")
    assert (bench.ids(), bench.reason()) == (b"abc", "stop")


def test_a_gap_that_stays_moves_the_job() -> None:
    bench = Bench(lease_s=2.0)
    bench.hello()
    bench.submit()
    first = bench.core.jobs["a"].epoch
    bench.row(b"b", 1)
    bench(ev.FrameReceived(1, BEAT), later=1.9)
    assert sent(bench(ev.Tick())) == []
    bench(ev.FrameReceived(1, BEAT))
    abort, place = sent(bench(ev.Tick(), later=0.2))
    assert abort == Abort("a", first)
    assert isinstance(place, Place)
    assert place.epoch > first
    bench.row(b"a", epoch=first)
    assert bench.ids() == b""
    bench.row(b"ab")
    assert bench.ids() == b"ab"


def test_stop_string_is_decided_here() -> None:
    bench = Bench()
    bench.hello()
    bench.submit(params={"stop": ("cd",), "n": 2})
    assert sent(bench.row(b"abc")) == []
    assert sent(bench.row(b"de", 3)) == [Abort("a", bench.core.jobs["a"].epoch, 0)]
    choice = bench.core.jobs["a"].choices[0]
    assert (bench.ids(), choice.output.text) == (b"abcd", "ab")
    assert choice.finish == Finish("stop", "cd", None, 1, 0, 4)
    assert bench.core.replicas[0].num_choices == 1


def test_a_row_that_cannot_be_ends_its_choice_only() -> None:
    bench = Bench()
    bench.hello()
    bench.submit(params={"n": 2})
    bench.submit("b", params={"logprobs": 1})
    bench(ev.FrameReceived(1, TokenEvents(1, [TokenRow("a", bench.core.jobs["a"].epoch, 0, 0, [-1])])))
    assert bench.reason() == "error"
    assert "unsigned" in str(bench.core.jobs["a"].choices[0].finish)
    bench.row(b"ok", choice=1, finish="length")
    bench.row(b"xy", job="b", logprobs=[TokenLogprobs(120, -1.0, 1, [], [])])
    assert bench.reason("b") == "error"
    assert bench.core.num_live == 0


def test_engine_refuses() -> None:
    bench = Bench()
    bench.hello()
    bench.submit()
    bench.row(b"", finish="error", error="too big")
    assert bench.core.jobs["a"].choices[0].finish == Finish("error", None, "too big", 1, 0, 0)


def test_prompt_logprobs_come_once() -> None:
    bench = Bench()
    bench.hello()
    bench.submit()
    entries = [TokenLogprobs(1, -1.0, 1, [], [])]
    bench.row(b"a", prompt_logprobs=entries, num_cached_tokens=1)
    bench.row(b"b", 1, prompt_logprobs=[], num_cached_tokens=0)
    choice = bench.core.jobs["a"].choices[0]
    assert (choice.prompt_logprobs, choice.num_cached_tokens) == (entries, 1)


@pytest.mark.parametrize("placed", [True, False])
def test_deadline_ends_a_job_wherever_it_is(placed: bool) -> None:
    bench = Bench()
    if placed:
        bench.hello()
    bench.submit(deadline_s=1.0)
    epoch = bench.core.jobs["a"].epoch
    if placed:
        bench.row(b"abc")
    assert bench(ev.Tick(), later=0.9) == []
    effects = bench(ev.Tick(), later=0.2)
    assert bench.reason() == "deadline"
    assert sent(effects) == ([Abort("a", epoch)] if placed else [])
    assert bench.ids() == (b"abc" if placed else b"")


def test_cancel() -> None:
    bench = Bench()
    bench.hello()
    bench.submit()
    bench.row(b"a")
    assert len(sent(bench(ev.Cancel("a")))) == 1
    assert bench(ev.Cancel("a")) == []
    assert bench.reason() == "cancelled"
    with pytest.raises(UnknownRequestError, match="'nope'"):
        bench(ev.Cancel("nope"))


def test_readers() -> None:
    bench = Bench(detach_grace_s=5.0)
    bench.hello()
    for policy in ("cancel", "cancel_after_grace", "detach"):
        bench.submit(policy, on_disconnect=policy)
        bench(ev.Attach(policy))
        bench(ev.Attach(policy))
        bench(ev.Detach(policy))
        assert bench.reason(policy) is None
        bench(ev.Detach(policy))
    assert bench.reason("cancel") == "cancelled"
    bench(ev.FrameReceived(1, BEAT), later=4.9)
    bench(ev.Attach("cancel_after_grace"))
    bench(ev.Tick(), later=0.2)
    assert bench.reason("cancel_after_grace") is None
    bench(ev.Detach("cancel_after_grace"))
    bench(ev.FrameReceived(1, BEAT))
    bench(ev.Tick(), later=5.1)
    assert bench.reason("cancel_after_grace") == "cancelled"
    assert bench.reason("detach") is None
    for _ in range(4):
        bench(ev.Attach("detach"))
    with pytest.raises(OverloadedError, match="4 readers"):
        bench(ev.Attach("detach"))


def test_finished_jobs_are_kept_for_a_while() -> None:
    bench = Bench(retain_s=10.0, retain_jobs=2)
    for name in "abc":
        bench.submit(name)
        bench(ev.Cancel(name))
    bench(ev.Attach("a"))  # being read: stays
    bench(ev.Tick())
    assert sorted(bench.core.jobs) == ["a", "c"]
    bench(ev.Tick(), later=11)
    assert sorted(bench.core.jobs) == ["a"]
    bench(ev.Detach("a"))
    bench(ev.Tick())
    assert not bench.core.jobs
    with pytest.raises(UnknownRequestError, match="10 s"):
        bench.core.job("a")


def test_lease_runs_from_the_last_heartbeat() -> None:
    bench = Bench()
    bench.hello()
    for _ in range(10):
        bench(ev.FrameReceived(1, BEAT), later=0.4)
        bench.row(b"", job="none")
        assert bench(ev.Tick()) == []
    for _ in range(4):
        bench.row(b"", job="none")  # tokens alone prove nothing: the heartbeat has a thread of its own
        effects = bench(ev.Tick(), later=0.4)
    assert effects == []
    effects = bench(ev.Tick(), later=0.41)
    assert [type(effect) for effect in effects] == [ev.Send, ev.Close, ev.Reclaim]
    assert isinstance(sent(effects)[0], Shutdown)
    assert bench.core.replicas[0].state == "lost"
    bench(ev.FrameReceived(1, BEAT))
    assert bench.core.meters.fenced["incarnation"] == 1
    assert bench(ev.LinkLost(1, "reset")) == []


def test_a_controller_that_slept_judges_nobody() -> None:
    bench = Bench()
    bench.hello()
    bench(ev.Tick())
    assert bench(ev.Tick(), later=60.0) == []
    assert bench.core.replicas[0].state == "ready"


def test_hello_rules() -> None:
    bench = Bench()
    bench(ev.ReplicaStarting(0, 5))
    assert "is fenced" in sent(bench.hello(1, incarnation=4))[0].reason
    assert sent(bench.hello(2, incarnation=5), 2) == [Welcome(VERSION, 5)]
    assert "used once" in sent(bench.hello(3, incarnation=5), 3)[0].reason
    assert "second Hello" in sent(bench.hello(2, incarnation=6), 2)[0].reason
    assert "version 9" in sent(bench.hello(4, incarnation=6, version=9), 4)[0].reason
    effects = bench.hello(5, incarnation=6)
    assert ev.Close(2) in effects
    assert bench.core.meters.losses["replaced"] == 1
    assert bench(ev.ReplicaStarting(0, 6)) == [ev.Start(0, 6, None)]
    bench(ev.ReplicaStarting(0, 7))
    assert (bench.core.replicas[0].state, bench.core.is_ready) == ("starting", False)
    bench(ev.FrameReceived(77, BEAT))
    assert bench.core.meters.fenced == {"hello": 4, "incarnation": 1}


def test_last_words() -> None:
    bench = Bench()
    bench.hello()
    effects = bench(ev.FrameReceived(1, Failed(2, "n1", "/log", "boom")))
    assert ev.Reclaim(0, 1, "failed") in effects
    assert bench.core.replicas[0].error == "rank 2 on n1, log /log:\nboom"
    # The supervisor has not answered yet: a new one is asked again, until the processes are gone.
    assert bench(ev.SupervisorUp()) == [ev.Reclaim(0, 1, "failed")]
    bench(ev.ReplicaGone(0, 0, "exit", "an older one"))
    assert bench(ev.SupervisorUp()) == [ev.Reclaim(0, 1, "failed")]
    bench(ev.ReplicaGone(0, 1, "sigkill", "gone"))
    assert bench(ev.SupervisorUp()) == []
    assert bench.core.replicas[0].error == "gone"


def test_replica_that_never_connected() -> None:
    bench = Bench()
    bench(ev.ReplicaGone(4, 2, "startup", "no weights"))
    assert (bench.core.replicas[4].state, bench.core.replicas[4].error) == ("lost", "no weights")
    assert not bench.core.meters.losses
    assert "is fenced" in sent(bench.hello(1, 4, 1))[0].reason


def test_frames_of_the_wrong_direction_are_counted() -> None:
    bench = Bench()
    bench.hello()
    bench(ev.FrameReceived(1, Shutdown("you")))
    assert bench.core.meters.fenced["kind"] == 1


def test_a_job_continues_on_an_equal_plan_only() -> None:
    bench = Bench()
    bench.hello(1, 0, fingerprint="old")
    bench.submit("started")
    bench.submit("untouched")
    bench.row(b"x", job="started")
    bench.hello(2, 1, fingerprint="new")
    effects = bench(ev.LinkLost(1, "reset"))
    assert [place.job for place in sent(effects, 2)] == ["untouched"]
    assert [place.job for place in sent(bench.hello(3, 2, fingerprint="old"), 3)[1:]] == ["started"]


def test_drain() -> None:
    bench = Bench()
    bench.hello()
    bench.submit("a")
    assert bench(ev.Drain()) == []
    assert not bench.core.is_ready
    assert bench.submit("a") == []
    with pytest.raises(UnavailableError, match="draining"):
        bench.submit("b")
    assert ev.Drained() in bench.row(b"x", finish="stop")
    bench(ev.Drain(undo=True))
    assert bench.core.is_ready
    bench.submit("b")
    bench(ev.Cancel("b"))
    assert bench(ev.Drain()) == [ev.Drained()]


def test_cancelled_text_lets_go_of_what_was_withheld() -> None:
    bench = Bench()
    bench.hello()
    bench.submit(params={"stop": ("abc",)})
    bench.row(b"xab")
    output = bench.core.jobs["a"].choices[0].output
    assert output.text == "x"
    bench(ev.Cancel("a"))
    assert output.text == "xab"

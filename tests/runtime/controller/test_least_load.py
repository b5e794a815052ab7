"""Placement by least load (milliseconds)."""

import random

from phalanx.runtime.policies.least_load import Decision, PlacementView, ReplicaLoad, decide


def load(replica: int, **given: object) -> ReplicaLoad:
    fields: dict[str, object] = {
        "fingerprint": "p",
        "num_choices": 0,
        "num_prompt_tokens": 0,
        "max_choices": 8,
        "max_request_tokens": 100,
    }
    return ReplicaLoad(replica, **fields | given)


def choose(*loads: ReplicaLoad, num_tokens: int = 10, fingerprint: str | None = None) -> int | None:
    return decide(PlacementView(num_tokens, fingerprint, loads), 0.0).replica


def test_order_of_reasons() -> None:
    assert choose() is None
    assert choose(load(0), load(1)) == 0
    assert choose(load(0, num_prompt_tokens=1), load(1)) == 1
    assert choose(load(0, num_choices=1), load(1, num_prompt_tokens=99)) == 1


def test_full_replicas_wait() -> None:
    assert choose(load(0, num_choices=8)) is None
    assert choose(load(0, num_choices=8), load(1, num_choices=7)) == 1


def test_only_an_equal_plan_continues() -> None:
    assert choose(load(0, fingerprint="a"), load(1, fingerprint="b"), fingerprint="b") == 1
    assert choose(load(0, fingerprint="a"), fingerprint="b") is None


def test_a_pool_that_is_too_small_is_the_last_choice() -> None:
    small = load(0, max_request_tokens=5)
    assert choose(small, load(1, num_choices=5)) == 1
    assert choose(small, load(1, num_choices=8)) is None  # waits for the one that fits
    assert choose(small) == 0  # its engine refuses with a sentence


def test_equals_a_slow_search() -> None:
    rng = random.Random(0)
    for _ in range(300):
        loads = tuple(
            load(i, num_choices=rng.randint(0, 8), num_prompt_tokens=rng.randint(0, 3), fingerprint=rng.choice("ab"))
            for i in range(rng.randint(0, 5))
        )
        wanted = rng.choice((None, "a", "b"))
        able = [one for one in loads if one.num_choices < 8 and wanted in (None, one.fingerprint)]
        able.sort(key=lambda one: (one.num_choices, one.num_prompt_tokens, one.replica))
        best = able[0].replica if able else None
        assert decide(PlacementView(10, wanted, loads), 0.0) == Decision(best)

"""Philox4x32-10 against the published known answers, and noise that is a function of its four numbers alone."""

import pytest
import torch

from phalanx.kernels.philox import gumbel, philox, to_unit

KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]) -> None:
    words = [torch.tensor([word], dtype=torch.int64) for word in (*counter, *key)]
    assert tuple(int(word) for word in philox(*words)) == expected


def test_unit_interval_is_open() -> None:
    unit = to_unit(torch.tensor([0, 0xFFFFFFFF], dtype=torch.int64))
    assert 0 < unit[0] < unit[1] < 1


def test_noise_is_a_function_of_seed_position_choice_and_token() -> None:
    ids = torch.arange(64)
    one = torch.ones(1, dtype=torch.int64)
    base = gumbel(ids, one * 5, one * 7, one * 2)
    shard = gumbel(ids[40:], one * 5, one * 7, one * 2)
    assert torch.equal(base[40:], shard)  # a vocabulary shard draws the same numbers
    for changed in ((6, 7, 2), (5, 8, 2), (5, 7, 3), (5 + 2**32, 7, 2), (-5, 7, 2)):
        seed, position, choice = (one * value for value in changed)
        assert (gumbel(ids, seed, position, choice) != base).sum() > 60


def test_noise_has_gumbel_moments() -> None:
    noise = gumbel(torch.arange(200_000), *(torch.tensor([value]) for value in (11, 3, 0))).double()
    # mean 0.57722, variance pi^2/6; five standard errors of 200,000 draws are 0.0143 and 0.04
    assert noise.mean() == pytest.approx(0.57722, abs=0.0143)
    assert noise.var() == pytest.approx(1.64493, abs=0.04)

"""The seal of expert rows on the move, in C++ and in torch. Milliseconds."""

import pytest
import torch
from torch import Tensor

from phalanx.kernels import row_seal
from phalanx.kernels.cpu import library
from phalanx.kernels.row_seal import COLUMNS, SEAL_BYTES, checksum, is_sound, seal


@pytest.fixture(params=["C++", "torch"])
def _implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(row_seal, "_cpp", lambda: None)
    elif library.load().handle is None:
        pytest.skip(library.load().reason)


both = pytest.mark.usefixtures("_implementation")


def by_words(row: Tensor) -> int:
    words = [int.from_bytes(row[i : i + 8].numpy().tobytes(), "little") for i in range(0, len(row), 8)]
    return sum(word * (2 * index + 1) for index, word in enumerate(words)) % 2**64


def random_row(num_words: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (8 * num_words,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@both
@pytest.mark.parametrize("num_words", [1, 7, COLUMNS, COLUMNS + 1, 3 * COLUMNS + 5])
def test_the_definition(num_words: int) -> None:
    row = random_row(num_words, seed=num_words)
    sealed = seal(row, 5, 3)
    assert torch.equal(sealed[:-SEAL_BYTES], row)
    words = [int.from_bytes(sealed[i : i + 8].numpy().tobytes(), "little") for i in (-24, -16)]
    assert words == [by_words(row), 5]
    assert sealed[-8:].tolist() == [3, 0, 0, 0, 0, 0, 0, 0]
    assert int(checksum(row)) % 2**64 == by_words(row)
    assert is_sound(sealed, 5, 3)


@both
def test_no_flipped_bit_goes_unseen() -> None:
    sealed = seal(random_row(6), 1, 2)
    for byte in range(len(sealed)):
        for bit in range(8):
            sealed[byte] ^= 1 << bit
            assert not is_sound(sealed, 1, 2)
            sealed[byte] ^= 1 << bit
    assert is_sound(sealed, 1, 2)


@both
def test_another_expert_or_layer_is_refused() -> None:
    sealed = seal(random_row(6), 1, 2)
    assert not is_sound(sealed, 2, 2)
    assert not is_sound(sealed, 1, 1)


@both
def test_order_counts() -> None:
    row = torch.arange(64, dtype=torch.uint8)
    sealed = seal(row, 0, 0)
    sealed[:-SEAL_BYTES] = row.view(-1, 8).flip(0).reshape(-1)
    assert not is_sound(sealed, 0, 0)

"""The checksum of expert rows on the move. Milliseconds."""

import pytest
import torch

from phalanx.runtime.rank_experts import COLUMNS, _checksum


def by_words(row: torch.Tensor) -> int:
    words = [int.from_bytes(row[i : i + 8].numpy().tobytes(), "little") for i in range(0, len(row), 8)]
    return sum(word * (2 * index + 1) for index, word in enumerate(words)) % 2**64


@pytest.mark.parametrize("num_words", [1, 7, COLUMNS, COLUMNS + 1, 3 * COLUMNS + 5])
def test_the_definition(num_words: int) -> None:
    row = torch.randint(0, 256, (8 * num_words,), dtype=torch.uint8, generator=torch.Generator().manual_seed(num_words))
    assert _checksum(row) == by_words(row)


def test_no_flipped_bit_goes_unseen() -> None:
    row = torch.randint(0, 256, (8 * 6,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    sound = _checksum(row)
    for byte in range(len(row)):
        for bit in range(8):
            row[byte] ^= 1 << bit
            assert _checksum(row) != sound
            row[byte] ^= 1 << bit
    assert _checksum(row) == sound


def test_order_counts() -> None:
    row = torch.arange(64, dtype=torch.uint8)
    assert _checksum(row) != _checksum(row.view(-1, 8).flip(0).reshape(-1))

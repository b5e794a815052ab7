"""Philox4x32-10 and the noise of a sampled token: a pure function of (seed, position, choice, token id).

Counter words: token id, position, choice, purpose; key words: low and high half of the seed; result word 0.
Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011); Random123.
"""

from enum import IntEnum

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
MASK = 0xFFFFFFFF


class Purpose(IntEnum):
    """What a random number is for; counter word 3, so that two uses never share a number."""

    SAMPLE = 0
    SPECULATIVE_ACCEPT = 1
    RESIDUAL = 2


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: Tensor, k1: Tensor) -> tuple[Tensor, ...]:
    """Ten rounds; all arguments int64 tensors holding 32-bit values, broadcast together; returns four such words."""
    for _ in range(10):
        high0, low0 = _multiply(c0, MULTIPLIERS[0])
        high1, low1 = _multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + KEY_STEPS[0]) & MASK, (k1 + KEY_STEPS[1]) & MASK
    return c0, c1, c2, c3


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    # int64 has no room for the unsigned 64-bit product, so it is made of two products with 16-bit halves of a.
    low, high = (a & 0xFFFF) * b, (a >> 16) * b
    middle = high + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def to_unit(bits: Tensor) -> Tensor:
    """Map 32-bit words to fp32 strictly inside (0, 1); with one more bit the largest would round to 1."""
    return ((bits >> 9).float() + 0.5) * 2.0**-23


def gumbel(token_ids: Tensor, seeds: Tensor, positions: Tensor, choices: Tensor) -> Tensor:
    """Gumbel noise of tokens, fp32; arguments broadcast.

    Args:
        token_ids: int64 *global* vocabulary ids; a vocabulary shard must not change them.
        seeds: int64, all 64 bits used.
        positions: index of the token in the output of its choice.
        choices: which of the n completions of the request.
    """
    purpose = torch.zeros((), dtype=torch.int64, device=token_ids.device) + int(Purpose.SAMPLE)
    words = (token_ids, positions.long(), choices.long(), purpose, seeds & MASK, (seeds >> 32) & MASK)
    return -torch.log(-torch.log(to_unit(philox(*words)[0])))

"""What the dispatchers put on real sockets between nodes, as the emulator counts it. About 20 s.

Times are compared by `benchmarks/alltoall.py`; they are no matter for a test.
"""

import pytest

from benchmarks.dispatch_ranks import KINDS, Case, Setting, emulated_bytes, on_ranks
from tests.netlab.emulator import LinkSpec
from tests.netlab.lab import Lab, why_not

pytestmark = [
    pytest.mark.network,
    pytest.mark.multi,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]

SETTING = Setting(2, 4, LinkSpec(), num_experts=256, top_k=8)
TOKENS = 256


def test_bytes_between_nodes() -> None:
    """2 nodes x 4 ranks, 256 experts, top 8: a copy per node against one per rank and one per choice."""
    plain, flat, two_hop = Case("flat", TOKENS, dedup=False), Case("flat", TOKENS), Case("two_hop", TOKENS)
    with Lab(2) as lab:
        emulated = {case: emulated_bytes(lab, SETTING, case) for case in (plain, flat, two_hop)}
        measured = on_ranks(lab, SETTING, tuple(emulated), 1)
    # What ranks handed over, and TCP/IP and gloo around it.
    for (case, num_bytes), payload in zip(emulated.items(), measured.node_bytes, strict=True):
        assert 1.0 < num_bytes / payload < 1.02, case
    assert emulated[flat] / emulated[two_hop] >= 2.6
    assert emulated[plain] / emulated[two_hop] >= 3.9
    assert measured.messages == [2 * 7, 2 * 7, 2 * (1 + 3)]


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_small_steps_on_three_nodes(tokens: int) -> None:
    """Results are checked on every rank; also without any token."""
    setting = Setting(3, 2, LinkSpec(delay_s=1e-3), num_experts=12, top_k=3)
    with Lab(3, link=setting.link) as lab:
        on_ranks(lab, setting, [Case(kind, tokens) for kind in KINDS], 3)

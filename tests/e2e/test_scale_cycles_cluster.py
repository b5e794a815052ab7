"""Ten times 2 -> 4 -> 3 -> 2 data-parallel ranks over two Ray nodes, under 16 streams that never end.

Every stream equals that of one undisturbed rank; nothing is left open. About 70 s on two quiet cores.
"""

import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from tests.support.census import Census
from tests.support.deployment import deployed, pids, wait_until
from tests.support.scaling import FILE, NUM_STREAMS, Load, assert_only, follow, state, undisturbed

pytestmark = pytest.mark.slow

CYCLES = 10
SIZES = (4, 3, 2)


@pytest.fixture
def answers() -> list[list[int]]:
    return undisturbed()


@pytest.fixture
def census(answers: object) -> Iterator[Census]:
    with Census() as census:
        yield census


def test_cycles(census: Census, answers: list[list[int]], record_property: Callable[[str, object], None]) -> None:
    took_s: dict[int, list[float]] = {size: [] for size in SIZES}
    gap_s: dict[int, list[float]] = {size: [] for size in SIZES}
    with deployed(FILE, census) as deployment, deployment.client() as client, Load(client, answers) as load:

        def open_things() -> list[int]:
            """Descriptors and threads of the engine and of the rank that stays."""
            stays = [psutil.Process(pid) for pid in pids(state(client))[:2]]
            return [number for process in stays for number in (process.num_fds(), process.num_threads())]

        for cycle in range(CYCLES):
            for size in SIZES:
                load.longest_gap_s, began = 0.0, time.monotonic()
                operation = follow(client, f"{cycle} -> {size}", size)
                assert operation.phase == "DONE", operation
                took_s[size].append(time.monotonic() - began)
                if size == max(SIZES):
                    nodes = {line.split(" node ")[1].split()[0] for line in state(client).ranks[1:]}
                    assert len(nodes) == 2
                gap_s[size].append(load.longest_gap_s)
            assert_only(census, client, SIZES[-1])
            if cycle == 0:
                time.sleep(1.0)  # groups that were left are closed by then
                before = open_things()
        count = load.num_streams
        wait_until(lambda: load.num_streams >= count + NUM_STREAMS, 30, "streams after the last cycle")
        assert state(client).incarnation == 1
        wait_until(lambda: max(map(int.__sub__, open_things(), before)) <= 1, 10, f"no more than {before}")
    for size in SIZES:
        record_property("table", (f"{CYCLES} cycles", f"-> {size}", "done after", f"{max(took_s[size]):.2f} s"))
        record_property("table", (f"{CYCLES} cycles", f"-> {size}", "longest pause", f"{max(gap_s[size]):.2f} s"))

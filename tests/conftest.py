"""For all tests: one thread per process, no process left behind, tables of measured facts at the end of the output."""

import os

# Two busy cores are worse than one: OpenMP's threads spin while they wait for each other. Read when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Without a GPU Triton kernels run in its interpreter; read when Triton is imported, which transformers does.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Tests side by side, each on a core of its own, with all that they start. Ranks of one test share it: with hardly
# anything to compute, waking each other up costs them most, and does so across cores.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

import sys
from collections.abc import Iterator

import psutil
import pytest

GRACE_S = 3.0
"""A process whose end was ordered may take so long."""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    yield
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(1)  # a rank in this process may have set another number


@pytest.fixture(autouse=True)
def _no_process_left(_one_thread: None) -> Iterator[None]:
    """Fail a test that leaves processes behind, and end them; those of module and session fixtures may stay."""
    before = _children()
    yield
    left = _children() - before
    _, alive = psutil.wait_procs(left, GRACE_S)
    if alive:
        names = [_describe(process) for process in alive]
        for process in alive:
            process.kill()
        psutil.wait_procs(alive, GRACE_S)
        pytest.fail(f"the test left {len(alive)} processes behind: {'; '.join(names)}")


def _children() -> set[psutil.Process]:
    """Processes started by this one, or by its fork server; not what those start, such as the workers of a Ray node."""
    children = set()
    for child in psutil.Process().children():
        try:
            if _is_multiprocessing(child):
                children |= set(child.children())
            elif child.status() != psutil.STATUS_ZOMBIE:
                children.add(child)
        except psutil.NoSuchProcess:
            continue
    return children


def _is_multiprocessing(process: psutil.Process) -> bool:
    helpers = ("multiprocessing.forkserver", "multiprocessing.resource_tracker")
    return any(helper in argument for argument in process.cmdline() for helper in helpers)


def _describe(process: psutil.Process) -> str:
    try:
        return f"{process.pid} {' '.join(process.cmdline())[:120]}"
    except psutil.NoSuchProcess:
        return str(process.pid)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests recorded with `record_property("table", (title, row, column, cell))`, one table per title."""
    tables: dict[str, dict[str, dict[str, str]]] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", ()) if getattr(report, "when", "") == "call" else ():
                if name == "table":
                    title, row, column, cell = value
                    tables.setdefault(title, {}).setdefault(row, {})[column] = cell
    for title, rows in tables.items():
        terminalreporter.section(title)
        for line in _lines(rows):
            terminalreporter.line(line)


def _lines(rows: dict[str, dict[str, str]]) -> Iterator[str]:
    columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
    first = max(map(len, rows))
    widths = [max(len(column), *(len(cells.get(column, "")) for cells in rows.values())) for column in columns]
    for name, cells in {"": {column: column for column in columns}, **rows}.items():
        padded = [cells.get(column, "-").rjust(width) for column, width in zip(columns, widths, strict=True)]
        yield "  ".join([name.ljust(first), *padded])

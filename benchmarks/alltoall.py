"""The dispatchers beside each other on several hosts: time, bytes that leave a host, messages of a rank.

    python -m benchmarks.alltoall [compare] [grid] [held_out] [--rounds 20] [--json FILE]

Hosts are network namespaces joined by emulated links (tests/netlab; needs root and a TUN device), ranks are processes
that exchange over gloo; what they do is in `benchmarks/dispatch_ranks.py`. Kinds take turns; a time is the median of
rounds.

`compare` prints every kind at one size. Bytes are those the emulator counted, TCP/IP headers included, and in brackets
the payloads and counts that ranks handed over; messages are payloads of the busiest rank to other ranks, dispatch and
combine together.

`grid` and `held_out` calibrate the cost model on the links and print what `moe.dispatch: auto` settles on at several
sizes, against the best kind of each cell, of each setting, and overall. One thing was chosen after a look at
`held_out`: which layer sizes calibration measures.
"""

import argparse
import json
import os
import pathlib
import platform
import sys
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.dispatch_ranks import KINDS, WARM_UP, Case, Setting, emulated_bytes, on_ranks
from benchmarks.offline import cpu_name
from phalanx.parallel.costmodel import costs_from
from phalanx.runtime.dispatch_policy import SWITCH_STEPS, DispatchPolicy
from tests.netlab.emulator import LinkSpec
from tests.netlab.lab import Lab, why_not

COMPARED_TOKENS = 64
SLOW = LinkSpec(rate=25e6, delay_s=1e-3)
FAST = LinkSpec(rate=125e6, delay_s=0.1e-3)
PER_PACKET = LinkSpec(packet_s=0.3e-3)
COMPARED = (
    Setting(2, 4, SLOW),
    Setting(4, 2, SLOW),
    Setting(4, 2, PER_PACKET),
    Setting(2, 4, SLOW, num_experts=256, top_k=8),
)
GRID_TOKENS = (1, 8, 64, 256)
GRID = (Setting(2, 4, SLOW), Setting(4, 2, SLOW), Setting(4, 2, PER_PACKET), Setting(2, 4, FAST))
HELD_OUT_TOKENS = (2, 12, 96)
HELD_OUT = (
    Setting(2, 2, LinkSpec(rate=12.5e6, delay_s=3e-3), num_experts=16, top_k=2),
    Setting(3, 2, LinkSpec(rate=50e6, delay_s=0.5e-3), num_experts=48, top_k=6),
    Setting(2, 3, LinkSpec(rate=100e6, delay_s=0.2e-3, packet_s=0.05e-3), num_experts=60, top_k=4),
    Setting(2, 4, SLOW, num_experts=256, top_k=8),
)
Row = dict[str, Any]


def compare(setting: Setting, tokens: int, rounds: int) -> list[Row]:
    """One row per kind, also of flat as others have it: a copy for every choice."""
    cases = [Case("flat", tokens, dedup=False), *(Case(kind, tokens) for kind in KINDS)]
    with Lab(setting.num_nodes, link=setting.link) as lab:
        measured = on_ranks(lab, setting, cases, WARM_UP + rounds)
        sent = [emulated_bytes(lab, setting, case) for case in cases]
    rows = [
        {"kind": str(case), "ms": 1e3 * s, "node_kB": b / 1e3, "payload_kB": p / 1e3, "messages": m}
        for case, s, b, p, m in zip(cases, measured.seconds, sent, measured.node_bytes, measured.messages, strict=True)
    ]
    print(f"\n{setting}; {tokens} tokens per rank")
    print(f"{'':25}{'ms':>8}{'node kB':>16}{'messages':>10}{'time / two_hop':>16}{'bytes / two_hop':>17}")
    base = next(row for row in rows if row["kind"] == "two_hop")
    for row in rows:
        ratios = f"{row['ms'] / base['ms']:16.2f}{row['node_kB'] / base['node_kB']:17.2f}"
        num_bytes = f"{row['node_kB']:.0f} ({row['payload_kB']:.0f})"
        print(f"{row['kind']:25}{row['ms']:8.1f}{num_bytes:>16}{row['messages']:10d}{ratios}", flush=True)
    return [{"setting": str(setting), "tokens": tokens, **row} for row in rows]


def choose(setting: Setting, sizes: tuple[int, ...], rounds: int) -> list[Row]:
    """One row per number of tokens: measured and modelled time of every kind, and which one `auto` settles on."""
    cases = [Case(kind, tokens) for tokens in sizes for kind in KINDS]
    with Lab(setting.num_nodes, link=setting.link) as lab:
        seconds, _, _, fabric = on_ranks(lab, setting, cases, WARM_UP + rounds, calibrated=True)
    costs = costs_from(fabric, setting.traffic)
    measured = {(case.tokens, case.kind): 1e3 * s for case, s in zip(cases, seconds, strict=True)}
    print(f"\n{setting}; measured ms (modelled)")
    print(f"{'tokens':>6}{''.join(f'{kind:>18}' for kind in KINDS)}{'auto':>12}{'behind best':>13}")
    rows = []
    for tokens in sizes:
        policy = DispatchPolicy("auto", [setting.topology], costs)
        auto = [policy.choose(tokens) for _ in range(SWITCH_STEPS + 1)][-1]
        ms = {kind: measured[tokens, kind] for kind in KINDS}
        modelled_ms = {kind: 1e3 * s for kind, s in costs(tokens, setting.topology).items()}
        behind = ms[auto] / min(ms.values()) - 1
        cells = [f"{ms[kind]:.1f} ({modelled_ms[kind]:.1f})" for kind in KINDS]
        print(f"{tokens:6}{''.join(f'{cell:>18}' for cell in cells)}{auto:>12}{behind:>12.1%}", flush=True)
        row = {"setting": str(setting), "tokens": tokens, "auto": auto, "behind": behind}
        rows.append({**row, "ms": ms, "modelled_ms": modelled_ms, "fabric": fabric})
    return rows


def summarise(rows: list[Row]) -> None:
    """How far `auto` is behind the best kind of a cell, of a setting and of all settings."""
    print(f"\nsum of ms {'':48}{'auto':>8}  {'best kind of all sizes':24}{'auto / best':>12}")
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    for name, group in [*((name, (name,)) for name in settings), ("all settings", settings)]:
        chosen = [row for row in rows if row["setting"] in group]
        sums = {kind: sum(row["ms"][kind] for row in chosen) for kind in KINDS}
        best = min(KINDS, key=sums.__getitem__)
        auto = sum(row["ms"][row["auto"]] for row in chosen)
        print(f"{name:58}{auto:8.1f}  {f'{best} {sums[best]:.1f}':24}{auto / sums[best]:12.3f}")
    worst = max(rows, key=lambda row: row["behind"])
    ideal = sum(min(row["ms"].values()) for row in rows)
    auto = sum(row["ms"][row["auto"]] for row in rows)
    print(f"over the best kind of every cell: {auto / ideal - 1:.1%} in sum, at most {worst['behind']:.1%}", flush=True)


def print_compared(rounds: int) -> list[Row]:
    return [row for setting in COMPARED for row in compare(setting, COMPARED_TOKENS, rounds)]


def print_choices(settings: tuple[Setting, ...], sizes: tuple[int, ...], rounds: int) -> list[Row]:
    rows = [row for setting in settings for row in choose(setting, sizes, rounds)]
    summarise(rows)
    return rows


TABLES: dict[str, Callable[[int], list[Row]]] = {
    "compare": print_compared,
    "grid": lambda rounds: print_choices(GRID, GRID_TOKENS, rounds),
    "held_out": lambda rounds: print_choices(HELD_OUT, HELD_OUT_TOKENS, rounds),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(TABLES)}; without any, all")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    if unknown := set(options.tables) - set(TABLES):
        parser.error(f"there is no table {min(unknown)!r}; take of {', '.join(TABLES)}")
    if reason := why_not():
        sys.exit(f"cannot emulate hosts here: {reason}")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # hosts here have no names; c10d complains of each
    tables = {name: TABLES[name](options.rounds) for name in options.tables or TABLES}
    if options.json:
        versions = {"python": platform.python_version(), "torch": torch.__version__, "kernel": platform.release()}
        machine = {"cpu": cpu_name(), "versions": versions, "rounds": options.rounds}
        options.json.write_text(json.dumps({"machine": machine, **tables}, indent=1) + "\n")


if __name__ == "__main__":
    main()

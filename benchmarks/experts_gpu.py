"""Routed experts on a GPU: time, share of the machine's limit and ratio to `F.grouped_mm` and to the loop.

    python -m benchmarks.experts_gpu [--out FILE] [--tune FILE] [--shapes a3b,mixtral] [--tokens 1,8,64,...]

Every figure is the median of replays of a CUDA graph that holds the whole `Experts.forward` (alignment, both products,
the weighted sum), over random data and uniformly random routing; the weights of a layer exceed the L2 cache. The limit
is the larger of the bytes (weights of the experts that are hit, rows in and out) at the measured rate of a copy, and
the operations at that of a bf16 product of 8192^3, both measured in this process.

`--tune` times both products for many tile sizes and writes all rows; `phalanx/kernels/triton/moe_ffn.py:tiles` holds
what was chosen from them.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from phalanx.kernels.experts import Experts, ExpertShape, build
from phalanx.kernels.triton import moe_ffn
from phalanx.kernels.triton.moe_ffn import Tiles, TritonExperts

CUDA = torch.device("cuda")
DTYPE = torch.bfloat16
SHARED_MEMORY = 227 << 10


class Case(NamedTuple):
    """Experts of a model on one rank."""

    shape: ExpertShape
    top_k: int


CASES = {
    "a3b": Case(ExpertShape(128, 2048, 768), 8),  # Qwen3-30B-A3B
    "mixtral": Case(ExpertShape(8, 4096, 14336), 2),  # Mixtral-8x7B
}
TUNED = {"a3b": (8, 64, 256, 512, 1024, 2048, 4096), "mixtral": (8, 64, 256, 1024, 4096)}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path)
    p.add_argument("--tune", type=Path)
    p.add_argument("--shapes", default="a3b,mixtral")
    p.add_argument("--tokens", default="1,8,64,256,1024,4096,16384")
    p.add_argument("--impls", default="triton,grouped_mm,loop")
    a = p.parse_args()
    torch.manual_seed(0)
    names = a.shapes.split(",")
    with torch.inference_mode():
        if a.tune:
            rows = [row for name in names for row in tune(name)]
            a.tune.write_text("\n".join(json.dumps(row) for row in rows))
            report_tuning(rows)
        else:
            found = table(names, [int(tokens) for tokens in a.tokens.split(",")], a.impls.split(","))
            if a.out:
                a.out.write_text(json.dumps(found, indent=1))


def table(names: list[str], tokens: list[int], impls: list[str]) -> dict[str, Any]:
    """All shapes and numbers of tokens; prints as it goes."""
    limits = ceilings()
    print(json.dumps(limits))
    rows = []
    for name in names:
        case = CASES[name]
        layers = {impl: filled(case.shape, impl) for impl in impls}
        for count in tokens:
            x, slots, weights = batch(case, count)
            moved, flops = cost(case, slots)
            limit_us = 1e6 * max(moved / limits["copy_bytes_per_s"], flops / limits["flops_per_s"])
            row: dict[str, Any] = {"shape": name, "tokens": count, "bytes": moved, "flops": flops}
            row["limit_us"] = round(limit_us, 1)
            for impl, layer in layers.items():
                if impl == "loop" and count > 4096:
                    continue
                run = partial(layer.forward, x, slots, weights)
                row[f"{impl}_us"] = round(1e6 * (eager(run) if impl == "loop" else replayed(run)), 1)
            row["fraction"] = round(limit_us / row["triton_us"], 3)
            row["tflops"] = round(flops / row["triton_us"] / 1e6, 1)
            row["parts_us"] = parts(layers["triton"], x, slots, weights)
            rows.append(row)
            print(json.dumps(row), flush=True)
    return {"machine": limits, "rows": rows}


def ceilings() -> dict[str, Any]:
    """Bytes per second of a copy (read + written) and operations per second of a product."""
    big, out = (torch.empty(2 << 30, dtype=torch.uint8, device=CUDA) for _ in range(2))
    big.random_()
    copied = 2 * big.nbytes / eager(partial(out.copy_, big))
    del big, out
    a, b = (torch.randn(8192, 8192, device=CUDA).to(DTYPE) for _ in range(2))
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "copy_bytes_per_s": copied,
        "flops_per_s": 2 * 8192**3 / eager(partial(torch.matmul, a, b)),
    }


def filled(shape: ExpertShape, impl: str) -> Experts:
    """A layer of random weights."""
    layer = build(shape, dtype=DTYPE, device=CUDA, choose={"experts": impl})
    for slot in range(shape.num_slots):
        gate_up = torch.randn(2 * shape.intermediate_size, shape.hidden_size, device=CUDA) / shape.hidden_size**0.5
        down = torch.randn(shape.hidden_size, shape.intermediate_size, device=CUDA) / shape.intermediate_size**0.5
        layer.load(slot, gate_up, down)
    return layer


def batch(case: Case, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(tokens, case.shape.hidden_size, device=CUDA).to(DTYPE)
    slots = torch.rand(tokens, case.shape.num_slots, device=CUDA).topk(case.top_k).indices.int()
    return x, slots, torch.softmax(torch.randn(tokens, case.top_k, device=CUDA), -1)


def cost(case: Case, slots: Tensor) -> tuple[int, int]:
    """Bytes and operations that no implementation can avoid."""
    size = 3 * case.shape.hidden_size * case.shape.intermediate_size
    rows = slots.shape[0] * case.shape.hidden_size
    return slots.unique().numel() * size * DTYPE.itemsize + rows * (DTYPE.itemsize + 4), 2 * slots.numel() * size


def parts(layer: Experts, x: Tensor, slots: Tensor, weights: Tensor) -> dict[str, float]:
    """Microseconds of each kernel on its own."""
    assert isinstance(layer, TritonExperts)
    shape, top_k = layer.shape, slots.shape[1]
    first, second = layer.tiles(slots.numel())
    aligned = moe_ffn.align(slots, shape.num_slots, first.BM)
    inner = x.new_empty((aligned.sorted_pairs.shape[0], shape.intermediate_size))
    pairs = x.new_empty((slots.numel(), shape.hidden_size))
    steps: dict[str, Callable[[], object]] = {
        "align": lambda: moe_ffn.align(slots, shape.num_slots, first.BM),
        "gate_up": lambda: layer.gate_up_act(x, aligned, inner, slots.numel(), top_k, first),
        "down": lambda: layer.project_down(inner, aligned, pairs, second),
        "combine": lambda: moe_ffn.combine(pairs, slots, weights),
    }
    return {name: round(1e6 * replayed(step), 1) for name, step in steps.items()}


def replayed(run: Callable[[], object], replays: int = 20) -> float:
    """Seconds of a call inside a graph that holds several of it, the median over replays."""
    seconds = eager(run, 3)
    times = max(1, min(50, int(2e-3 / seconds)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            run()
    return eager(graph.replay, replays) / times


def eager(run: Callable[[], object], repetitions: int = 10) -> float:
    """Seconds by device events, the median after two warm-ups."""
    for _ in range(2):
        run()
    samples = []
    for _ in range(repetitions):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) / 1e3)
    return statistics.median(samples)


def candidates(block_m: int) -> Iterator[tuple[str, Tiles]]:
    """Tile sizes to try for both products, whose buffers fit."""
    small = block_m <= 32
    for part, factor in (("gate_up", 2), ("down", 1)):
        columns = ((32, 64, 128) if small else (64, 128)) if part == "gate_up" else ((64, 128) if small else (128, 256))
        depths, stages = ((64, 128, 256), (3, 4, 5)) if small else ((64, 128), (3, 4))
        warps = (4,) if small else (4, 8)
        groups = (1,) if small else (8, 32)
        for bn, bk, num_warps, num_stages, tma, group in itertools.product(
            columns, depths, warps, stages, (False, True), groups
        ):
            too_wide = block_m * bn * factor > 128 * 128 * (1 if num_warps == 4 else 2)
            if num_stages * bk * (block_m + factor * bn) * 2 <= SHARED_MEMORY and not too_wide:
                yield part, Tiles(block_m, bn, bk, group, num_warps, num_stages, tma)


def blocks_of(case: Case, tokens: int) -> tuple[int, ...]:
    """Sensible BM for the mean number of rows of a slot."""
    rows = tokens * case.top_k / case.shape.num_slots
    return (16,) if rows <= 8 else (16, 32, 64) if rows <= 32 else (64, 128)


def tune(name: str) -> Iterator[dict[str, Any]]:
    """Compile all candidates on all cores, then time them one by one."""
    case = CASES[name]
    wanted = sorted({block for tokens in TUNED[name] for block in blocks_of(case, tokens)})
    jobs = [(name, part, tile) for block in wanted for part, tile in candidates(block)]
    with multiprocessing.get_context("spawn").Pool(min(16, os.cpu_count() or 1)) as pool:
        works = dict(zip(jobs, pool.map(compiles, jobs, chunksize=4), strict=True))
    layer = filled(case.shape, "triton")
    assert isinstance(layer, TritonExperts)
    for tokens in TUNED[name]:
        x, slots, _ = batch(case, tokens)
        pairs = x.new_empty((slots.numel(), case.shape.hidden_size))
        for block in blocks_of(case, tokens):
            aligned = moe_ffn.align(slots, case.shape.num_slots, block)
            inner = torch.randn(aligned.sorted_pairs.shape[0], case.shape.intermediate_size, device=CUDA).to(DTYPE)
            for part, tile in candidates(block):
                if works[name, part, tile]:
                    run = (
                        partial(layer.gate_up_act, x, aligned, inner, slots.numel(), case.top_k, tile)
                        if part == "gate_up"
                        else partial(layer.project_down, inner, aligned, pairs, tile)
                    )
                    row = {"shape": name, "tokens": tokens, "part": part, **tile._asdict()}
                    yield {**row, "us": round(1e6 * replayed(run, 7), 1)}


def compiles(job: tuple[str, str, Tiles]) -> bool:
    """Whether a candidate runs at all; leaves it in the compiler's cache."""
    name, part, tile = job
    case = CASES[name]
    layer = TritonExperts(case.shape._replace(num_slots=1), DTYPE, CUDA)
    x, slots, _ = batch(case._replace(shape=case.shape._replace(num_slots=1), top_k=1), 3)
    slots = slots.expand(3, case.top_k).contiguous()
    aligned = moe_ffn.align(slots, 1, tile.BM)
    inner = x.new_zeros((aligned.sorted_pairs.shape[0], case.shape.intermediate_size))
    pairs = x.new_empty((slots.numel(), case.shape.hidden_size))
    try:
        if part == "gate_up":
            layer.gate_up_act(x, aligned, inner, slots.numel(), case.top_k, tile)
        else:
            layer.project_down(inner, aligned, pairs, tile)
        torch.cuda.synchronize()
    except Exception as error:  # what Triton raises for a size that does not fit differs by version
        print(f"{job}: {type(error).__name__}: {str(error)[:200]}", flush=True)
        return False
    return True


def report_tuning(rows: list[dict[str, Any]]) -> None:
    """The best five of every part."""
    for key, group in itertools.groupby(rows, lambda row: (row["shape"], row["tokens"])):
        listed = list(group)
        for part, block in itertools.product(("gate_up", "down"), sorted({row["BM"] for row in listed})):
            best = sorted((row for row in listed if (row["part"], row["BM"]) == (part, block)), key=lambda r: r["us"])
            for row in best[:4]:
                print(*key, part, *(row[name] for name in Tiles._fields), row["us"])


if __name__ == "__main__":
    main()

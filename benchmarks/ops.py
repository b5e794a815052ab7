"""Every op at its bench shapes: time, rate, fraction of the ceiling measured in this process, ratio to torch.

    python benchmarks/ops.py [--threads N] [--dtype bf16|fp32] [--only paged_attention,...] [--seconds 0.5] [--json]

Inputs rotate over more bytes than the last-level cache holds, unless `--hot`. The time is the median of the samples;
the best one stands beside it, because this may run on a machine that others use too.
"""

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from phalanx import plugins
from phalanx.kernels import memory, registry
from phalanx.kernels.linear import pack
from phalanx.kernels.op import Cost

CPU = torch.device("cpu")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ROTATE_BYTES = 128 << 20
MAX_ROTATION = 24
# (name, N, K) of a 28-layer model: hidden 1024, 16 q and 8 kv heads of 128, ffn 3072, vocabulary 32768.
LINEARS = (("qkv", 4096, 1024), ("o", 1024, 2048), ("gate_up", 6144, 1024), ("down", 1024, 3072), ("head", 32768, 1024))
ROWS = (1, 8, 32, 256)


class Ceilings(NamedTuple):
    """What this process can reach: bytes per second read, floating-point operations per second of a packed product."""

    bytes_per_s: float
    flops_per_s: float


class Case(NamedTuple):
    """One thing to time: ours and torch's way, each over the same rotating inputs."""

    op: str
    shape: str
    cost: Cost
    inputs: list[dict[str, Any]]
    ours: Callable[..., Any]
    torch_way: Callable[..., Any] | None


class Timing(NamedTuple):
    """Seconds per call."""

    median: float
    best: float


def measure(function: Callable[..., Any], inputs: list[dict[str, Any]], seconds: float) -> Timing:
    samples: list[float] = []
    function(**inputs[0])
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(samples) < 5:
        kwargs = inputs[len(samples) % len(inputs)]
        start = time.perf_counter()
        function(**kwargs)
        samples.append(time.perf_counter() - start)
    return Timing(statistics.median(samples), min(samples))


def ceilings(dtype: torch.dtype) -> Ceilings:
    """Best of many: a sum over 128 MiB; a 1024^3 product with a packed weight, on random data."""
    numbers = torch.ones(1 << 25)
    size = 1024
    product = pack(torch.randn(size, size).to(dtype))
    x = torch.randn(size, size).to(dtype)
    read = measure(lambda: numbers.sum(), [{}], 1.0).best
    multiply = measure(lambda: product(x), [{}], 1.0).best
    return Ceilings(numbers.nbytes / read, 2 * size**3 / multiply)


def rotated(build: Callable[[int], dict[str, Any]], cost: Cost, hot: bool) -> list[dict[str, Any]]:
    count = 1 if hot else min(MAX_ROTATION, 1 + ROTATE_BYTES // max(cost.bytes, 1))
    return [build(seed) for seed in range(count)]


def op_cases(dtype: torch.dtype, hot: bool) -> Iterator[Case]:
    for name, module in plugins.entries("kernels", ("OP",)):
        op = module.OP
        ours = registry.bind(name, device=CPU, dtype=dtype)
        for problem in op.problems["bench"]:
            cost = op.cost(problem, dtype)

            def build(seed: int, op: Any = op, problem: Any = problem) -> dict[str, Any]:
                inputs: dict[str, Any] = op.make_inputs(problem, torch.Generator().manual_seed(seed), dtype)
                if "kv" in inputs:  # where the runtime keeps it
                    pool = inputs["kv"]
                    inputs["kv"] = memory.empty(tuple(pool.shape), pool.dtype, CPU).copy_(pool)
                return inputs

            yield Case(name, describe(problem), cost, rotated(build, cost, hot), ours, TORCH_WAYS.get(name))


def linear_cases(dtype: torch.dtype, hot: bool) -> Iterator[Case]:
    for name, n, k in LINEARS:
        for rows in ROWS:
            cost = Cost((n * k + rows * (n + k)) * dtype.itemsize, 2 * rows * n * k)

            def build(seed: int, n: int = n, k: int = k, rows: int = rows) -> dict[str, Any]:
                generator = torch.Generator().manual_seed(seed)
                weight = (torch.randn((n, k), generator=generator) / math.sqrt(k)).to(dtype)
                return {
                    "x": torch.randn((rows, k), generator=generator).to(dtype),
                    "weight": weight,
                    "layer": pack(weight),
                }

            yield Case(
                *("linear", f"{name} {rows}x{k}x{n}", cost, rotated(build, cost, hot)),
                lambda x, weight, layer: layer(x),
                lambda x, weight, layer: F.linear(x, weight),
            )


def describe(problem: Any) -> str:
    """The fields that matter: sequences are told by number, rows and context of the first."""
    fields = problem._asdict()
    seqs = fields.pop("seqs", None)
    head = [] if seqs is None else [f"{len(seqs)} x {seqs[0][1]} new + {seqs[0][0]}"]
    return " ".join((*head, *(str(value) for value in fields.values() if value not in (None, False, 0))))


def norm_way(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x = x + residual
    return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps), x


def act_way(gate_up: Tensor, activation: str) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def sdpa_way(q: Tensor, kv: Tensor, layer: int, meta: Any, *, scale: float, **_: Any) -> Tensor:
    """SDPA on the gathered keys; the gather is part of it, since torch has no paged attention."""
    num_seqs = meta.block_tables.shape[0]
    num_blocks = -(-meta.max_seq_len // kv.shape[4])
    tiles = kv[meta.block_tables[:, :num_blocks].long(), layer].permute(2, 0, 3, 1, 4, 5).flatten(3, 4)
    k, v = tiles[:, :, :, : meta.max_seq_len]
    heads, tokens, group, dim = q.shape
    rows = q.view(heads, num_seqs, tokens // num_seqs, group, dim).permute(1, 0, 3, 2, 4).flatten(1, 2)
    past = k.shape[2] - rows.shape[2]
    mask = None if rows.shape[2] == 1 else torch.ones((rows.shape[2], k.shape[2]), dtype=torch.bool).tril(past)
    return F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scale, enable_gqa=True)


def sample_way(logits: Tensor, temperature: Tensor, **_: Any) -> Tensor:
    return torch.multinomial(torch.softmax(logits / temperature.clamp(min=1e-6)[:, None], -1), 1)


TORCH_WAYS: dict[str, Callable[..., Any]] = {
    "add_rms_norm": norm_way,
    "act_mul": act_way,
    "paged_attention": sdpa_way,
    "sample": sample_way,
}


def row(case: Case, limits: Ceilings, seconds: float) -> dict[str, Any]:
    ours = measure(case.ours, case.inputs, seconds)
    theirs = measure(case.torch_way, case.inputs, seconds) if case.torch_way else None
    limit = max(case.cost.bytes / limits.bytes_per_s, case.cost.flops / limits.flops_per_s)
    return {
        "op": case.op,
        "shape": case.shape,
        "us": round(ours.median * 1e6, 1),
        "best_us": round(ours.best * 1e6, 1),
        "gb_per_s": round(case.cost.bytes / ours.best / 1e9, 1),
        "gf_per_s": round(case.cost.flops / ours.best / 1e9, 1),
        "fraction": round(limit / ours.best, 3),
        "torch_ratio": round(theirs.best / ours.best, 2) if theirs else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--only", default="", help="comma-separated op names")
    parser.add_argument("--seconds", type=float, default=0.5, help="per measurement")
    parser.add_argument("--hot", action="store_true", help="one set of inputs: everything stays in the cache")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype, only = DTYPES[args.dtype], set(filter(None, args.only.split(",")))
    with torch.inference_mode():
        limits = ceilings(dtype)
        machine = {
            "machine": platform.machine(),
            "torch": torch.__version__,
            "threads": args.threads,
            "dtype": args.dtype,
        }
        print(json.dumps({**machine, **{name: round(value / 1e9, 1) for name, value in limits._asdict().items()}}))
        if not args.json:
            print(f"{'op':16}{'shape':34}{'us':>10}{'best':>10}{'GB/s':>8}{'GF/s':>9}{'of limit':>10}{'vs torch':>10}")
        for cases in (linear_cases, op_cases):
            for case in cases(dtype, args.hot):
                if only and case.op not in only:
                    continue
                result = row(case, limits, args.seconds)
                if args.json:
                    print(json.dumps(result), flush=True)
                    continue
                ratio = "-" if result["torch_ratio"] is None else f"{result['torch_ratio']:.2f}x"
                print(
                    f"{case.op:16}{case.shape:34}{result['us']:10.1f}{result['best_us']:10.1f}{result['gb_per_s']:8.1f}"
                    f"{result['gf_per_s']:9.1f}{result['fraction']:10.2f}{ratio:>10}",
                    flush=True,
                )


if __name__ == "__main__":
    main()

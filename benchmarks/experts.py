"""The experts of a layer: time, rate and ratio to the loop over hit experts, all back ends turn about.

    python benchmarks/experts.py [--threads N] [--dtype bf16|fp32] [--tokens 1,8,32,128,512] [--impls cpp,loop,...]
                                 [--shape 32,4,1024,512] [--seconds 4] [--json]

`packed` is the strongest loop one can write by hand: packed linears and the fused activation per hit expert. Layers
rotate, so that no weight is found in the cache. Bytes are those of the experts that are hit. `of limit` compares the
best time with the larger of the bytes at the rate of a sum over memory and the operations at that of a packed product.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from phalanx.kernels import registry
from phalanx.kernels.experts import Experts, ExpertShape, build
from phalanx.kernels.linear import PackedLinear, pack

CPU = torch.device("cpu")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ROTATE_BYTES = 256 << 20


class PackedLoop:
    """The rival: `linear.pack` for every expert, rows gathered and scattered by torch."""

    impl = "packed"

    def __init__(self, shape: ExpertShape, dtype: torch.dtype) -> None:
        self.act = registry.bind("act_mul", device=CPU, dtype=dtype)
        self.activation = shape.activation
        self.layers: dict[int, tuple[PackedLinear, PackedLinear]] = {}

    def load(self, slot: int, gate_up: Tensor, down: Tensor) -> None:
        self.layers[slot] = (pack(gate_up), pack(down))

    def forward(self, x: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros(x.shape, dtype=torch.float32)
        for slot in slots.unique().tolist():
            row, choice = (slots == slot).nonzero(as_tuple=True)
            gate_up, down = self.layers[slot]
            y = down(self.act(gate_up(x[row]), self.activation))
            out.index_add_(0, row, y.float() * weights[row, choice, None])
        return out


class Timing(NamedTuple):
    """Seconds per call."""

    median: float
    best: float


def turn_about(calls: dict[str, list[Callable[[], Any]]], seconds: float) -> dict[str, Timing]:
    """Every implementation once per round, each time on its next layer."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for ways in calls.values():
        ways[0]()
    end, turn = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or turn < 5:
        for name, ways in calls.items():
            start = time.perf_counter()
            ways[turn % len(ways)]()
            samples[name].append(time.perf_counter() - start)
        turn += 1
    return {name: Timing(statistics.median(times), min(times)) for name, times in samples.items()}


def ceilings(dtype: torch.dtype) -> tuple[float, float]:
    """Bytes per second of a sum over 128 MiB, operations per second of a packed product; best of many."""
    numbers, size = torch.ones(1 << 25), 1024
    product, x = pack(torch.randn(size, size).to(dtype)), torch.randn(64, size).to(dtype)
    timing = turn_about({"read": [numbers.sum], "multiply": [lambda: product(x)]}, 1.5)
    return numbers.nbytes / timing["read"].best, 2 * 64 * size**2 / timing["multiply"].best


def layers(shape: ExpertShape, dtype: torch.dtype, impl: str) -> list[Experts | PackedLoop]:
    expert_bytes = 3 * shape.hidden_size * shape.intermediate_size * dtype.itemsize
    count = max(1, -(-ROTATE_BYTES // (expert_bytes * shape.num_slots)))
    result: list[Experts | PackedLoop] = []
    for _ in range(count):
        layer = (
            PackedLoop(shape, dtype)
            if impl == "packed"
            else build(shape, dtype=dtype, device=CPU, choose={"experts": impl})
        )
        for slot in range(shape.num_slots):
            gate_up = torch.randn(2 * shape.intermediate_size, shape.hidden_size) / shape.hidden_size**0.5
            down = torch.randn(shape.hidden_size, shape.intermediate_size) / shape.intermediate_size**0.5
            layer.load(slot, gate_up.to(dtype), down.to(dtype))
        result.append(layer)
    return result


def rows(
    shape: ExpertShape, top_k: int, tokens: int, dtype: torch.dtype, built: dict[str, list[Any]], seconds: float
) -> list[dict[str, Any]]:
    x = torch.randn(tokens, shape.hidden_size).to(dtype)
    slots = torch.rand(tokens, shape.num_slots).topk(top_k).indices.int()
    weights = torch.softmax(torch.randn(tokens, top_k), -1)
    calls = {
        impl: [lambda layer=layer: layer.forward(x, slots, weights) for layer in rotation]
        for impl, rotation in built.items()
    }
    timings = turn_about(calls, seconds)
    size = 3 * shape.hidden_size * shape.intermediate_size
    moved, flops = slots.unique().numel() * size * dtype.itemsize, 2 * slots.numel() * size
    loop = timings.get("loop")
    return [
        {
            "tokens": tokens,
            "impl": impl,
            "us": round(timing.median * 1e6, 1),
            "best_us": round(timing.best * 1e6, 1),
            "gb_per_s": round(moved / timing.median / 1e9, 1),
            "gf_per_s": round(flops / timing.median / 1e9, 1),
            "loop_ratio": round(loop.median / timing.median, 2) if loop else None,
            "bytes": moved,
            "flops": flops,
        }
        for impl, timing in timings.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--tokens", default="1,8,32,128,512")
    parser.add_argument("--impls", default="cpp,packed,grouped_mm,loop")
    parser.add_argument("--shape", default="32,4,1024,512", help="experts, top-k, hidden size, inner size")
    parser.add_argument("--seconds", type=float, default=4.0, help="per number of tokens, all back ends together")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dtype = DTYPES[args.dtype]
    num_experts, top_k, hidden, inner = map(int, args.shape.split(","))
    shape = ExpertShape(num_experts, hidden, inner)
    with torch.inference_mode():
        built = {impl: layers(shape, dtype, impl) for impl in args.impls.split(",")}
        read, multiply = ceilings(dtype)
        head = {"torch": torch.__version__, "threads": args.threads, "dtype": args.dtype, "shape": args.shape}
        print(json.dumps({**head, "read_gb_per_s": round(read / 1e9, 1), "gf_per_s": round(multiply / 1e9, 1)}))
        if not args.json:
            print(
                f"{'tokens':>7} {'impl':12}{'us':>10}{'best':>10}{'GB/s':>8}{'GF/s':>9}{'of limit':>10}{'vs loop':>10}"
            )
        for tokens in map(int, args.tokens.split(",")):
            for row in rows(shape, top_k, tokens, dtype, built, args.seconds):
                row["fraction"] = round(max(row["bytes"] / read, row["flops"] / multiply) / row["best_us"] * 1e6, 3)
                if args.json:
                    print(json.dumps(row), flush=True)
                    continue
                ratio = "-" if row["loop_ratio"] is None else f"{row['loop_ratio']:.2f}x"
                print(
                    f"{row['tokens']:7} {row['impl']:12}{row['us']:10.1f}{row['best_us']:10.1f}{row['gb_per_s']:8.1f}"
                    f"{row['gf_per_s']:9.1f}{row['fraction']:10.2f}{ratio:>10}",
                    flush=True,
                )


if __name__ == "__main__":
    main()

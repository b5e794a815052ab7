"""Triton experts: the interpreter proves indices, masks and maths in fp32, fp16; the compiler, that they fit sm_90.

bf16 is not interpreted: the interpreter multiplies its bit patterns. Runs in 15 s, and only where Triton is installed.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported; this must come first

import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from phalanx.kernels.expert_shape import ExpertShape
from phalanx.kernels.experts import build
from phalanx.kernels.triton import moe_ffn

triton = pytest.importorskip("triton", reason="triton is not installed")
if type(triton.language.sum).__name__ != "InterpretedFunction":
    pytest.skip("Triton was imported before TRITON_INTERPRET=1 was set", allow_module_level=True)
pytestmark = [  # of NumPy, which interprets
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
]
CPU = torch.device("cpu")
SHARED_MEMORY = 232_448
"""Bytes a block may use on sm_90."""


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Memory that nobody has written holds NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


def random_slots(rows: int, top_k: int, num_slots: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    slots = torch.rand((rows, num_slots), generator=generator).topk(top_k).indices.int()
    slots[torch.rand((rows, top_k), generator=generator) < 0.3] = -1
    return slots


@pytest.mark.parametrize(("rows", "top_k", "num_slots"), [(1, 1, 1), (5, 2, 3), (40, 3, 7), (700, 2, 2), (3, 2, 33)])
@pytest.mark.parametrize("block_m", [2, 16])
@pytest.mark.parametrize("few_pairs", [0, moe_ffn.FEW_PAIRS], ids=["many", "few"])
def test_align(
    rows: int, top_k: int, num_slots: int, block_m: int, few_pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moe_ffn, "FEW_PAIRS", few_pairs)
    slots = random_slots(rows, top_k, num_slots)
    aligned = moe_ffn.align(slots, num_slots, block_m)
    tiles = aligned.sorted_pairs.view(-1, block_m).tolist()
    expected: list[tuple[int, list[int]]] = []
    for slot in range(num_slots):
        pairs = (slots.flatten() == slot).nonzero().flatten().tolist()
        pairs += [slots.numel()] * (-len(pairs) % block_m)
        expected += [(slot, pairs[at : at + block_m]) for at in range(0, len(pairs), block_m)]
    used = [(slot, tile) for slot, tile in zip(aligned.tile_slot.tolist(), tiles, strict=True) if slot >= 0]
    assert used == expected
    assert aligned.tile_slot.tolist()[len(used) :] == [-1] * (len(tiles) - len(used))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        (ExpertShape(3, 40, 24), 6),
        (ExpertShape(2, 136, 72, activation="gelu_tanh"), 9),
        (ExpertShape(2, 24, 40, activation="swiglu_clamped", bias=True, limit=1.5), 70),
        (ExpertShape(1, 80, 136), 130),
    ],
    ids=["few rows", "several blocks", "tiles of 64", "tiles of 128"],
)
def test_equals_the_loop(shape: ExpertShape, rows: int, dtype: torch.dtype) -> None:
    ours = moe_ffn.TritonExperts(shape, dtype, CPU)
    oracle = build(shape, dtype=torch.float32, device=CPU, choose={"experts": "loop"})
    generator = torch.Generator().manual_seed(1)
    hidden, inner = shape.hidden_size, shape.intermediate_size
    ours.rows.view(dtype).fill_(torch.nan)  # padding must never be read
    for slot in range(shape.num_slots):
        sizes = ((2 * inner, hidden), (hidden, inner), (2 * inner,), (hidden,))
        gate_up, down, *biases = ((torch.randn(size, generator=generator) / 4).to(dtype) for size in sizes)
        for layer in (ours, oracle):
            layer.load(slot, gate_up, down, *(biases if shape.bias else []))
    top_k = min(2, shape.num_slots)
    slots = random_slots(rows, top_k, shape.num_slots)
    x = torch.randn((rows, hidden), generator=generator).to(dtype)
    weights = torch.rand((rows, top_k), generator=generator).masked_fill(slots < 0, torch.nan)
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    for actual, expected in (
        (ours.forward(x, slots, weights), oracle.forward(x.float(), slots, weights)),
        (ours.forward_pairs(x, slots), oracle.forward_pairs(x.float(), slots)),
    ):
        assert actual.shape == expected.shape
        assert (actual.float() - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1)
    assert ours.forward_pairs(x, slots).dtype == dtype


@pytest.mark.parametrize(("block_m", "tma"), [(16, True), (32, False), (32, True)])
def test_tiles_and_descriptors(block_m: int, tma: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight matrix as a descriptor; its last block reaches past the rows and into the depth of the next matrix."""
    tile = moe_ffn.Tiles(block_m, 32, 32, 2, 4, 3, tma)
    monkeypatch.setattr(moe_ffn, "tiles", lambda num_pairs, num_slots: (tile, tile))
    test_equals_the_loop(ExpertShape(3, 40, 24), 50, torch.float32)


def test_no_rows() -> None:
    layer = moe_ffn.TritonExperts(ExpertShape(2, 16, 16), torch.float32, CPU)
    nothing = torch.empty((0, 2), dtype=torch.int32)
    assert layer.forward(torch.empty(0, 16), nothing, torch.empty(0, 2)).shape == (0, 16)
    assert layer.forward_pairs(torch.empty(0, 16), nothing).shape == (0, 16)
    none = torch.full((3, 2), -1, dtype=torch.int32)
    assert torch.equal(layer.forward(torch.full((3, 16), torch.nan), none, torch.rand(3, 2)), torch.zeros(3, 16))


COMPILE = """
import pathlib, subprocess, sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from phalanx.kernels.triton import _moe_kernels as kernels, moe_ffn

def build(function, signature, constants, options):
    names = function.arg_names
    types = {name: "constexpr" if name in constants else signature[name] for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names)
               if types[name].startswith("*") or name == "slot_stride"}
    source = ASTSource(function, types, {(names.index(k),): v for k, v in constants.items()}, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)

def report(name, kernel):
    path = pathlib.Path(sys.argv[1], "kernel.cubin")
    path.write_bytes(kernel.asm["cubin"])
    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    print(name, kernel.metadata.shared, "wgmma" in kernel.asm["ptx"], " ".join(usage.split()), flush=True)

pointers = dict(x="*bf16", weight="*bf16", inner="*bf16", pairs="*bf16", sorted_pairs="*i32", tile_slot="*i32",
                slots="*i32", weights="*fp32", out="*fp32")
scalars = dict(num_pairs="i32", num_tiles="i32", slot_stride="i32", alpha="fp32", limit="fp32")
sizes = dict(HIDDEN=2048, INNER=768, BIAS=False, bias=None)
for num_pairs in (128, 128 * 16, 128 * 32, 128 * 512):
    for function, tile in zip((kernels.gate_up_act, kernels.down), moe_ffn.tiles(num_pairs, 128)):
        constants = {**sizes, **dict(zip(("BM", "BN", "BK", "GROUP"), tile))}
        if function is kernels.gate_up_act:
            constants |= dict(TOP_K=8, ACTIVATION="silu")
        options = dict(num_warps=tile.num_warps, num_stages=tile.num_stages)
        for tma in (False, True):
            weight = f"tensordesc<bf16[1, {tile.BN}, {tile.BK}]>" if tma else "*bf16"
            signature = {**pointers, **scalars, "weight": weight}
            report(f"{function.__name__} {tile.BM}", build(function, signature, {**constants, "TMA": tma}, options))
bins, names = dict(BINS=128), ("counts", "totals", "places", "num_chunks")
signature = {**pointers, **scalars, **dict(zip(names, ("*i32", "*i32", "*i32", "i32")))}
report("align_few 16", build(kernels.align_few, signature, {**bins, "BM": 16, "CHUNK": 1024}, {}))
report("count_pairs 16", build(kernels.count_pairs, signature, {**bins, "CHUNK": 128}, dict(num_warps=1)))
report("place_slots 16", build(kernels.place_slots, signature, {**bins, "BM": 128, "WIDTH": 1024}, {}))
report("place_pairs 16", build(kernels.place_pairs, signature, {"CHUNK": 128}, {}))
report("combine 16", build(kernels.combine, {**pointers, **scalars}, dict(HIDDEN=2048, TOP_K=8, BN=1024), {}))
"""


@pytest.mark.slow
def test_compiles_for_sm_90(tmp_path: Any) -> None:
    """No stack, no spills, shared memory within the limit, and tensor-core groups from 64 rows on; needs no GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", COMPILE, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 21
    for line in lines:
        name, block_m, shared, wgmma = line.split()[:4]
        assert int(shared) <= SHARED_MEMORY, line
        assert re.search(r"STACK:0 .*LOCAL:0 ", line), line
        if name in ("gate_up_act", "down"):
            assert (wgmma == "True") == (int(block_m) >= 64), line

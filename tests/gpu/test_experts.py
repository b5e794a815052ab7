"""Expert back ends on a GPU: right against float64, also in bf16, also from a graph; no host synchronisation."""

import pytest
import torch
from torch import Tensor

from phalanx.errors import ConfigError
from phalanx.kernels.experts import Experts, ExpertShape, build
from phalanx.kernels.triton import moe_ffn
from phalanx.kernels.triton.moe_ffn import Tiles
from phalanx.models.moe import alone
from phalanx.moe.group import EpStep
from phalanx.moe.layer import MoeLayer
from phalanx.moe.spec import ExpertSpec, MoeSpec, RouterSpec
from phalanx.parallel.group import Group
from phalanx.parallel.rendezvous import single

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CUDA = torch.device("cuda")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 1.6e-2}
SHAPES = {
    "even": ExpertShape(5, 256, 128),
    "ragged": ExpertShape(4, 200, 88, activation="gelu_tanh"),
    "biased": ExpertShape(3, 48, 104, activation="swiglu_clamped", bias=True, limit=1.5),
    "one": ExpertShape(1, 16, 16, bias=True),
    "many": ExpertShape(160, 128, 64),
    "A3B": ExpertShape(128, 2048, 768),
}


def made(
    impl: str, shape: ExpertShape, dtype: torch.dtype, *, batch_invariant: bool = False
) -> tuple[Experts, list[list[Tensor | None]]]:
    """A layer, and its weights in float64 by slot."""
    try:
        choose = {"experts": impl}
        layer = build(shape, dtype=dtype, device=CUDA, choose=choose, batch_invariant=batch_invariant)
    except ConfigError as error:
        pytest.skip(str(error))
    generator = torch.Generator(CUDA).manual_seed(0)
    hidden, inner = shape.hidden_size, shape.intermediate_size
    layer.rows.view(dtype).fill_(torch.nan)  # padding must never be read
    weights = []
    for slot in range(shape.num_slots):
        sizes = ((2 * inner, hidden), (hidden, inner), *(((2 * inner,), (hidden,)) if shape.bias else ()))
        parts: list[Tensor | None] = [
            (torch.randn(size, generator=generator, device=CUDA) * size[-1] ** -0.5).to(dtype) for size in sizes
        ]
        layer.load(slot, *parts)  # type: ignore[arg-type]
        weights.append([None if part is None else part.double() for part in [*parts, None, None][:4]])
    return layer, weights


def batch(shape: ExpertShape, dtype: torch.dtype, rows: int, top_k: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, slots of which a third is -1, weights that are NaN there."""
    generator = torch.Generator(CUDA).manual_seed(seed)
    x = (torch.randn((rows, shape.hidden_size), generator=generator, device=CUDA) * 2).to(dtype)
    slots = torch.rand((rows, shape.num_slots), generator=generator, device=CUDA).topk(top_k).indices.int()
    slots[torch.rand((rows, top_k), generator=generator, device=CUDA) < 0.3] = -1
    weights = torch.rand((rows, top_k), generator=generator, device=CUDA).masked_fill(slots < 0, torch.nan)
    return x, slots, weights


def oracle(
    x: Tensor, slots: Tensor, weights: Tensor, parameters: list[list[Tensor | None]], shape: ExpertShape
) -> Tensor:
    """The weighted sum in float64."""
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for slot, (gate_up, down, gate_up_bias, down_bias) in enumerate(parameters):
        row, choice = (slots == slot).nonzero(as_tuple=True)
        assert gate_up is not None
        assert down is not None
        gate, up = torch.nn.functional.linear(x[row].double(), gate_up, gate_up_bias).chunk(2, -1)
        if shape.activation == "silu":
            inner = gate * gate.sigmoid() * up
        elif shape.activation == "gelu_tanh":
            inner = torch.nn.functional.gelu(gate, approximate="tanh") * up
        else:
            gate, up = gate.clamp(max=shape.limit), up.clamp(-shape.limit, shape.limit)
            inner = (up + 1) * gate * (shape.alpha * gate).sigmoid()
        y = torch.nn.functional.linear(inner, down, down_bias)
        out.index_add_(0, row, y * weights[row, choice, None].double())
    return out


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("impl", ["triton", "grouped_mm", "loop"])
@pytest.mark.parametrize("name", SHAPES)
def test_equals_float64(name: str, impl: str, dtype: torch.dtype) -> None:
    shape = SHAPES[name]
    layer, parameters = made(impl, shape, dtype)
    top_k = min(8, shape.num_slots)
    for rows in (1, 7, 64, 700, 4096) if name == "A3B" and dtype == torch.bfloat16 else (1, 33, 700):
        x, slots, weights = batch(shape, dtype, rows, top_k, seed=rows)
        torch.empty(1 << 26, device=CUDA).fill_(torch.nan)  # what outputs are made of
        actual = layer.forward(x, slots, weights).double()
        expected = oracle(x, slots, weights, parameters, shape)
        error = float((actual - expected).abs().max() / expected.abs().max().clamp(min=1))
        assert error <= TOLERANCE[dtype], f"{rows} rows: {error:.2e}"
        pairs = layer.forward_pairs(x, slots)
        assert pairs.shape == (int((slots >= 0).sum()), shape.hidden_size)
        total = torch.zeros_like(expected)
        row, choice = (slots >= 0).nonzero(as_tuple=True)
        total.index_add_(0, row, pairs.double() * weights[row, choice, None].double())
        assert float((total - expected).abs().max() / expected.abs().max().clamp(min=1)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "TMA"])
@pytest.mark.parametrize("block_m", [16, 32, 64, 128])
def test_every_kind_of_tile(block_m: int, tma: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = ExpertShape(6, 328, 200)
    tile = Tiles(block_m, 64, 64, 2, 4, 3, tma)
    monkeypatch.setattr(moe_ffn, "tiles", lambda num_pairs, num_slots: (tile, tile))
    layer, parameters = made("triton", shape, torch.bfloat16)
    for rows in (3, 300):
        x, slots, weights = batch(shape, torch.bfloat16, rows, 3, seed=rows)
        actual, expected = layer.forward(x, slots, weights).double(), oracle(x, slots, weights, parameters, shape)
        assert float((actual - expected).abs().max() / expected.abs().max()) <= TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("rows", [4, 64, 512])
def test_replayed_from_a_graph(rows: int) -> None:
    """Other rows and other slots at the same addresses; a layer in a graph waits for nobody."""
    shape = SHAPES["many"]
    layer, parameters = made("triton", shape, torch.bfloat16)
    x, slots, weights = batch(shape, torch.bfloat16, rows, 8, seed=0)
    layer.forward(x, slots, weights)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer.forward(x, slots, weights)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for seed in range(1, 4):
        for static, new in zip((x, slots, weights), batch(shape, torch.bfloat16, rows, 8, seed), strict=True):
            static.copy_(new)
        out.fill_(torch.nan)
        graph.replay()
        expected = oracle(x, slots, weights, parameters, shape)
        assert float((out.double() - expected).abs().max() / expected.abs().max()) <= TOLERANCE[torch.bfloat16]


def test_same_bits_every_time() -> None:
    """No atomics: a second run of the same batch has the same bits."""
    shape = SHAPES["A3B"]
    layer, _ = made("triton", shape, torch.bfloat16)
    x, slots, weights = batch(shape, torch.bfloat16, 512, 8, seed=3)
    first = layer.forward(x, slots, weights)
    assert all(torch.equal(first, layer.forward(x, slots, weights)) for _ in range(5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", ["triton", "loop"])
def test_batch_invariant_rows(impl: str, dtype: torch.dtype) -> None:
    """With fixed tiles a row has the same bits alone, among others, and wherever it stands."""
    shape = SHAPES["A3B"] if dtype == torch.bfloat16 and impl == "triton" else SHAPES["ragged"]
    layer, _ = made(impl, shape, dtype, batch_invariant=True)
    top_k = min(8, shape.num_slots)
    x, slots, weights = batch(shape, dtype, 900, top_k, seed=5)
    whole, pairs = layer.forward(x, slots, weights), layer.forward_pairs(x, slots)
    for rows in (slice(0, 1), slice(17, 50), slice(333, 900)):
        assert torch.equal(layer.forward(x[rows], slots[rows], weights[rows]), whole[rows])
    order = torch.randperm(900, generator=torch.Generator(CUDA).manual_seed(1), device=CUDA)
    assert torch.equal(layer.forward(x[order], slots[order], weights[order]), whole[order])
    assert torch.equal(layer.forward_pairs(x[:40], slots[:40]), pairs[: int((slots[:40] >= 0).sum())])


def test_exact_mode_refuses_grouped_mm() -> None:
    with pytest.raises(ConfigError, match=r"moe\.exact: the bits of a row of grouped_mm experts depend"):
        build(SHAPES["even"], dtype=torch.bfloat16, device=CUDA, choose={"experts": "grouped_mm"}, batch_invariant=True)


@pytest.mark.parametrize("tokens", [1, 64])
def test_a_layer_in_one_graph(tokens: int) -> None:
    """Router, choice of replicas, experts and combine of a rank that is alone: captured whole, the host never waits."""
    spec = MoeSpec(
        router=RouterSpec(num_experts=16, top_k=4, normalise="sum"), experts=ExpertSpec(intermediate_size=64)
    )
    group = alone([spec], single(CUDA), CUDA)
    group.exact = False
    layer, parameters = made("triton", ExpertShape(16, 128, 64), torch.bfloat16)
    gate = torch.randn(16, 128, device=CUDA, dtype=torch.bfloat16) / 8
    block = MoeLayer(spec, 0, lambda x: torch.nn.functional.linear(x, gate), None, layer, group, Group())
    static = torch.randn(tokens, 128, device=CUDA).to(torch.bfloat16)
    step = EpStep("local", tokens)
    block(static, step)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = block(static, step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for seed in range(3):
        static.copy_(torch.randn(tokens, 128, generator=torch.Generator(CUDA).manual_seed(seed), device=CUDA))
        out.fill_(torch.nan)
        graph.replay()
        scores, ids = torch.nn.functional.linear(static, gate).float().softmax(-1).topk(4)
        expected = oracle(static, ids.int(), scores / scores.sum(-1, keepdim=True), parameters, layer.shape)
        assert float((out.double() - expected).abs().max() / expected.abs().max()) <= TOLERANCE[torch.bfloat16]

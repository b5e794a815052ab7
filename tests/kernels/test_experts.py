"""Expert back ends: right against float64, equal among themselves, and a row's bits do not depend on its neighbours.

Runs in 3 s.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from phalanx.errors import ConfigError, StepError
from phalanx.kernels import experts
from phalanx.kernels.cpu import library
from phalanx.kernels.experts import Experts, ExpertShape, build, select

CPU = torch.device("cpu")


def usable(impl: str) -> bool:
    try:
        return select(CPU, torch.bfloat16, {"experts": impl})[0] == impl
    except ConfigError:
        return False


IMPLS = [impl for impl in ("cpp", "grouped_mm", "loop") if usable(impl)]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
EACH = pytest.mark.parametrize("impl", IMPLS)

SHAPES = {
    "even": ExpertShape(5, 128, 64),
    "ragged": ExpertShape(4, 72, 88, activation="gelu_tanh"),
    "biased": ExpertShape(3, 40, 104, activation="swiglu_clamped", bias=True, limit=1.5),
    "one": ExpertShape(1, 8, 8, bias=True),
    "tiles": ExpertShape(3, 96, 160, activation="swiglu_clamped", bias=True, limit=1.5),
}


def weights_of(shape: ExpertShape, dtype: torch.dtype, seed: int) -> list[list[Tensor | None]]:
    """Per slot: gate_up, down, gate_up_bias, down_bias."""
    generator = torch.Generator().manual_seed(seed)

    def random(*size: int, scale: float) -> Tensor:
        return (torch.randn(size, generator=generator) * scale).to(dtype)

    hidden, inner = shape.hidden_size, shape.intermediate_size
    return [
        [
            random(2 * inner, hidden, scale=hidden**-0.5),
            random(hidden, inner, scale=inner**-0.5),
            random(2 * inner, scale=1.0) if shape.bias else None,
            random(hidden, scale=1.0) if shape.bias else None,
        ]
        for _ in range(shape.num_slots)
    ]


def made(
    impl: str, shape: ExpertShape, dtype: torch.dtype, seed: int = 0, *, batch_invariant: bool = False
) -> tuple[Experts, list[list[Tensor | None]]]:
    layer = build(shape, dtype=dtype, device=CPU, choose={"experts": impl}, batch_invariant=batch_invariant)
    assert layer.impl == impl
    weights = weights_of(shape, dtype, seed)
    for slot, (gate_up, down, gate_up_bias, down_bias) in enumerate(weights):
        assert gate_up is not None
        assert down is not None
        layer.load(slot, gate_up, down, gate_up_bias, down_bias)
    return layer, weights


def batch(
    shape: ExpertShape, dtype: torch.dtype, rows: int, top_k: int, seed: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, distinct slots per row with some -1, and weights whose unused entries are NaN."""
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn((rows, shape.hidden_size), generator=generator) * 2).to(dtype)
    scores = torch.rand((rows, max(shape.num_slots, top_k)), generator=generator)
    slots = scores.topk(top_k).indices.int()
    slots[(torch.rand((rows, top_k), generator=generator) < 0.3) | (slots >= shape.num_slots)] = -1
    weights = torch.rand((rows, top_k), generator=generator)
    weights[slots < 0] = torch.nan
    return x, slots, weights


def oracle_pair(x: Tensor, weights: list[Tensor | None], shape: ExpertShape) -> Tensor:
    """One row through one expert in float64."""
    gate_up, down, gate_up_bias, down_bias = (None if w is None else w.double() for w in weights)
    assert gate_up is not None
    assert down is not None
    both = gate_up @ x.double() + (0 if gate_up_bias is None else gate_up_bias)
    gate, up = both[: shape.intermediate_size], both[shape.intermediate_size :]
    if shape.activation == "silu":
        inner = gate / (1 + (-gate).exp()) * up
    elif shape.activation == "gelu_tanh":
        inner = gate / 2 * (1 + ((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)).tanh()) * up
    else:
        gate, up = gate.clamp(max=shape.limit), up.clamp(-shape.limit, shape.limit)
        inner = (up + 1) * gate / (1 + (-shape.alpha * gate).exp())
    return down @ inner + (0 if down_bias is None else down_bias)


def oracle(
    x: Tensor, slots: Tensor, weights: Tensor, parameters: list[list[Tensor | None]], shape: ExpertShape
) -> tuple[Tensor, Tensor]:
    """The sum and the pairs, in float64."""
    total = torch.zeros(x.shape, dtype=torch.float64)
    pairs = []
    for row, choices in enumerate(slots.tolist()):
        for j, slot in enumerate(choices):
            if slot >= 0:
                pairs.append(oracle_pair(x[row], parameters[slot], shape))
                total[row] += weights[row, j].double() * pairs[-1]
    return total, torch.stack(pairs) if pairs else total[:0]


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Within 1e-5 of the scale in fp32; bf16 rounds the middle and the output."""
    assert actual.shape == expected.shape
    if expected.numel():
        tolerance = 1e-5 if dtype == torch.float32 else 1.6e-2
        assert (actual.double() - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1)


@DTYPES
@EACH
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("rows", "top_k"), [(0, 2), (1, 1), (3, 2), (40, 3)])
def test_equals_float64(impl: str, dtype: torch.dtype, shape: ExpertShape, rows: int, top_k: int) -> None:
    layer, parameters = made(impl, shape, dtype)
    x, slots, weights = batch(shape, dtype, rows, top_k)
    total, pairs = oracle(x, slots, weights, parameters, shape)
    out, each = layer.forward(x, slots, weights), layer.forward_pairs(x, slots)
    assert out.dtype == torch.float32
    assert each.dtype == dtype
    assert_close(out, total, dtype)
    assert_close(each, pairs, dtype)


@DTYPES
@EACH
def test_sum_of_the_pairs_is_the_forward(impl: str, dtype: torch.dtype) -> None:
    shape = SHAPES["even"]
    layer, _ = made(impl, shape, dtype)
    x, slots, weights = batch(shape, dtype, 30, 4)
    pairs = torch.zeros((30, 4, shape.hidden_size), dtype=dtype)
    pairs[slots >= 0] = layer.forward_pairs(x, slots)
    expected = torch.zeros(30, shape.hidden_size)
    for j in range(4):
        expected += pairs[:, j].float() * weights[:, j, None].nan_to_num(0)
    torch.testing.assert_close(layer.forward(x, slots, weights), expected, atol=1e-6, rtol=1e-6)


@DTYPES
@EACH
def test_no_slot_at_all(impl: str, dtype: torch.dtype) -> None:
    layer, _ = made(impl, SHAPES["biased"], dtype)
    x, slots = torch.full((4, 40), torch.nan, dtype=dtype), torch.full((4, 2), -1, dtype=torch.int32)
    assert torch.equal(layer.forward(x, slots, torch.full((4, 2), torch.nan)), torch.zeros(4, 40))
    assert layer.forward_pairs(x, slots).shape == (0, 40)


@DTYPES
@EACH
def test_rows_of_poison_touch_no_other(impl: str, dtype: torch.dtype) -> None:
    shape = SHAPES["even"]
    layer, parameters = made(impl, shape, dtype)
    x, slots, weights = batch(shape, dtype, 20, 2)
    total, _ = oracle(x, slots, weights, parameters, shape)
    x[::2] = torch.nan
    assert_close(layer.forward(x, slots, weights)[1::2], total[1::2], dtype)


@DTYPES
@EACH
@pytest.mark.parametrize("inner", [200, 256])  # multiples of 32 go by tiles
def test_bits_do_not_depend_on_other_rows_or_threads(impl: str, dtype: torch.dtype, inner: int) -> None:
    shape = ExpertShape(3, 1024, inner)
    if impl == "grouped_mm":
        with pytest.raises(ConfigError, match=r"moe\.exact: the bits of a row of grouped_mm experts depend"):
            made(impl, shape, dtype, batch_invariant=True)
        return
    layer, _ = made(impl, shape, dtype, batch_invariant=True)
    assert layer.batch_invariant
    x, slots, weights = batch(shape, dtype, 500, 2)
    torch.set_num_threads(3)
    full, pairs = layer.forward(x, slots, weights), layer.forward_pairs(x, slots)
    torch.set_num_threads(1)
    assert torch.equal(layer.forward(x, slots, weights), full)
    for count in (1, 2, 3, 5, 6, 7, 13, 64, 193, 499):
        some = slice(500 - count, 500)
        assert torch.equal(layer.forward(x[some], slots[some], weights[some]), full[some]), count
        assert torch.equal(layer.forward_pairs(x[:count], slots[:count]), pairs[: int((slots[:count] >= 0).sum())])


@DTYPES
@EACH
def test_migration_overwrites_rows_in_place(impl: str, dtype: torch.dtype) -> None:
    shape = SHAPES["biased"]
    (ours, _), (other, other_parameters) = made(impl, shape, dtype, seed=0), made(impl, shape, dtype, seed=9)
    assert ours.rows.dtype == torch.uint8
    assert ours.rows.is_contiguous()
    assert ours.rows.shape[0] == shape.num_slots
    assert torch.equal(other.rows, made(impl, shape, dtype, seed=9)[0].rows)  # padding is defined: checksums agree
    x, slots, weights = batch(shape, dtype, 12, 2)
    before = ours.forward(x, slots, weights)
    ours.rows.copy_(other.rows)
    after = ours.forward(x, slots, weights)
    assert torch.equal(after, other.forward(x, slots, weights))
    assert not torch.equal(after, before)
    assert_close(after, oracle(x, slots, weights, other_parameters, shape)[0], dtype)


@EACH
def test_load_takes_views_and_other_dtypes(impl: str) -> None:
    shape = ExpertShape(2, 16, 24)
    straight, twisted = (build(shape, dtype=torch.bfloat16, device=CPU, choose={"experts": impl}) for _ in range(2))
    gate_up, down = torch.randn(48, 16), torch.randn(16, 24)
    straight.load(1, gate_up.bfloat16(), down.bfloat16())
    twisted.load(1, gate_up.T.contiguous().T, down.T.contiguous().T)
    assert torch.equal(straight.rows, twisted.rows)


@pytest.mark.skipif("cpp" not in IMPLS, reason="no C++ kernels")
def test_a_slot_out_of_range_is_refused() -> None:
    layer, _ = made("cpp", SHAPES["even"], torch.float32)
    with pytest.raises(StepError, match="past the last of 5"):
        layer.forward(torch.zeros(1, 128), torch.tensor([[5]], dtype=torch.int32), torch.ones(1, 1))


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"choose": {"experts": "magic"}}, r"'magic' is unknown; known: cpp, triton, grouped_mm, loop"),
        ({"shape": ExpertShape(1, 8, 8, activation="relu")}, "'relu' is unknown; use one of silu, gelu_tanh"),
        ({"shape": ExpertShape(1, 0, 8)}, "hidden_size is 0"),
        ({"shape": ExpertShape(1, 8, 7), "choose": {"experts": "cpp"}}, "inner rows .* not whole 32-bit"),
        ({"shape": ExpertShape(1, 8, 6), "choose": {"experts": "grouped_mm"}}, "not whole 16-byte"),
        ({"shape": ExpertShape(1024, 8, 8), "choose": {"experts": "grouped_mm"}}, "at most 1023"),
        ({"choose": {"experts": "triton"}}, "the weights are on cpu"),
    ]
    for change, sentence in cases:
        arguments = {"shape": SHAPES["even"], "dtype": torch.bfloat16, "device": CPU, **change}
        with pytest.raises(ConfigError, match=sentence):
            build(**arguments)
    monkeypatch.setattr(library, "load", lambda: library.Library(None, "no C++ compiler"))
    chosen, passed = select(CPU, torch.float32)
    assert chosen in ("grouped_mm", "loop")
    assert passed[0] == ("cpp", "no C++ compiler")
    assert experts.select(CPU, torch.float32, {"experts": "loop"})[1][-1] == ("grouped_mm", "loop was asked for")

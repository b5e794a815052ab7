"""Packed linear layers: right, and a row's bits do not depend on the rows beside it."""

import pytest
import torch

from phalanx.errors import ConfigError
from phalanx.kernels import linear
from phalanx.kernels.cpu import library
from phalanx.kernels.linear import pack

CPU = torch.device("cpu")


def usable(impl: str) -> bool:
    try:
        return linear.select(CPU, torch.bfloat16, {"linear": impl})[0] == impl
    except ConfigError:
        return False


IMPLS = [impl for impl in ("cpp", "onednn", "torch") if usable(impl)]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
EACH = pytest.mark.parametrize("impl", IMPLS)


@DTYPES
@EACH
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_a_matrix_product(impl: str, dtype: torch.dtype, with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn((70, 34), generator=generator).to(dtype)
    bias = torch.randn(70, generator=generator).to(dtype) if with_bias else None
    layer = pack(weight, bias, choose={"linear": impl})
    assert layer.impl == impl
    for shape in ((34,), (0, 34), (1, 34), (5, 34), (2, 3, 34)):
        x = torch.randn(shape, generator=generator).to(dtype)
        expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
        out = layer(x)
        assert out.dtype == dtype
        assert out.shape == expected.shape
        tolerance = 1e-5 if dtype == torch.float32 else 1.6e-2
        torch.testing.assert_close(out.double(), expected, atol=tolerance * 3, rtol=tolerance)


@pytest.mark.skipif("cpp" not in IMPLS, reason="no C++ kernels")
@DTYPES
@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (100, 1024), (64, 3072)])
def test_batch_invariant_rows(dtype: torch.dtype, rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn((rows, columns), generator=generator).to(dtype)
    x = torch.randn((257, columns), generator=generator).to(dtype)
    layer = pack(weight, choose={"linear": "cpp"})
    assert layer.batch_invariant
    full = layer(x)
    for count in (*range(1, 65), 100):
        assert torch.equal(layer(x[:count]), full[:count]), count
        assert torch.equal(layer(x[257 - count :]), full[257 - count :]), count


@DTYPES
@EACH
@pytest.mark.parametrize("inputs", [6, 64, 160], ids="{} inputs".format)  # multiples of 32 go by tiles
@pytest.mark.parametrize("outputs", [1, 15, 16, 47, 48, 49, 97, 500])
def test_any_number_of_outputs(impl: str, dtype: torch.dtype, outputs: int, inputs: int) -> None:
    # Small integers: every product and sum is exact, so the result must be too.
    generator = torch.Generator().manual_seed(outputs)
    weight = torch.randint(-2, 3, (outputs, inputs), generator=generator).to(dtype)
    bias = torch.randint(-2, 3, (outputs,), generator=generator).to(dtype)
    x = torch.randint(-2, 3, (300, 2 * inputs), generator=generator).to(dtype)[:, ::2]  # strided too
    layer = pack(weight, bias, choose={"linear": impl})
    for rows in (1, 5, 16, 17, 31, 32, 33, 300):
        exact = (x[:rows].double() @ weight.double().T + bias.double()).to(dtype)
        assert torch.equal(layer(x[:rows]), exact), rows


@pytest.mark.skipif("cpp" not in IMPLS, reason="no C++ kernels")
@DTYPES
def test_cpp_bits_do_not_depend_on_threads_or_rows(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    layer = pack(torch.randn((300, 2048), generator=generator).to(dtype), choose={"linear": "cpp"})
    assert layer.batch_invariant
    x = torch.randn((400, 2048), generator=generator).to(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    full = layer(x)
    torch.set_num_threads(1)
    one = layer(x)
    torch.set_num_threads(before)
    assert torch.equal(full, one)
    for count in (1, 2, 7, 8, 9, 191, 193):
        assert torch.equal(layer(x[:count]), full[:count]), count


@EACH
def test_the_packed_weight_is_a_copy(impl: str) -> None:
    weight = torch.eye(16)
    layer = pack(weight, choose={"linear": impl})
    weight.zero_()
    expected = torch.zeros(1, 16) if impl == "torch" else torch.ones(1, 16)
    assert torch.equal(layer(torch.ones(1, 16)), expected)


def test_unknown_implementation() -> None:
    with pytest.raises(ConfigError, match=r"'magic' is unknown; known: cpp, onednn, torch"):
        pack(torch.eye(2), choose={"linear": "magic"})


def test_falls_back_to_what_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pack(torch.eye(2, dtype=torch.float16)).impl == "torch"
    for impl in ("cpp", "onednn"):
        with pytest.raises(ConfigError, match=rf"{impl}.*float16"):
            pack(torch.eye(2, dtype=torch.float16), choose={"linear": impl})
    odd = torch.ones(4, 3, dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="not whole 32-bit words"):
        pack(odd, choose={"linear": "cpp"})
    assert torch.equal(pack(odd)(odd), torch.full((4, 4), 3, dtype=torch.bfloat16))
    monkeypatch.setattr(library, "load", lambda: library.Library(None, "no C++ compiler"))
    assert pack(torch.eye(2)).impl in ("onednn", "torch")
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert pack(torch.eye(2)).impl == "torch"

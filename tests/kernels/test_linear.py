"""Packed linear layers: right, and a row's bits do not depend on the rows beside it."""

import pytest
import torch

from phalanx.errors import ConfigError
from phalanx.kernels import linear
from phalanx.kernels.linear import pack

IMPLS = ("onednn", "torch") if linear.onednn_refuses(torch.device("cpu"), torch.bfloat16) is None else ("torch",)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
EACH = pytest.mark.parametrize("impl", IMPLS)


@DTYPES
@EACH
@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_a_matrix_product(impl: str, dtype: torch.dtype, batch_invariant: bool, with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn((70, 33), generator=generator).to(dtype)
    bias = torch.randn(70, generator=generator).to(dtype) if with_bias else None
    layer = pack(weight, bias, choose={"linear": impl}, batch_invariant=batch_invariant)
    assert layer.impl == impl
    for shape in ((33,), (0, 33), (1, 33), (5, 33), (2, 3, 33)):
        x = torch.randn(shape, generator=generator).to(dtype)
        expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
        out = layer(x)
        assert out.dtype == dtype
        assert out.shape == expected.shape
        tolerance = 1e-5 if dtype == torch.float32 else 1.6e-2
        torch.testing.assert_close(out.double(), expected, atol=tolerance * 3, rtol=tolerance)


@DTYPES
@EACH
@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (128, 1024), (64, 3072)])
def test_batch_invariant_rows(impl: str, dtype: torch.dtype, rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn((rows, columns), generator=generator).to(dtype)
    x = torch.randn((257, columns), generator=generator).to(dtype)
    layer = pack(weight, choose={"linear": impl}, batch_invariant=True)
    full = layer(x)
    for count in (*range(1, 65), 100):
        assert torch.equal(layer(x[:count]), full[:count]), count
        assert torch.equal(layer(x[257 - count :]), full[257 - count :]), count


def test_the_packed_weight_is_a_copy() -> None:
    weight = torch.eye(16)
    layer = pack(weight)
    if layer.impl == "onednn":
        weight.zero_()
        assert torch.equal(layer(torch.ones(1, 16)), torch.ones(1, 16))


def test_unknown_implementation() -> None:
    with pytest.raises(ConfigError, match=r"'magic' is unknown; known: onednn, torch"):
        pack(torch.eye(2), choose={"linear": "magic"})


def test_falls_back_where_onednn_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pack(torch.eye(2, dtype=torch.float16)).impl == "torch"
    with pytest.raises(ConfigError, match="float16"):
        pack(torch.eye(2, dtype=torch.float16), choose={"linear": "onednn"})
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert pack(torch.eye(2)).impl == "torch"

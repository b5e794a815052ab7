"""Row-wise C++ ops: a row has the same bits alone and in a batch, with any threads; the residual is what was normed."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from phalanx.kernels import act_mul, add_rms_norm, qkv_prologue, registry
from phalanx.kernels.cpu import library

CPU = torch.device("cpu")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
needs_cpp = pytest.mark.skipif(library.load().handle is None, reason=library.load().reason or "built")


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def rows_of(inputs: dict[str, Any], names: tuple[str, ...], row: int) -> dict[str, Any]:
    return {name: value[row : row + 1].clone() if name in names else value for name, value in inputs.items()}


@needs_cpp
@DTYPES
def test_norm_and_activation(dtype: torch.dtype, three_threads: None) -> None:
    norm = registry.bind("add_rms_norm", device=CPU, dtype=dtype)
    act = registry.bind("act_mul", device=CPU, dtype=dtype)
    norm_inputs = add_rms_norm.make_inputs(add_rms_norm.Problem(50, 1000), generator(), dtype)
    act_inputs = act_mul.make_inputs(act_mul.Problem(50, 1000), generator(), dtype)
    y, stream = norm(**norm_inputs)
    activated = act(**act_inputs)
    for row in (0, 17, 49):
        y_row, stream_row = norm(**rows_of(norm_inputs, ("x", "residual"), row))
        assert torch.equal(y_row[0], y[row])
        assert torch.equal(stream_row[0], stream[row])
        assert torch.equal(act(**rows_of(act_inputs, ("gate_up",), row))[0], activated[row])


@needs_cpp
@DTYPES
def test_prologue(dtype: torch.dtype, three_threads: None) -> None:
    prologue = registry.bind("qkv_prologue", device=CPU, dtype=dtype)
    inputs = qkv_prologue.make_inputs(qkv_prologue.Problem(40, 2, 3, 80, 48), generator(), dtype)
    alone = {**inputs, "kv": inputs["kv"].clone()}
    q = prologue(**inputs)
    for row in range(40):
        q_row = prologue(**rows_of(alone, ("qkv", "positions", "slot_mapping"), row))
        assert torch.equal(q_row[:, 0], q[:, row])
    assert torch.equal(alone["kv"].nan_to_num(9.0), inputs["kv"].nan_to_num(9.0))


@DTYPES
@pytest.mark.parametrize("impl", ["cpp", "reference"])
def test_the_norm_is_that_of_the_rounded_residual(impl: str, dtype: torch.dtype) -> None:
    if impl == "cpp" and library.refuses(dtype) is not None:
        pytest.skip("no C++ kernels")
    norm = registry.bind("add_rms_norm", device=CPU, dtype=dtype, choose={"add_rms_norm": impl})
    inputs = add_rms_norm.make_inputs(add_rms_norm.Problem(20, 500), generator(), dtype)
    y, stream = norm(**inputs)
    assert torch.equal(stream, (inputs["x"].float() + inputs["residual"].float()).to(dtype))
    again, same = norm(stream, None, inputs["weight"], inputs["eps"])
    assert torch.equal(again, y)
    assert same is stream

"""Every implementation of every op against its reference in fp32, over the op's own problems."""

import hashlib
from typing import Any

import pytest
import torch

from phalanx import plugins
from phalanx.kernels import registry
from phalanx.kernels.op import DEFAULT_TOLERANCE, Impl, Op

CPU = torch.device("cpu")
OPS: list[Op] = [module.OP for _, module in plugins.entries("kernels", ("OP",))]
CASES = [
    pytest.param(op, impl, dtype, problem, id=f"{op.name}-{impl.name}-{str(dtype)[6:]}-{i}")
    for op in OPS
    for impl in registry.implementations(op, CPU)
    for dtype in (torch.float32, torch.bfloat16)
    for i, problem in enumerate(op.problems["test"])
]


def seeded(text: str) -> torch.Generator:
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]))


def widened(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def results(op: Op, out: Any, inputs: dict[str, Any]) -> list[torch.Tensor]:
    outputs = list(out) if isinstance(out, tuple) else [out]
    return [*outputs, *(inputs[name] for name in op.mutates)]


@pytest.mark.parametrize(("op", "impl", "dtype", "problem"), CASES)
def test_implementation_equals_reference(op: Op, impl: Impl, dtype: torch.dtype, problem: Any) -> None:
    reason = impl.supports(dtype)
    if reason is not None:
        pytest.skip(reason)
    inputs = op.make_inputs(problem, seeded(f"{op.name}{problem}"), dtype)
    # The oracle sees the same (rounded) inputs in fp32; only the implementation rounds on the way.
    oracle_inputs = {name: widened(value.clone() if name in op.mutates else value) for name, value in inputs.items()}
    expected = results(op, op.reference(**oracle_inputs), oracle_inputs)
    actual = results(op, impl.load(dtype)(**inputs), inputs)
    tolerance = op.tolerance.get(dtype, DEFAULT_TOLERANCE[dtype])
    for got, want in zip(actual, expected, strict=True):
        assert got.dtype == (want.dtype if not want.is_floating_point() else dtype)
        assert got.is_contiguous()
        torch.testing.assert_close(got.float(), want.float(), **tolerance._asdict(), equal_nan=True)


def test_every_op_has_problems_and_costs() -> None:
    assert {op.name for op in OPS} >= {"act_mul", "add_rms_norm", "paged_attention", "qkv_prologue", "sample"}
    for op in OPS:
        for problem in (*op.problems["test"], *op.problems["bench"]):
            cost = op.cost(problem, torch.bfloat16)
            assert cost.bytes >= 0
            assert cost.flops >= 0
        assert all(op.cost(problem, torch.bfloat16).flops > 0 for problem in op.problems["bench"])

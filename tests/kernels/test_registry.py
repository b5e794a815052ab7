"""Binding: what is chosen, what is refused, and that the reasons are told."""

import importlib.util

import pytest
import torch

from phalanx.errors import ConfigError
from phalanx.kernels import act_mul, linear, registry
from phalanx.kernels.cpu import library

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
needs_cpp = pytest.mark.skipif(library.load().handle is None, reason=library.load().reason or "built")


def test_unknown_op_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"act_mul, add_rms_norm, .*paged_attention"):
        registry.bind("attention", device=CPU, dtype=torch.float32)


def test_unknown_implementation_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"act_mul: implementation 'avx' is unknown on cpu; known: cpp, reference"):
        registry.bind("act_mul", device=CPU, dtype=torch.float32, choose={"act_mul": "avx"})


def test_a_choice_for_an_unknown_op_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"op 'norm' is unknown; known: act_mul, .*, linear"):
        registry.bind("act_mul", device=CPU, dtype=torch.float32, choose={"norm": "cpp"})


def test_the_reference_can_be_chosen() -> None:
    bound = registry.bind("act_mul", device=CPU, dtype=torch.float32, choose={"act_mul": "reference"})
    assert bound is act_mul.reference


def test_cuda_falls_back_to_the_references_but_for_experts() -> None:
    rows = {row.op: row for row in registry.explain(device=CUDA, dtype=torch.bfloat16)}
    assert rows.pop("linear").impl == "torch"
    assert rows.pop("experts").impl == ("triton" if importlib.util.find_spec("triton") else "grouped_mm")
    assert {row.impl for row in rows.values()} == {"reference"}


@needs_cpp
def test_explain_tells_what_runs_and_why() -> None:
    rows = {row.op: row for row in registry.explain(device=CPU, dtype=torch.bfloat16, choose={"sample": "reference"})}
    assert rows["paged_attention"] == ("paged_attention", "cpp", True, ())
    assert rows["linear"][:3] == ("linear", "cpp", True)
    assert rows["sample"].rejected == (("cpp", "reference was asked for"),)
    (half,) = [row for row in registry.explain(device=CPU, dtype=torch.float16) if row.op == "act_mul"]
    assert half.impl == "reference"
    assert half.rejected == (("cpp", "torch.float16 is not one of fp32, bf16"),)


def test_without_a_library_the_reason_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "load", lambda: library.Library(None, "no C++ compiler"))
    assert linear.select(CPU, torch.float32)[1][0] == ("cpp", "no C++ compiler")
    assert registry.bind("act_mul", device=CPU, dtype=torch.float32) is act_mul.reference
    (row,) = [row for row in registry.explain(device=CPU, dtype=torch.float32) if row.op == "act_mul"]
    assert row.rejected == (("cpp", "no C++ compiler"),)
    with pytest.raises(ConfigError, match=r"act_mul: 'cpp' cannot be used: no C\+\+ compiler"):
        registry.bind("act_mul", device=CPU, dtype=torch.float32, choose={"act_mul": "cpp"})


def test_activation_must_be_known() -> None:
    for choose in ({}, {"act_mul": "reference"}):
        function = registry.bind("act_mul", device=CPU, dtype=torch.float32, choose=choose)
        with pytest.raises(ConfigError, match="'relu' is unknown; use one of silu, gelu_tanh"):
            function(torch.zeros(1, 4), "relu")

"""Building the C++ kernels: once, atomically, on any CPU, and never a reason to fail."""

import ctypes
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from phalanx import plugins
from phalanx.kernels.cpu import library
from phalanx.kernels.linear import pack

COMPILER = shutil.which(library.COMPILER)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


def fresh_load() -> library.Library:
    return library.load.__wrapped__()


@needs_compiler
def test_this_machine_builds_the_kernels() -> None:
    assert library.load().handle is not None, library.load().reason


@needs_compiler
def test_builds_once_and_leaves_no_other_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert COMPILER is not None
    monkeypatch.setattr(library, "FLAGS", (*library.FLAGS, "-O0"))  # quick to build
    path = library.build(COMPILER, tmp_path / "new")
    built = path.stat().st_mtime_ns
    assert library.build(COMPILER, tmp_path / "new") == path
    assert path.stat().st_mtime_ns == built
    assert list(path.parent.iterdir()) == [path]


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "COMPILER", "no-such-compiler")
    assert fresh_load() == (None, "no C++ compiler: no-such-compiler is not on the path")


@needs_compiler
def test_a_build_error_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(library, "FLAGS", (*library.FLAGS, "-march=abacus"))
    loaded = fresh_load()
    assert loaded.handle is None
    assert "abacus" in loaded.reason
    assert list((tmp_path / "cache").iterdir()) == []


@needs_compiler
def test_a_cache_that_cannot_be_written_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(library, "CACHE", tmp_path / "file")
    loaded = fresh_load()
    assert loaded.handle is None
    assert "cannot be built or loaded" in loaded.reason


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory) -> library.Library:
    """The same sources for a CPU with SSE4 alone: no AVX, no fused multiply-add."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "FLAGS", (*library.FLAGS, "-march=x86-64-v2", "-O1"))
        assert COMPILER is not None
        path = library.build(COMPILER, tmp_path_factory.mktemp("portable"))
    return library.Library(ctypes.CDLL(str(path)), "")


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64 flags")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["act_mul", "add_rms_norm", "paged_attention", "qkv_prologue", "sample"])
def test_portable_code_path(
    name: str, dtype: torch.dtype, portable: library.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "load", lambda: portable)
    op = plugins.load("kernels", name).OP
    (impl,) = plugins.load("kernels/cpu", name).IMPLS
    function = impl.load(dtype)
    for problem in op.problems["test"][-4:]:
        generator = torch.Generator().manual_seed(3)
        inputs = op.make_inputs(problem, generator, dtype)
        oracle: dict[str, Any] = {k: v.clone() if k in op.mutates else v for k, v in inputs.items()}
        expected, actual = op.reference(**oracle), function(**inputs)
        pairs = zip(expected, actual, strict=True) if isinstance(expected, tuple) else [(expected, actual)]
        for want, got in (*pairs, *((oracle[name], inputs[name]) for name in op.mutates)):
            atol, rtol = (1e-5, 1.3e-6) if dtype == torch.float32 else (1e-3, 1.6e-2)
            torch.testing.assert_close(got, want, atol=atol, rtol=rtol, equal_nan=True)


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64 flags")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_portable_linear(dtype: torch.dtype, portable: library.Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "load", lambda: portable)
    generator = torch.Generator().manual_seed(4)
    weight, x = (torch.randint(-3, 4, (rows, 70), generator=generator).to(dtype) for rows in (130, 19))
    exact = (x.double() @ weight.double().T).to(dtype)
    assert torch.equal(pack(weight, choose={"linear": "cpp"})(x), exact)


def test_importing_the_kernels_neither_builds_nor_touches_a_gpu() -> None:
    code = (
        "import phalanx.kernels.registry, phalanx.kernels.cpu.paged_attention as p, torch;"
        "from phalanx.kernels.cpu import library;"
        "assert library.load.cache_info().currsize == 0;"
        "assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)

"""Build the C++ kernels once per machine and load them.

Plain C functions by ctypes: no torch headers, so the build takes seconds. The library must be loaded after torch, then
both share one OpenMP runtime and one team of threads.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from phalanx import log

SOURCES = Path(__file__).parent / "csrc"
CACHE = Path.home() / ".cache" / "phalanx" / "kernels"
COMPILER = "g++"
FLAGS = (
    *(
        "-std=c++17",
        "-O3",
        "-march=native",
        "-mprefer-vector-width=512",
        "-fopenmp",
        "-shared",
        "-fPIC",
        "-fvisibility=hidden",
    ),
    *("-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"),  # neither changes a value
)
SUFFIX = {torch.float32: "fp32", torch.bfloat16: "bf16"}


class Library(NamedTuple):
    """The loaded library, or why there is none."""

    handle: ctypes.CDLL | None
    reason: str


def refuses(dtype: torch.dtype) -> str | None:
    """Why the C++ kernels cannot serve this dtype on this machine, or None."""
    if dtype not in SUFFIX:
        return f"{dtype} is not one of fp32, bf16"
    library = load()
    return None if library.handle is not None else library.reason


def function(name: str, argtypes: tuple[type, ...], restype: type | None = None) -> Callable[..., int]:
    """A C function, its argument types bound; only after `refuses` returned None."""
    handle = load().handle
    assert handle is not None, "refuses() was not asked"
    bound = getattr(handle, name)
    bound.argtypes, bound.restype = argtypes, restype
    return bound  # type: ignore[no-any-return]


@cache
def load() -> Library:
    """Build if this machine has not built these sources yet, and load; once per process."""
    compiler = shutil.which(COMPILER)
    if compiler is None:
        return _none(f"no C++ compiler: {COMPILER} is not on the path")
    try:
        return Library(ctypes.CDLL(str(build(compiler, CACHE))), "")
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if "error" in line]
        return _none(f"{COMPILER} failed: {(lines or ['no message'])[0]}")
    except OSError as error:
        return _none(f"the C++ library cannot be built or loaded: {error}")


def _none(reason: str) -> Library:
    log.get("kernels").warning("C++ kernels unavailable", extra=log.fields(reason=reason))
    return Library(None, reason)


def build(compiler: str, folder: Path) -> Path:
    """Compile all sources into one library whose name is the digest of everything it depends on.

    Many processes may build at once: each writes its own temporary file and renames it, so no lock is needed and a
    reader never sees half a file.
    """
    sources = sorted(SOURCES.glob("*.cpp"))
    path = folder / f"{_digest(compiler)}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor, temporary = tempfile.mkstemp(suffix=".so", dir=folder)
    os.close(descriptor)
    try:
        command = [compiler, *FLAGS, "-o", temporary, *map(str, sources)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path


def _digest(compiler: str) -> str:
    """Sources, compiler and flags; and the CPU, since `-march=native` code of one may crash on another."""
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True).stdout
    digest = hashlib.sha256(version + " ".join(FLAGS).encode())
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    for key in ("model", "flags", "Features"):
        digest.update(next((line for line in lines if line.startswith(key)), "").encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:24]

"""What an op is: its definition in plain torch, how to test it, what it costs; and what an implementation of it is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

Function = Callable[..., Any]


class Cost(NamedTuple):
    """The least work an op can do: bytes that must cross memory, floating-point operations."""

    bytes: int
    flops: int


class Tolerance(NamedTuple):
    """Absolute and relative error allowed against the reference in fp32."""

    atol: float
    rtol: float


# The field's usual table. A bf16 result is rounded once at the end, hence one part in 2^-7 of relative error.
DEFAULT_TOLERANCE: Mapping[torch.dtype, Tolerance] = {
    torch.float32: Tolerance(1e-5, 1.3e-6),
    torch.float16: Tolerance(1e-3, 1e-3),
    torch.bfloat16: Tolerance(1e-3, 1.6e-2),
}


@dataclass(frozen=True, slots=True)
class Op:
    """An op. `kernels/<name>.py` exports it as `OP`; tests and benchmarks pick it up from there.

    Args:
        name: the module's name.
        reference: plain torch with fp32 maths on any device, without a host synchronisation; the op's definition.
        make_inputs: `(problem, generator, dtype) -> keyword arguments` of the op, on the CPU.
        cost: `(problem, dtype) -> Cost`.
        problems: `"test"` and `"bench"` problems; each a NamedTuple of static facts.
        mutates: names of the arguments the op writes into.
        tolerance: per dtype, where the default does not fit, with the reason beside it.
    """

    name: str
    reference: Function
    make_inputs: Callable[[Any, torch.Generator, torch.dtype], dict[str, Any]]
    cost: Callable[[Any, torch.dtype], Cost]
    problems: Mapping[str, tuple[Any, ...]]
    mutates: tuple[str, ...] = ()
    tolerance: Mapping[torch.dtype, Tolerance] = field(default_factory=lambda: DEFAULT_TOLERANCE)


@dataclass(frozen=True, slots=True)
class Impl:
    """One way to compute an op. `kernels/<cpu|triton>/<op>.py` exports a tuple of them as `IMPLS`, best first.

    Args:
        name: what `choose` selects it by.
        supports: `dtype -> None`, or the reason why not, which `explain` shows.
        load: `dtype -> function`; called once per bind, and only if supported.
        batch_invariant: a row's result has the same bits whatever else is in the batch.
    """

    name: str
    supports: Callable[[torch.dtype], str | None]
    load: Callable[[torch.dtype], Function]
    batch_invariant: bool = False

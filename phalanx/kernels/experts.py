"""The experts of a mixture-of-experts layer: one interface, several back ends, chosen once when a model is built."""

from collections.abc import Callable, Mapping
from functools import partial

import torch

from phalanx.errors import ConfigError
from phalanx.kernels.cpu import experts as cpp
from phalanx.kernels.expert_shape import Experts, ExpertShape
from phalanx.kernels.experts_torch import GroupedExperts, LoopExperts, refuses_grouped
from phalanx.kernels.triton import moe_ffn as triton

__all__ = ["ExpertShape", "Experts", "build", "select"]

ANY_SHAPE = ExpertShape(num_slots=1, hidden_size=64, intermediate_size=64)


VARYING = "moe.exact: the bits of a row of grouped_mm experts depend on the rows beside it"


def build(
    shape: ExpertShape,
    *,
    dtype: torch.dtype,
    device: torch.device,
    choose: Mapping[str, str] | None = None,
    batch_invariant: bool = False,
) -> Experts:
    """Storage and functions for the experts of one layer, all slots zero until `load`.

    Args:
        shape: sizes and activation.
        dtype: of weights and rows.
        device: of both.
        choose: `{"experts": "cpp" | "triton" | "grouped_mm" | "loop"}`; by default the first that can be used.
        batch_invariant: the bits of a row must not depend on the rows beside it.

    Raises:
        ConfigError: the shape is wrong, or the chosen back end is unknown or cannot compute it.
    """
    shape.check()
    impl, _ = select(device, dtype, choose, shape, batch_invariant=batch_invariant)
    make: dict[str, Callable[[ExpertShape, torch.dtype, torch.device], Experts]] = {
        "cpp": cpp.CppExperts,
        "triton": partial(triton.TritonExperts, batch_invariant=batch_invariant),
        "grouped_mm": GroupedExperts,
        "loop": partial(LoopExperts, batch_invariant=batch_invariant),
    }
    return make[impl](shape, dtype, device)


def select(
    device: torch.device,
    dtype: torch.dtype,
    choose: Mapping[str, str] | None = None,
    shape: ExpertShape = ANY_SHAPE,
    *,
    batch_invariant: bool = False,
) -> tuple[str, tuple[tuple[str, str], ...]]:
    """The back end `build` takes, and (name, reason) of those it had to pass over.

    Raises:
        ConfigError: as `build`.
    """
    reasons = {
        "cpp": cpp.refuses(shape, dtype, device),
        "triton": triton.refuses(dtype, device),
        "grouped_mm": refuses_grouped(shape, dtype),
        "loop": None,
    }
    if batch_invariant:
        reasons["grouped_mm"] = reasons["grouped_mm"] or VARYING
    wanted = (choose or {}).get("experts")
    if wanted is not None and wanted not in reasons:
        raise ConfigError(f"kernels.experts: implementation {wanted!r} is unknown; known: {', '.join(reasons)}")
    if wanted is not None and reasons[wanted] is not None:
        raise ConfigError(f"kernels.experts: {wanted!r} cannot be used: {reasons[wanted]}; leave it out")
    chosen = wanted or next(impl for impl, reason in reasons.items() if reason is None)
    passed = list(reasons)[: list(reasons).index(chosen)]
    return chosen, tuple((impl, reasons[impl] or f"{wanted} was asked for") for impl in passed)

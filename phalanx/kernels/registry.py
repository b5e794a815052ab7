"""Choose an implementation once, when a model is built; a call then costs no dispatch.

Nothing registers itself: an op is a module `kernels/<op>.py` with an `OP`, its implementations are the `IMPLS` of the
module of the same name in the device's folder, and the reference is the last resort. Linear layers are bound to their
weight by `linear.pack`, experts by `experts.build`; these two are only explained here.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from phalanx import plugins
from phalanx.errors import ConfigError
from phalanx.kernels import experts, linear
from phalanx.kernels.op import Function, Impl, Op

FOLDERS = {"cpu": "kernels/cpu", "cuda": "kernels/triton"}


class Choice(NamedTuple):
    """One row of `explain`: what an op runs, and why every better implementation was refused."""

    op: str
    impl: str
    batch_invariant: bool
    rejected: tuple[tuple[str, str], ...]


def bind(op: str, *, device: torch.device, dtype: torch.dtype, choose: Mapping[str, str] | None = None) -> Function:
    """The function that computes `op` on `device` for activations of `dtype`.

    Args:
        op: name of a module of `phalanx.kernels`; its reference documents the arguments.
        device: where all tensors will be.
        dtype: of activations and KV; weights of norms, sinks and logits are fp32 always.
        choose: op name -> implementation name, for example `{"paged_attention": "reference"}`.

    Raises:
        ConfigError: the op or the implementation is unknown, or the chosen one does not support these facts.
    """
    _, impl, _ = _select(op, device, dtype, choose or {})
    return impl.load(dtype)


def explain(*, device: torch.device, dtype: torch.dtype, choose: Mapping[str, str] | None = None) -> tuple[Choice, ...]:
    """What `bind` and `linear.pack` would choose for every op, and why; for `--explain-kernels`."""
    chosen, refused = linear.select(device, dtype, choose)
    rows = [Choice("linear", chosen, chosen == "cpp", refused)]
    chosen, refused = experts.select(device, dtype, choose)
    rows.append(Choice("experts", chosen, chosen == "cpp", refused))
    for name in plugins.names("kernels", ("OP",)):
        _, impl, rejected = _select(name, device, dtype, choose or {})
        rows.append(Choice(name, impl.name, impl.batch_invariant, rejected))
    return tuple(sorted(rows))


def implementations(op: Op, device: torch.device) -> tuple[Impl, ...]:
    """All implementations of an op for a kind of device, best first, the reference last."""
    reference = Impl("reference", lambda dtype: None, lambda dtype: op.reference)
    folder = FOLDERS.get(device.type)
    if folder is None or op.name not in plugins.names(folder, ("IMPLS",)):
        return (reference,)
    return (*plugins.load(folder, op.name, ("IMPLS",)).IMPLS, reference)


def _select(
    name: str, device: torch.device, dtype: torch.dtype, choose: Mapping[str, str]
) -> tuple[Op, Impl, tuple[tuple[str, str], ...]]:
    op: Op = plugins.load("kernels", name, ("OP",)).OP
    known_ops = (*plugins.names("kernels", ("OP",)), "linear", "experts")
    for key in choose:
        if key not in known_ops:
            raise ConfigError(f"kernels: op {key!r} is unknown; known: {', '.join(known_ops)}")
    candidates = implementations(op, device)
    wanted = choose.get(name)
    if wanted is not None and wanted not in {impl.name for impl in candidates}:
        known = ", ".join(impl.name for impl in candidates)
        raise ConfigError(f"kernels.{name}: implementation {wanted!r} is unknown on {device.type}; known: {known}")
    rejected = []
    for impl in candidates:
        if wanted is not None and impl.name != wanted:
            rejected.append((impl.name, f"{wanted} was asked for"))
            continue
        reason = impl.supports(dtype)
        if reason is None:
            return op, impl, tuple(rejected)
        rejected.append((impl.name, reason))
    raise ConfigError(f"kernels.{name}: {wanted!r} cannot be used: {dict(rejected)[str(wanted)]}; leave it out")

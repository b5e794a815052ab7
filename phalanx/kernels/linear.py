"""Linear layers whose weight is packed once, when the model is built."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from phalanx.errors import ConfigError
from phalanx.kernels.cpu import linear as cpp


class PackedLinear:
    """`x @ weight.T + bias`; `impl` names what computes it. The packed weight is opaque: shard before packing.

    `batch_invariant` says that the bits of a row depend neither on the other rows nor on the threads. Of the products
    of torch and oneDNN none can say so: they differ with the number of rows, on Intel and AMD in different ways.
    """

    __slots__ = ("_forward", "batch_invariant", "impl")

    def __init__(self, impl: str, forward: Callable[[Tensor], Tensor]) -> None:
        self.impl = impl
        self.batch_invariant = impl == "cpp"
        self._forward = forward

    def __call__(self, x: Tensor) -> Tensor:
        """Map (..., K) to (..., N) in x's dtype; any number of rows, 0 too."""
        return self._forward(x)


def pack(weight: Tensor, bias: Tensor | None = None, *, choose: Mapping[str, str] | None = None) -> PackedLinear:
    """Pack a weight for the device it is on.

    `cpp` computes an output as one chain over K; `onednn` is a packed weight too; `torch` is `F.linear`.

    Args:
        weight: (N, K); fp32 or bf16 for the packed implementations. May be dropped by the caller afterwards.
        bias: (N), same dtype.
        choose: `{"linear": "cpp" | "onednn" | "torch"}`; by default the first of these that can be used.

    Raises:
        ConfigError: the chosen implementation is unknown or cannot compute this weight.
    """
    chosen, _ = select(weight.device, weight.dtype, choose, weight.shape[1])
    forward = {"cpp": cpp.pack, "onednn": _pack_onednn, "torch": _pack_torch}[chosen](weight, bias)
    return PackedLinear(chosen, forward)


def select(
    device: torch.device, dtype: torch.dtype, choose: Mapping[str, str] | None = None, in_features: int = 0
) -> tuple[str, tuple[tuple[str, str], ...]]:
    """The implementation `pack` takes for such a weight, and (name, reason) of those it had to pass over.

    Raises:
        ConfigError: as `pack`.
    """
    reasons = {
        "cpp": cpp.refuses(device, dtype, in_features),
        "onednn": _onednn_refuses(device, dtype),
        "torch": None,
    }
    wanted = (choose or {}).get("linear")
    if wanted is not None and wanted not in reasons:
        raise ConfigError(f"kernels.linear: implementation {wanted!r} is unknown; known: {', '.join(reasons)}")
    if wanted is not None and reasons[wanted] is not None:
        raise ConfigError(f"kernels.linear: {wanted!r} cannot be used: {reasons[wanted]}; leave it out")
    chosen = wanted or next(impl for impl, reason in reasons.items() if reason is None)
    passed = list(reasons)[: list(reasons).index(chosen)]
    return chosen, tuple((impl, reasons[impl] or f"{wanted} was asked for") for impl in passed)


def _onednn_refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the packed oneDNN path cannot be used, or None; its ops are private to torch and may go away."""
    if device.type != "cpu":
        return f"the weight is on {device.type}"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"{dtype} is not one of fp32, bf16"
    if not all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise")):
        return "this torch has no packed oneDNN linear"
    return None


def _pack_onednn(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)
    linear = torch.ops.mkldnn._linear_pointwise.default
    return lambda x: linear(x, packed, bias, "none", [], "")


def _pack_torch(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    return lambda x: F.linear(x, weight, bias)

"""Linear layers whose weight is packed once, when the model is built."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from phalanx.errors import ConfigError

IMPLS = ("onednn", "torch")
ROW_TILE = 8


class PackedLinear:
    """`x @ weight.T + bias`; `impl` names what computes it. The packed weight is opaque: shard before packing."""

    __slots__ = ("_forward", "batch_invariant", "impl")

    def __init__(self, impl: str, forward: Callable[[Tensor], Tensor], batch_invariant: bool) -> None:
        self.impl = impl
        self.batch_invariant = batch_invariant
        self._forward = forward

    def __call__(self, x: Tensor) -> Tensor:
        """Map (..., K) to (..., N) in x's dtype; any number of rows, 0 too."""
        if not self.batch_invariant:
            return self._forward(x)
        rows = x.reshape(-1, x.shape[-1])
        padded = F.pad(rows, (0, 0, 0, -rows.shape[0] % ROW_TILE))
        out = self._forward(padded)[: rows.shape[0]]
        return out.view(*x.shape[:-1], out.shape[1])


def pack(
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    choose: Mapping[str, str] | None = None,
    batch_invariant: bool = False,
) -> PackedLinear:
    """Pack a weight for the device it is on.

    oneDNN with a packed weight reads it 1.7 to 2.4 times as fast as `F.linear` at one row. Its rows have the same bits
    for any number of rows and threads, with one exception on the CPU this was measured on: in fp32, one row alone
    differs from the same row among others when K > 1024 or so. `F.linear` differs more often.

    Args:
        weight: (N, K) fp32 or bf16; may be dropped by the caller afterwards.
        bias: (N), same dtype.
        choose: `{"linear": "onednn" | "torch"}`; by default oneDNN where it can be used.
        batch_invariant: pad the rows to tiles of 8, so that the exception above does not occur.

    Raises:
        ConfigError: the chosen implementation is unknown or cannot compute this weight.
    """
    wanted = (choose or {}).get("linear")
    if wanted is not None and wanted not in IMPLS:
        raise ConfigError(f"kernels.linear: implementation {wanted!r} is unknown; known: {', '.join(IMPLS)}")
    reason = onednn_refuses(weight.device, weight.dtype)
    if wanted == "onednn" and reason is not None:
        raise ConfigError(f"kernels.linear: 'onednn' cannot be used: {reason}; leave it out")
    if wanted == "torch" or reason is not None:
        return PackedLinear("torch", lambda x: F.linear(x, weight, bias), batch_invariant)

    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)
    linear = torch.ops.mkldnn._linear_pointwise.default
    return PackedLinear("onednn", lambda x: linear(x, packed, bias, "none", [], ""), batch_invariant)


def onednn_refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the packed oneDNN path cannot be used, or None; its ops are private to torch and may go away."""
    if device.type != "cpu":
        return f"the weight is on {device.type}"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"{dtype} is not one of fp32, bf16"
    ops = torch.ops.mkldnn
    if not all(hasattr(ops, name) for name in ("_reorder_linear_weight", "_linear_pointwise")):
        return "this torch has no packed oneDNN linear"
    return None

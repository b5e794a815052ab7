"""Collectives over one axis of the mesh.

On CPU an all-to-all carries most of it: it posts every message at once, where gloo's own all-reduce and
all-gather pass parts on from rank to rank, and every pass is a process that must wake up.
"""

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renames it and warns on every rank; 2.11 knows the old name alone.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

ONE_HOP_BYTES = 512 << 10
"""Of an all-reduce between CPU ranks; above, sending all of it to everybody takes longer."""


class Group:
    """The ranks along one axis. A group of one is free: no process group, no copy, no torch.distributed.

    Every rank of the group must call the same operation in the same order with the same shape. A tensor without
    elements is not sent at all.
    """

    def __init__(self, rank: int = 0, size: int = 1, process_group: dist.ProcessGroup | None = None) -> None:
        self.rank = rank
        self.size = size
        self.process_group = process_group

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum `x` over the group, in place; returns `x`. Any float or integer dtype, contiguous.

        On CPU in rank order and in fp32 at least: a row's bits do not depend on the rows beside it.

        Cost: on CPU one exchange of all of `x` with everybody; above `ONE_HOP_BYTES` two of a part each, or gloo's own
        between two ranks.
        """
        if self.size == 1 or not x.numel():
            return x
        if x.is_cuda or (self.size == 2 and x.nbytes > ONE_HOP_BYTES):  # of two, in either order, the sum is the same
            dist.all_reduce(x, group=self.process_group)
            return x
        if x.nbytes <= ONE_HOP_BYTES:
            return x.copy_(_sum(self._swap(x.expand(self.size, *x.shape))))
        share = -(-x.numel() // self.size)
        parts = torch.nn.functional.pad(x.view(-1), (0, self.size * share - x.numel())).view(self.size, share)
        summed = _sum(self._swap(parts)).to(x.dtype)
        whole = self._swap(summed.expand(self.size, share))
        return x.copy_(whole.view(-1)[: x.numel()].view_as(x))

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        """Concatenate the ranks' tensors along `dim`, in rank order; returns `x` itself in a group of one."""
        if self.size == 1:
            return x
        dim = dim % x.dim()
        shape = (*x.shape[:dim], self.size * x.shape[dim], *x.shape[dim + 1 :])
        if not x.numel():
            return x.new_empty(shape)
        if x.is_cuda:
            gathered = torch.empty((self.size, *x.shape), dtype=x.dtype, device=x.device)
            _all_gather(gathered.view(-1), x.contiguous().view(-1), group=self.process_group)
        else:
            gathered = self._swap(x.expand(self.size, *x.shape))
        return gathered.movedim(0, dim).reshape(shape)

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        """Overwrite `x` with the tensor of the group's rank `source`, in place; returns `x`."""
        if self.size > 1 and x.numel():
            dist.broadcast(x, group=self.process_group, group_src=source)
        return x

    def _swap(self, parts: Tensor) -> Tensor:
        """(size, ...): part i goes to rank i; the result's part i came from rank i."""
        result = torch.empty(parts.shape, dtype=parts.dtype)
        dist.all_to_all_single(result.view(-1), parts.contiguous().view(-1), group=self.process_group)
        return result


def _sum(parts: Tensor) -> Tensor:
    """Over the first dimension, one after the other; narrow floats as fp32."""
    if parts.is_floating_point() and parts.itemsize < 4:
        parts = parts.float()
    total = parts[0]
    for part in parts[1:]:
        total += part
    return total

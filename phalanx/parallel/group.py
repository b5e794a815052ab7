"""Collectives over one axis of the mesh."""

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renames it and warns on every rank; 2.11 knows the old name alone.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


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
        """Sum `x` over the group, in place; returns `x`. Any float or integer dtype, contiguous."""
        if self.size > 1 and x.numel():
            dist.all_reduce(x, group=self.process_group)
        return x

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        """Concatenate the ranks' tensors along `dim`, in rank order; returns `x` itself in a group of one."""
        if self.size == 1:
            return x
        dim = dim % x.dim()
        shape = (*x.shape[:dim], self.size * x.shape[dim], *x.shape[dim + 1 :])
        if not x.numel():
            return x.new_empty(shape)
        gathered = torch.empty((self.size, *x.shape), dtype=x.dtype, device=x.device)
        _all_gather(gathered.view(-1), x.contiguous().view(-1), group=self.process_group)
        return gathered.movedim(0, dim).reshape(shape)

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        """Overwrite `x` with the tensor of the group's rank `source`, in place; returns `x`."""
        if self.size > 1 and x.numel():
            dist.broadcast(x, group=self.process_group, group_src=source)
        return x

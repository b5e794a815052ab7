"""Tokens per logical expert, counted on the device before the choice of replicas."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class LoadCounter:
    """A histogram per MoE layer of one rank.

    Args:
        num_experts: E of each layer.
        device: of the routed ids.
    """

    def __init__(self, num_experts: Sequence[int], device: torch.device | str) -> None:
        # The last bin is where index -1 points: a mask would cost more than a bin that nobody reads.
        self._bins = [torch.zeros(experts + 1, dtype=torch.int64, device=device) for experts in num_experts]
        self._one = torch.ones((), dtype=torch.int64, device=device)

    def record(self, layer: int, topk_ids_TK: Tensor) -> None:
        """Add a step's choices; no host synchronisation.

        Args:
            layer: index among the MoE layers.
            topk_ids_TK: (T, K) int32 logical experts; -1 (padding, warm-up, dropped) is not counted.
        """
        bins = self._bins[layer]
        if topk_ids_TK.is_cuda:  # where an accumulating index_put_ sorts
            index = topk_ids_TK.reshape(-1).to(torch.int64).remainder_(len(bins))
            bins.scatter_add_(0, index, self._one.expand_as(index))
        else:
            bins.index_put_((topk_ids_TK,), self._one, accumulate=True)

    def drain(self) -> list[NDArray[np.int64]]:
        """Counts of each layer since the last call, (E,) int64; waits for the device."""
        counts = [bins[:-1].cpu().numpy().copy() for bins in self._bins]
        for bins in self._bins:
            bins.zero_()
        return counts

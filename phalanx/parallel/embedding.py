"""Embedding and head sharded over the vocabulary.

Each rank holds `ceil(vocab / tp)` consecutive rows of both matrices; rows past the vocabulary are 0.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from phalanx.kernels.linear import PackedLinear, pack
from phalanx.parallel.group import Group
from phalanx.parallel.parameter import WHOLE, Parameter, Segment
from phalanx.parallel.partition import padded, shard_padded


def vocabulary_rows(
    vocab_size: int, hidden_size: int, group: Group, *, dtype: torch.dtype, device: torch.device
) -> Parameter:
    """This rank's rows of an embedding or head matrix (vocab, hidden)."""
    part = shard_padded(vocab_size, group.rank, group.size)
    rows = padded(vocab_size, group.size) // group.size
    segments = {WHOLE: Segment((vocab_size, hidden_size), 0, part)}
    return Parameter((rows, hidden_size), segments, dtype=dtype, device=device)


class VocabParallelEmbedding:
    """Token ids to vectors.

    Args:
        weight: from `vocabulary_rows`; a tied head may share it.
        group: the tensor axis.
    """

    def __init__(self, weight: Parameter, group: Group) -> None:
        self.weight = weight
        self._group = group

    def parameters(self) -> dict[str, Parameter]:
        """What the checkpoint must fill."""
        return {"weight": self.weight}

    def __call__(self, token_ids: Tensor) -> Tensor:
        """Map (T) int32 ids to (T, hidden). Ids of other ranks give 0 here and are filled in by the sum."""
        table = self.weight.tensor
        if self._group.size == 1:
            return F.embedding(token_ids, table)
        local = token_ids - self._group.rank * table.shape[0]
        mine = (local >= 0) & (local < table.shape[0])
        rows = F.embedding(torch.where(mine, local, 0), table)
        return self._group.all_reduce(rows.masked_fill_(~mine.unsqueeze(-1), 0))


class VocabParallelHead:
    """Vectors to logits.

    Args:
        weight: from `vocabulary_rows`; the embedding's own when tied.
        vocab_size: where the padding is cut off.
        group: the tensor axis.
        choose: kernel name -> implementation name; None = the best.
    """

    def __init__(
        self, weight: Parameter, vocab_size: int, group: Group, *, choose: Mapping[str, str] | None = None
    ) -> None:
        self.weight: Parameter | None = weight
        self._vocab_size = vocab_size
        self._group = group
        self._choose = choose
        self._packed: PackedLinear | None = None

    def parameters(self) -> dict[str, Parameter]:
        """What the checkpoint must fill."""
        return {} if self.weight is None else {"weight": self.weight}

    def finalize(self) -> None:
        """Pack the weight; call once, after loading."""
        if self.weight is not None:
            self._packed = pack(self.weight.tensor, None, choose=self._choose)
            self.weight = None

    def __call__(self, x: Tensor) -> Tensor:
        """Map (N, hidden) to fp32 logits (N, vocab), whole on every rank.

        Cost: one all-gather of N * vocab * itemsize bytes, in the activation dtype.
        """
        assert self._packed is not None, "finalize() first"
        return self._group.all_gather(self._packed(x))[:, : self._vocab_size].float()

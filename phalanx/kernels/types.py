"""Types that op signatures share; they sit below every op, so that there is no import cycle."""

from typing import NamedTuple

from torch import Tensor


class AttnMeta(NamedTuple):
    """What attention must know about a batch of B sequences, decodes first; on the device of q.

    Rows `cu_seqlens_q[b] .. cu_seqlens_q[b+1]` of the token axis are the *last* rows of sequence b: row i of q_len
    rows has position `seq_lens[b] - q_len + i`. Empty sequences (q_len 0) and rows without a key (seq_len 0) are legal.
    """

    cu_seqlens_q: Tensor
    """(B + 1) int32, first row of each sequence, then the number of rows."""
    seq_lens: Tensor
    """(B) int32, keys in the pool, the new rows included."""
    block_tables: Tensor
    """(B, M) int32 block ids; entries past the sequence are never used, but must be valid ids (0 = null block)."""
    num_decodes: int
    """The first `num_decodes` sequences have at most one row."""
    max_q_len: int
    """At least the largest q_len."""
    max_seq_len: int
    """At least the largest seq_len, at most M * block_size."""

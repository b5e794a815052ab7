"""Which replica of an expert a token goes to: one stateless device op, independent of the other tokens of the batch.

A token that visits a node anyway takes the replicas there, so fewer copies of it cross between nodes. What is then left
open is decided by a hash of the token's key and the expert: the same token takes the same way when a step is replayed.
"""

from hashlib import blake2b
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from phalanx.moe.placement.types import LayerPlacement
from phalanx.parallel.topology import EpTopology

# Shape suffixes: T tokens, K choices, E logical experts, S slots, N nodes.

Mode = Literal["hash", "node"]
MIX = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)
"""Odd 64-bit multipliers, as signed numbers, of the splitmix64 generator. Source: Steele, Lea, Flood, OOPSLA 2014."""


class _Tables(NamedTuple):
    """Row E, which index -1 means too, is for a choice that was dropped: no replica anywhere.

    Where no expert has two slots, all but the first are empty.

    Attributes:
        first_slot: (E + 1,) int32, an expert's lowest slot; row E is -1.
        slots_by_node: (S,) int32, all slots ordered by (expert, node, slot).
        start: (E + 1,) int32, where an expert begins in `slots_by_node`.
        total: (E + 1,) int32, replicas of an expert; row E is 1, a divisor.
        count_EN: (E + 1, N) int32, replicas of an expert in each node.
        alone_EN: (E + 1, N) bool, the node of an expert that has one replica.
        salt: (E + 1,) int64, the same random numbers in every process.
        node_salt: (N,) int64.
    """

    first_slot: Tensor
    slots_by_node: Tensor
    start: Tensor
    total: Tensor
    count_EN: Tensor
    alone_EN: Tensor
    salt: Tensor
    node_salt: Tensor


class ReplicaTables:
    """A layer's placement on the device, at addresses that stay; a new placement is written over the old one.

    All shapes, and whether there are replicas at all, follow from E, S and N: they are fixed for a generation.
    """

    def __init__(
        self, layer: LayerPlacement, topology: EpTopology, slots_per_rank: int, device: torch.device | str
    ) -> None:
        self.has_replicas = layer.num_slots > layer.num_experts
        self.num_nodes = topology.num_nodes
        self.node_of = topology.node_of
        self._node_of_slot = np.repeat(np.array(topology.node_of), slots_per_rank)
        self._salts = _salts(b"expert", layer.num_experts + 1), _salts(b"node", self.num_nodes)
        self.tensors = _Tables(*(table.to(device) for table in self._build(layer)))

    @classmethod
    def of(
        cls, layer: LayerPlacement, topology: EpTopology, slots_per_rank: int, device: torch.device | str
    ) -> "ReplicaTables":
        """Tables of a valid placement on this topology."""
        return cls(layer, topology, slots_per_rank, device)

    def overwrite(self, layer: LayerPlacement) -> None:
        """Make the tables those of another valid placement of the same experts, slots and ranks; in place.

        On CUDA the copies are ordered on the current stream.
        """
        for table, new in zip(self.tensors, self._build(layer), strict=True):
            table.copy_(new)

    def _build(self, layer: LayerPlacement) -> _Tables:
        """By numpy: so small, every operation of torch costs more than the table. A lookup needs `first_slot` alone."""
        first_slot = np.array([slots[0] for slots in layer.logical_to_physical] + [-1], np.int32)
        if not self.has_replicas:
            return _Tables(torch.from_numpy(first_slot), *[torch.empty(0)] * 7)
        experts, node_of = layer.slots, self._node_of_slot
        order = np.argsort(experts * self.num_nodes + node_of, kind="stable")
        count_EN = np.zeros((layer.num_experts + 1, self.num_nodes), np.int32)
        np.add.at(count_EN, (experts, node_of), 1)
        total = count_EN.sum(1, dtype=np.int32)
        start = total.cumsum(dtype=np.int32) - total
        start[-1] = 0
        return _Tables(
            first_slot=torch.from_numpy(first_slot),
            slots_by_node=torch.from_numpy(order.astype(np.int32)),
            start=torch.from_numpy(start),
            total=torch.from_numpy(np.maximum(total, 1)),
            count_EN=torch.from_numpy(count_EN),
            alone_EN=torch.from_numpy((count_EN > 0) & (total == 1)[:, None]),
            salt=self._salts[0],
            node_salt=self._salts[1],
        )


def select(topk_ids_TK: Tensor, tables: ReplicaTables, rank: int, key_T: Tensor | None, mode: Mode = "node") -> Tensor:
    """Physical slot of every choice.

    Args:
        topk_ids_TK: (T, K) int32 logical experts; -1 passes through.
        tables: of the layer's current placement.
        rank: the one that holds these tokens.
        key_T: (T,) int64, for example request hash xor position; equal keys take equal ways. None = all keys are 0.
        mode: "node" prefers the nodes a token visits anyway: its own, those of its experts without a choice, then for
            the others the node that most of them share. "hash" takes any replica. Both spread evenly over what is left.

    Returns:
        (T, K) int32 slots.

    Cost: without replicas in the placement one table lookup; else about 15 ("hash") or 40 ("node") small device ops.
    """
    table = tables.tensors
    if not tables.has_replicas:
        return table.first_slot[topk_ids_TK]
    if key_T is None:
        key_T = topk_ids_TK.new_zeros(topk_ids_TK.shape[0], dtype=torch.int64)
    hash_TK = _hash(key_T[:, None] + table.salt[topk_ids_TK])
    if mode == "hash" or tables.num_nodes == 1:
        pick_TK = hash_TK % table.total[topk_ids_TK]
    else:
        hash_TN = _hash(key_T[:, None] + table.node_salt)
        pick_TK = _pick_near(table, topk_ids_TK, tables.node_of[rank], hash_TK, hash_TN)
    slots_TK = table.slots_by_node[table.start[topk_ids_TK] + pick_TK]
    return slots_TK.masked_fill_(topk_ids_TK < 0, -1)


def _pick_near(table: _Tables, topk_ids_TK: Tensor, src_node: int, hash_TK: Tensor, hash_TN: Tensor) -> Tensor:
    """Index of the chosen replica among those of its expert, (T, K) int32."""
    count_TKN = table.count_EN[topk_ids_TK]
    visited_TN = table.alone_EN[topk_ids_TK].any(1)
    visited_TN[:, src_node] = True
    near_TKN = count_TKN * visited_TN[:, None]
    far_TK1 = (near_TKN == 0).all(2, keepdim=True)
    # Experts without a replica in a visited node go to the node most of them share, ties by a hash of (token, node).
    reach_TKN = (count_TKN > 0) & far_TK1
    votes_TN = (reach_TKN.sum(1, dtype=torch.int32) << 20) + (hash_TN >> 11)
    best_TK1 = (votes_TN[:, None] * reach_TKN).argmax(2, keepdim=True)
    allowed_TKN = near_TKN.scatter_add_(2, best_TK1, count_TKN.gather(2, best_TK1) * far_TK1)
    # The r-th allowed replica: skip the replicas of nodes that are not allowed and come before it.
    ends_TKN = allowed_TKN.cumsum(2, dtype=torch.int32)
    r_TK1 = (hash_TK % ends_TKN[..., -1].clamp(min=1))[..., None]
    skipped_TKN = (count_TKN - allowed_TKN) * (ends_TKN <= r_TK1)
    return r_TK1[..., 0] + skipped_TKN.sum(2, dtype=torch.int32)


def _hash(x: Tensor) -> Tensor:
    """31 well mixed bits of each int64 as int32; the products wrap."""
    x = x * MIX[0]
    x = (x ^ (x >> 32)) * MIX[1]
    return ((x >> 33) & 0x7FFFFFFF).to(torch.int32)


def _salts(purpose: bytes, count: int) -> Tensor:
    digests = (blake2b(b"%s %d" % (purpose, index), digest_size=8).digest() for index in range(count))
    return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests])

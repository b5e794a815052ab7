"""What runs inside the nodes in the tests of the lab; cheap to import."""

import os
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # missing from its __all__

from tests.netlab.lab import Node
from tests.netlab.namespaces import DEVICE

STORE_PORT = 29500


def exchange(rank: int, nodes: tuple[Node, ...], ranks_per_node: int, rows: int, rounds: int) -> tuple[bool, float]:
    """All-to-all of `rows` int64 from every rank to every rank, over gloo; the store is on node 0.

    Returns:
        Whether every row was the one its sender made for this rank, and the seconds of the median round.
    """
    here = nodes[rank // ranks_per_node]
    here.enter()
    world_size = len(nodes) * ranks_per_node
    patience = timedelta(seconds=30)
    store = TCPStore(nodes[0].address, STORE_PORT, is_master=rank == 0, timeout=patience)
    os.environ["GLOO_SOCKET_IFNAME"] = DEVICE
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=patience)
    sent = torch.cat([_rows(rank, to, rows) for to in range(world_size)])
    received = torch.empty_like(sent)
    seconds = []
    for _ in range(rounds):
        dist.barrier()
        began = time.monotonic()
        dist.all_to_all_single(received, sent)
        seconds.append(time.monotonic() - began)
    expected = torch.cat([_rows(source, rank, rows) for source in range(world_size)])
    dist.barrier()
    dist.destroy_process_group()
    return torch.equal(received, expected), sorted(seconds)[rounds // 2]


def _rows(source: int, to: int, rows: int) -> torch.Tensor:
    return torch.arange(rows) + 1_000_000 * (1 + source) + 1_000_000_000 * (1 + to)

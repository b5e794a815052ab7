"""What ranks do in the tests of `phalanx.parallel`; imported by rank processes, so cheap to import."""

import time

import torch
from torch import Tensor

from phalanx.errors import ReplicaLostError
from phalanx.parallel.embedding import VocabParallelEmbedding, VocabParallelHead, vocabulary_rows
from phalanx.parallel.linear import ColumnParallelLinear, RowParallelLinear
from phalanx.parallel.mesh import Mesh, MeshShape
from phalanx.parallel.parameter import Parameter
from phalanx.parallel.partition import shard, shard_or_replicate
from phalanx.parallel.rendezvous import join

CPU = torch.device("cpu")
STEPS = 40
IN_FLIGHT = 3


def fill_whole(parameter: Parameter, **tensors: Tensor) -> None:
    """Fill each segment from the whole tensor, as the loader does from disk."""
    for name, tensor in tensors.items():
        assert parameter.fill(name, tensor[parameter.segments[name].index()])
    assert not parameter.missing


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def collectives(mesh: Mesh) -> list[Tensor]:
    group = mesh.tp
    mine = torch.arange(6.0).view(2, 3) + 100 * group.rank
    summed = group.all_reduce(mine.clone())
    same = group.broadcast(mine.clone(), source=group.size - 1)
    empty = group.all_gather(torch.empty(0, 3))
    half = group.all_reduce(torch.full((4,), 0.5, dtype=torch.bfloat16)).float()
    return [summed, group.all_gather(mine), group.all_gather(mine, dim=0), same, empty, half]


DTYPES = (torch.float32, torch.bfloat16, torch.int64)


def summand(rank: int, num_rows: int, dtype: torch.dtype) -> Tensor:
    """Rows of 401 values that are not the same in any other order of addition; the first rows of more are the same."""
    return (1000 * draw(rank, num_rows, 401)).to(dtype)


def sums(mesh: Mesh, num_rows: int) -> list[Tensor]:
    """Of each dtype."""
    return [mesh.tp.all_reduce(summand(mesh.tp.rank, num_rows, dtype)).double() for dtype in DTYPES]


def coordinates(mesh: Mesh) -> list[Tensor]:
    """Rank sums over each group tell which ranks are in it."""
    me = torch.tensor([float(mesh.rank)])
    return [mesh.tp.all_gather(me, dim=0), torch.tensor([mesh.tp.rank])]


def column(mesh: Mesh) -> Tensor:
    """Stacked q, k, v with more ranks than kv heads; every rank's slice of the output."""
    tp = mesh.tp
    q = shard("num_heads", 4, tp.rank, tp.size).times(3)
    kv = shard_or_replicate("num_kv_heads", 2, tp.rank, tp.size).times(3)
    layer = ColumnParallelLinear(5, {"q": q, "k": kv, "v": kv}, bias=True, dtype=torch.float32, device=CPU)
    weight, bias = layer.parameters()["weight"], layer.parameters()["bias"]
    fill_whole(weight, q=draw(0, 12, 5), k=draw(1, 6, 5), v=draw(2, 6, 5))
    fill_whole(bias, q=draw(3, 12), k=draw(4, 6), v=draw(5, 6))
    layer.finalize()
    return layer(draw(6, 7, 5))


def row(mesh: Mesh) -> Tensor:
    part = shard("intermediate_size", 8, mesh.tp.rank, mesh.tp.size)
    layer = RowParallelLinear(part, 5, mesh.tp, bias=True, dtype=torch.float32, device=CPU)
    fill_whole(layer.parameters()["weight"], whole=draw(0, 5, 8))
    fill_whole(layer.parameters()["bias"], whole=draw(1, 5))
    layer.finalize()
    return layer(draw(2, 7, 8)[:, part.start : part.stop])


def vocabulary(mesh: Mesh) -> list[Tensor]:
    """9 ids over 4 ranks: 3, 3, 3, 0."""
    rows = vocabulary_rows(9, 5, mesh.tp, dtype=torch.float32, device=CPU)
    fill_whole(rows, whole=draw(0, 9, 5))
    embedding = VocabParallelEmbedding(rows, mesh.tp)
    head = VocabParallelHead(rows, 9, mesh.tp)
    head.finalize()
    embedded = embedding(torch.tensor([0, 8, 3, 2, 8, 5], dtype=torch.int32))
    return [embedded, head(embedded), head(embedded[:0])]


def lanes(mesh: Mesh, stop_reading: bool) -> Tensor:
    """A pipeline with IN_FLIGHT steps under way: hidden states go down, ids come back late but in order.

    Sizes change from step to step and pass through 0. With `stop_reading`, stage 0 runs far ahead before it waits.
    """
    pipeline = mesh.pipeline
    assert pipeline is not None
    seen: list[int] = []
    pending = []
    for step in range(STEPS):
        size = step % 4
        if mesh.is_first_stage:
            pipeline.send_hidden(torch.full((size, 3), float(step)))
            pending.append(pipeline.recv_tokens(size))
            if not stop_reading and len(pending) == IN_FLIGHT:
                seen += pending.pop(0).wait().tolist()
        else:
            hidden = pipeline.recv_hidden(size, 3, torch.float32)
            assert (hidden == step + 1000 * (mesh.coordinate.pp - 1)).all()
            if mesh.is_last_stage:
                time.sleep(0.001)  # ids are late
                pipeline.send_tokens(torch.arange(size, dtype=torch.int32) + 10 * step)
            else:
                pipeline.send_hidden(hidden + 1000)
    for ids in pending:
        seen += ids.wait().tolist()
    return torch.tensor(seen)


def hang(rank: int) -> int:
    """Rank 1 never comes back."""
    if rank == 1:
        time.sleep(60)
    return rank


def fail(rank: int) -> int:
    if rank == 1:
        raise ValueError("no luck")
    return rank


def join_alone(rank: int, address: str) -> str:
    """The message that a rank gets whose peer never comes."""
    try:
        join(MeshShape(tp=2), rank, address, device=CPU, timeout_s=1, interface="lo")
    except ReplicaLostError as error:
        return str(error)
    return "met somebody"


def lonely(mesh: Mesh) -> None:
    """Rank 0 waits for a collective that nobody else joins."""
    if mesh.rank == 0:
        mesh.tp.all_reduce(torch.ones(1))
    else:
        time.sleep(5)

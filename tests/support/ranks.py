"""Run a function on several ranks that meet over gloo, and collect what they return.

The function must be importable (module level) and its module cheap to import. Ranks come from a fork server, because a
plain fork after a TCPStore server exists can hang.
"""

import contextlib
import multiprocessing
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from phalanx.parallel.mesh import Mesh, MeshShape
from phalanx.parallel.rendezvous import host_store, join

PRELOAD = ["torch", "torch.distributed", "phalanx.models.loading", "tests.support.ranks"]


class RankError(AssertionError):
    """A rank failed, died or did not finish; names it."""


def run_mesh(shape: MeshShape, function: Callable[..., Any], *args: Any, timeout_s: float = 60.0) -> list[Any]:
    """`function(mesh, *args)` on every rank of a mesh; results in rank order. Tensors are returned as copies.

    Raises:
        RankError: the first rank that raised, with its traceback, or died, or is still running after `timeout_s`.
    """
    store, address = host_store()
    # A collective gives up first, so that the rank itself says where it waited.
    patience_s = timeout_s / 2
    results = run_ranks(shape.world_size, _on_mesh, shape, address, patience_s, function, args, timeout_s=timeout_s)
    del store
    return results


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 60.0) -> list[Any]:
    """`function(rank, *args)` in `world_size` processes; as `run_mesh`, without a mesh."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    processes, pipes = [], []
    for rank in range(world_size):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(theirs, rank, function, args), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
        pipes.append(ours)
    try:
        return _collect(pipes, timeout_s)
    finally:
        for process, pipe in zip(processes, pipes, strict=True):
            pipe.close()
            process.join(0.5)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()


def _collect(pipes: list[Connection], timeout_s: float) -> list[Any]:
    deadline = time.monotonic() + timeout_s
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results}
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankError(f"ranks {sorted(waiting.values())} are still running after {timeout_s} s")
        for pipe in ready:
            rank = waiting[pipe]  # type: ignore[index]
            try:
                ok, value = pipe.recv()  # type: ignore[union-attr]
            except EOFError:
                raise RankError(f"rank {rank} died without a result") from None
            if not ok:
                raise RankError(f"rank {rank} failed:\n{value}")
            results[rank] = value
    return [_torch(results[rank]) for rank in range(len(pipes))]


def _child(pipe: Connection, rank: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        pipe.send((True, _plain(function(rank, *args))))
    except BaseException:
        # The parent may have given up on all ranks already, because of another one.
        with contextlib.suppress(BrokenPipeError):
            pipe.send((False, traceback.format_exc()))
    pipe.close()


def _on_mesh(
    rank: int, shape: MeshShape, address: str, timeout_s: float, function: Callable[..., Any], args: tuple[Any, ...]
) -> Any:
    mesh: Mesh = join(shape, rank, address, device=torch.device("cpu"), timeout_s=timeout_s, interface="lo")
    try:
        result = function(mesh, *args)
        if mesh.pipeline is not None:
            mesh.pipeline.flush()
        return result
    finally:
        mesh.close()


def _plain(value: Any) -> Any:
    # Tensors would travel as shared memory, which ends with the rank.
    if isinstance(value, torch.Tensor):
        return value.detach().numpy().copy()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _torch(value: Any) -> Any:
    if type(value).__module__ == "numpy":
        return torch.from_numpy(value)
    if isinstance(value, list):
        return [_torch(item) for item in value]
    return value

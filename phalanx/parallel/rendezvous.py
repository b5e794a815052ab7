"""How the ranks of a unit find each other: a TCPStore hosted by the engine, then one process group per axis.

A unit is the pp x tp ranks of one dp rank; `torch.distributed`'s world is the unit, so that units come and go freely.
"""

import os
import socket
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # missing from its __all__

from phalanx.errors import ConfigError, ReplicaLostError
from phalanx.parallel.group import Group
from phalanx.parallel.mesh import Mesh, MeshShape
from phalanx.parallel.pipeline import Pipeline


def host_store(host: str = "127.0.0.1", port: int = 0) -> tuple[TCPStore, str]:
    """Serve the key-value store through which ranks meet; the engine calls this, never a rank.

    Args:
        host: address of the interface to listen on, and no other.
        port: 0 = a free one.

    Returns:
        The store, which serves for as long as the caller keeps it, and its "host:port" for `join`.

    Raises:
        ConfigError: the address cannot be listened on.
    """
    try:
        listener = socket.create_server((host, port))
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port} ({error}); use an address of this machine") from error
    port = listener.getsockname()[1]
    # The store owns the descriptor from here on.
    store = TCPStore(
        host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach(), use_libuv=True
    )
    return store, f"{host}:{port}"


def single(device: torch.device) -> Mesh:
    """The mesh of one rank: no store, no process group."""
    return Mesh(shape=MeshShape(), rank=0, device=device, tp=Group())


def connect_store(address: str, timeout_s: float) -> Store:
    """A client of the engine's store.

    Args:
        address: "host:port" from `host_store`.
        timeout_s: of this and of every later wait.

    Raises:
        ConfigError: the address cannot be.
        ReplicaLostError: nobody serves there.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"store address {address!r} is not host:port")
    try:
        return TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=timeout_s), use_libuv=True)
    except RuntimeError as error:  # the base of all errors of torch.distributed
        raise ReplicaLostError(f"no store answers at {address} within {timeout_s} s: {error}") from error


def join(
    shape: MeshShape,
    rank: int,
    store_address: str,
    *,
    device: torch.device,
    timeout_s: float,
    interface: str | None = None,
    unit: int | None = None,
) -> Mesh:
    """Meet the other ranks of the unit; returns when all of them have come. One mesh per process.

    Args:
        shape: of the whole mesh.
        rank: of this process.
        store_address: "host:port" from `host_store`.
        device: a CPU device meets over gloo, a CUDA device over NCCL.
        timeout_s: of this meeting and of every later collective.
        interface: name of the network interface to use, for example "eth0"; None = found from the host name.
        unit: a number no other unit of this store ever had; None = the dp rank.

    Raises:
        ConfigError: rank or address cannot be.
        ReplicaLostError: the store or another rank is not there in time.
    """
    if not 0 <= rank < shape.world_size:
        raise ConfigError(f"rank {rank} is outside a mesh of {shape.world_size} ranks")
    if interface is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = interface
    if device.type == "cuda":
        torch.cuda.set_device(device)
    here = shape.coordinate(rank)
    world = MeshShape(pp=shape.pp, tp=shape.tp)
    if world.world_size == 1:
        return Mesh(shape=shape, rank=rank, device=device, tp=Group())
    store = connect_store(store_address, timeout_s)
    timeout = timedelta(seconds=timeout_s)
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=PrefixStore(f"unit/{here.dp if unit is None else unit}", store),
            rank=world.rank(here.pp, 0, here.tp),
            world_size=world.world_size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
        return _build(shape, rank, device, timeout)
    except RuntimeError as error:
        raise ReplicaLostError(
            f"rank {rank} did not meet the other {world.world_size - 1} ranks at {store_address} within {timeout_s} s: "
            f"{error}"
        ) from error


def _build(shape: MeshShape, rank: int, device: torch.device, timeout: timedelta) -> Mesh:
    """One group per line of each axis. Every rank makes all groups, its own or not, in the same order."""
    here, world = shape.coordinate(rank), MeshShape(pp=shape.pp, tp=shape.tp)
    unit_rank = world.rank(here.pp, 0, here.tp)

    def mine(lines: list[list[int]]) -> dist.ProcessGroup | None:
        groups = [dist.new_group(ranks, timeout=timeout) if len(ranks) > 1 else None for ranks in lines]
        return next(group for group, ranks in zip(groups, lines, strict=True) if unit_rank in ranks)

    lanes = [[world.rank(pp, 0, tp) for pp in range(shape.pp)] for tp in range(shape.tp)]
    tp_group = mine([[world.rank(pp, 0, tp) for tp in range(shape.tp)] for pp in range(shape.pp)])
    pipeline = None
    if shape.pp > 1:
        # Two groups over the same ranks: a late token must not stand in the way of the next hidden states.
        hidden_lane, token_lane = mine(lanes), mine(lanes)
        assert hidden_lane is not None
        assert token_lane is not None
        pipeline = Pipeline(here.pp, shape.pp, hidden_lane, token_lane, device)
    return Mesh(
        shape=shape,
        rank=rank,
        device=device,
        tp=Group(here.tp, shape.tp, tp_group),
        pipeline=pipeline,
        shutdown=dist.destroy_process_group,
    )

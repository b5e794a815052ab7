"""Arithmetic of meshes, parts and stages; no process groups. Runs in 0.1 s."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phalanx.errors import ConfigError
from phalanx.parallel.mesh import MeshShape
from phalanx.parallel.parameter import Parameter, Segment, replicated
from phalanx.parallel.partition import padded, shard, shard_or_replicate, shard_padded, whole
from phalanx.parallel.pipeline import split_layers
from phalanx.parallel.rendezvous import host_store, join, single

SIZES = st.integers(1, 5)


@given(SIZES, SIZES, SIZES)
def test_rank_and_coordinate_are_inverse(pp, dp, tp):
    shape = MeshShape(pp=pp, dp=dp, tp=tp)
    places = [shape.coordinate(rank) for rank in range(shape.world_size)]
    assert [shape.rank(place.pp, place.dp, place.tp) for place in places] == list(range(shape.world_size))
    assert places == sorted(places, key=lambda place: (place.pp, place.dp, place.tp))


def test_planning_needs_no_torch():
    code = "import sys; import phalanx.parallel.mesh, phalanx.parallel.partition; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@given(st.integers(1, 12), st.integers(1, 12))
def test_even_parts_cover_once(units, size):
    if units % size:
        with pytest.raises(ConfigError, match=rf"heads \({units}\) is not divisible by parallel.tensor \({size}\)"):
            shard("heads", units, 0, size)
        return
    parts = [shard("heads", units, rank, size) for rank in range(size)]
    assert [unit for part in parts for unit in range(part.start, part.stop)] == list(range(units))
    assert {part.size for part in parts} == {units // size}


@pytest.mark.parametrize(("units", "size", "fix"), [(6, 4, 3), (40, 16, 10), (7, 6, 1), (96, 64, 48)])
def test_the_error_names_a_size_that_fits(units, size, fix):
    with pytest.raises(ConfigError, match=f"use tensor: {fix}$"):
        shard("heads", units, 0, size)
    assert shard("heads", units, 0, fix)


def test_kv_heads_are_replicated():
    parts = [shard_or_replicate("num_kv_heads", 2, rank, 8) for rank in range(8)]
    assert [part.start for part in parts] == [rank * 2 // 8 for rank in range(8)]
    assert {part.size for part in parts} == {1}
    with pytest.raises(ConfigError, match=r"num_kv_heads \(3\) does not divide parallel.tensor \(8\); use tensor: 6"):
        shard_or_replicate("num_kv_heads", 3, 0, 8)


@given(st.integers(1, 40), st.integers(1, 9))
def test_padded_parts_cover_once(units, size):
    parts = [shard_padded(units, rank, size) for rank in range(size)]
    assert [unit for part in parts for unit in range(part.start, part.stop)] == list(range(units))
    width = padded(units, size) // size
    assert all(part.start == min(rank * width, units) for rank, part in enumerate(parts))


@given(st.integers(1, 60), st.integers(1, 8))
def test_split_layers(num_layers, stages):
    if stages > num_layers:
        with pytest.raises(ConfigError, match=rf"parallel.pipeline \({stages}\) must be between 1 and"):
            split_layers(num_layers, stages)
        return
    ranges = split_layers(num_layers, stages)
    assert [layer for start, stop in ranges for layer in range(start, stop)] == list(range(num_layers))
    counts = [stop - start for start, stop in ranges]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] - counts[-1] <= 1


def test_split_layers_override():
    assert split_layers(5, 2, (2, 3)) == ((0, 2), (2, 5))
    for override, message in [
        ((5,), "names 1 stages, parallel.pipeline is 2"),
        ((5, 0), "must be positive and add up to 5, not 5"),
        ((2, 2), "add up to 5, not 4"),
    ]:
        with pytest.raises(ConfigError, match=message):
            split_layers(5, 2, override)


def test_parameter_fills_and_notices():
    cpu = torch.device("cpu")
    segments = {"k": Segment((4, 2), 0, shard("heads", 4, 1, 2)), "v": Segment((2, 2), 0, whole(2), offset=2)}
    parameter = Parameter((5, 2), segments, dtype=torch.float32, device=cpu)
    stacked = torch.arange(12.0).view(6, 2)
    assert parameter.missing == ("k", "v")
    assert parameter.fill("k", stacked[segments["k"].index()])
    assert parameter.missing == ("v",)
    assert parameter.fill("v", stacked[segments["v"].index(base=4)])
    assert parameter.tensor.tolist() == [[4, 5], [6, 7], [8, 9], [10, 11], [0, 0]]
    assert parameter.fill("k", stacked[2:4])
    assert not parameter.fill("k", stacked[:2])
    assert parameter.tensor[0].tolist() == [4, 5]


def test_unit_offset_is_added_in_fp32():
    norm = replicated((1,), dtype=torch.float32, device=torch.device("cpu"), unit_offset=True)
    small = torch.tensor([2.0**-12], dtype=torch.bfloat16)  # 1 + 2^-12 is 1 in bf16
    assert norm.fill("whole", small)
    assert norm.tensor.item() == 1 + 2.0**-12


def test_a_mesh_of_one_needs_nothing():
    mesh = single(torch.device("cpu"))
    x = torch.ones(2, 3)
    assert mesh.tp.all_reduce(x) is x
    assert mesh.tp.all_gather(x) is x
    assert mesh.tp.broadcast(x) is x
    assert mesh.is_first_stage
    assert mesh.is_last_stage
    assert mesh.pipeline is None
    mesh.close()
    assert not torch.distributed.is_initialized()


def test_store_listens_on_one_address_only():
    store, address = host_store("127.0.0.1")
    host, port = address.split(":")
    assert host == "127.0.0.1"
    assert int(port) == store.port
    sockets = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
    listening = {fields[1] for fields in sockets if fields[3] == "0A"}
    assert f"0100007F:{int(port):04X}" in listening
    assert f"00000000:{int(port):04X}" not in listening
    with pytest.raises(ConfigError, match=rf"cannot listen on 127.0.0.1:{port} .*; use an address of this machine"):
        host_store("127.0.0.1", int(port))


@pytest.mark.parametrize(
    ("rank", "address", "message"),
    [(0, "nonsense", "is not host:port"), (2, "127.0.0.1:1", "rank 2 is outside a mesh of 2 ranks")],
)
def test_join_refuses(rank, address, message):
    with pytest.raises(ConfigError, match=message):
        join(MeshShape(tp=2), rank, address, device=torch.device("cpu"), timeout_s=1)

"""Deployments on a Ray cluster that was there before and is there afterwards; and starts that fail, with what is said.

About 45 s on two quiet cores.
"""

import json
import re
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import ray
from safetensors.torch import load_file, save_file

from phalanx import SamplingParams
from phalanx.deploy.config import RayConfig, parse_config
from phalanx.deploy.local_ray import LocalRay
from phalanx.deploy.ray_cluster import RayCluster
from phalanx.deploy.replica import Replica
from phalanx.deploy.resolve import resolve
from phalanx.errors import ConfigError
from phalanx.models.hf_config import read_config, resolve_path
from tests.support.census import Census, command
from tests.support.deployment import Deployment, deployed, pids, short_folder, wait_until

pytestmark = pytest.mark.slow

TINY = Path(resolve_path("tiny"))


@pytest.fixture(scope="module", autouse=True)
def census() -> Iterator[Census]:
    with Census() as census:
        yield census


@pytest.fixture(scope="module")
def cluster(census: Census) -> Iterator[RayCluster]:
    """Two nodes, started by somebody else; this process is one more of its drivers."""
    with short_folder():
        theirs = LocalRay(2)
        ours = RayCluster(RayConfig(address=theirs.address))
        try:
            yield ours
        finally:
            ours.close()
            theirs.close()


def file(path: object = "tiny", tensor: int = 2, pipeline: int = 1, listen: str = "127.0.0.1:0") -> str:
    return f"""
model: {{path: {path}, dtype: float32}}
ray: {{address: '{ray.get_runtime_context().gcs_address}'}}
device: cpu
parallel: {{tensor: {tensor}, pipeline: {pipeline}}}
kv: {{num_blocks: 300}}
workers: {{threads: 1}}
server: {{listen: '{listen}', metrics: 'off'}}
"""


def assert_cluster_is_free(census: Census, within_s: float) -> float:
    """No actor, no controller, no supervisor; every CPU is back, every node alive."""

    def is_free() -> bool:
        commands = [command(process) for process in census.processes()]
        busy = [line for line in commands if "Actor" in line or "phalanx.deploy.server" in line]
        return not busy and ray.available_resources().get("CPU") == ray.cluster_resources().get("CPU")

    took_s = wait_until(is_free, within_s, "a free cluster", interval_s=0.1)
    assert [node["Alive"] for node in ray.nodes()] == [True, True]
    return took_s


def ask(deployment: Deployment) -> int:
    params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    with deployment.client() as client:
        return sum(len(chunk.token_ids) for chunk in client.generate("import os", params))


def test_attached(cluster: RayCluster, census: Census) -> None:
    with deployed(file(), census) as deployment:
        assert ask(deployment) == 20
        assert_shortage_is_named(cluster)
        deployment.process.send_signal(signal.SIGTERM)
        assert deployment.wait_end() == 0
        took_s = assert_cluster_is_free(census, within_s=5.0)
    print(f"\nattached, then SIGTERM: the cluster is free {took_s:.1f} s after the end")


def assert_shortage_is_named(cluster: RayCluster) -> None:
    """The nodes would do, but half of their CPUs are taken."""
    config = parse_config(file(pipeline=2).replace("ray: {", "ray: {placement_timeout: 1s, "), "second.yaml")
    second = Replica(resolve(config, cluster.hardware(), read_config(TINY)), 0, 1, "127.0.0.1:1")
    try:
        with pytest.raises(ConfigError, match=r"2 of 4 CPU free, the replica needs 4 in groups of 2 on one node"):
            second.start(threading.Event())
    finally:
        second.end()


def test_the_supervisor_dies(cluster: RayCluster, census: Census) -> None:
    with deployed(file(), census) as deployment:
        assert ask(deployment) == 20
        members = [psutil.Process(pid) for pid in pids(deployment.replica())]
        port = int(deployment.address.rpartition(":")[2])
        deployment.process.kill()
        took_s = assert_cluster_is_free(census, within_s=10.0)
        assert not any(member.is_running() for member in members)
        with socket.create_server(("127.0.0.1", port)):
            pass  # nobody listens there any more
    print(f"\nattached, supervisor killed: the cluster is free {took_s:.1f} s later")


def cut_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"] = tensors["model.layers.3.mlp.up_proj.weight"][:100].clone()
    save_file(tensors, folder / "model.safetensors")


def cut_file(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as data:
        data.truncate(1_000_000)


def lose_shard(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-{number:05}-of-00002.safetensors" for number in (1, 2)]
    save_file(dict(list(tensors.items())[:20]), folder / names[0])
    shards = {key: names[number >= 20] for number, key in enumerate(tensors)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (
            cut_tensor,
            r"CheckpointError: .*'model\.layers\.3\.mlp\.up_proj\.weight' has shape \[100, 192\], .* \[512, 192\]",
        ),
        (cut_file, r"CheckpointError: .*model\.safetensors"),
        (lose_shard, r"CheckpointError: .*model-00002-of-00002\.safetensors"),
    ],
)
def test_a_damaged_checkpoint(
    cluster: RayCluster, census: Census, tmp_path: Path, damage: Callable[[Path], None], sentence: str
) -> None:
    shutil.copytree(TINY, tmp_path / "damaged")
    damage(tmp_path / "damaged")
    words, code = failed_start(file(tmp_path / "damaged"))
    assert code == 1
    assert re.search(sentence, words), words
    where = re.search(r"^rank \d \(node (\S+), log (\S+)\) failed:\nTraceback", words)
    assert where is not None, words
    assert where[1] in [node.name for node in cluster.hardware().nodes]
    assert Path(where[2]).is_file()
    assert_cluster_is_free(census, within_s=5.0)


def test_too_few_cpus_on_a_node(cluster: RayCluster) -> None:
    words, code = failed_start(file(tensor=4))
    assert "a group of 4 ranks (4 CPUs) must sit on one node and the largest has 2 CPUs; use tensor: 2 or less" in words
    assert code == 2


def test_a_tensor_size_that_does_not_divide(cluster: RayCluster) -> None:
    words, code = failed_start(file(tensor=3))
    assert "parallel.tensor (3) does not divide num_heads (8); this model allows 1, 2, 4, 8" in words
    assert code == 2


def test_a_port_in_use(cluster: RayCluster) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        words, code = failed_start(file(listen=address))
    assert f"server.listen: cannot listen on {address}: Address already in use" in words
    assert code == 2


def test_no_cluster_at_the_address() -> None:
    words, code = failed_start(file().replace(ray.get_runtime_context().gcs_address, "127.0.0.1:1"))
    assert "no Ray cluster answers at ray.address '127.0.0.1:1'" in words
    assert "Traceback" not in words
    assert code == 2


def failed_start(yaml: str) -> tuple[str, int]:
    """What a deployment says that cannot start, and its exit code."""
    with short_folder() as folder:
        deployment = Deployment(yaml, folder)
        try:
            return str(deployment.wait_for("error", 60.0)["text"]), deployment.wait_end()
        finally:
            deployment.stop()

"""Ray nodes in the nodes of a lab: actors land where they should, and nothing of Ray stays. About 25 s."""

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest

from phalanx import LLM, Client, SamplingParams
from tests.netlab import namespaces
from tests.netlab.emulator import LinkSpec
from tests.netlab.forward import Forward
from tests.netlab.lab import Lab, why_not
from tests.netlab.ray_nodes import RayNodes
from tests.support.census import Census
from tests.support.deployment import Deployment, short_folder

pytestmark = [
    pytest.mark.network,
    pytest.mark.slow,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]

DRIVER = """
import json, os, sys, time
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

class Actor:
    def where(self):
        return ray.util.get_node_ip_address(), os.stat("/proc/self/ns/net").st_ino

ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
while len(alive := [node["NodeID"] for node in ray.nodes() if node["Alive"]]) != int(sys.argv[2]):
    time.sleep(0.1)
places = [NodeAffinitySchedulingStrategy(node, soft=False) for node in alive]
actors = [ray.remote(num_cpus=1)(Actor).options(scheduling_strategy=place) for place in places]
print(json.dumps(ray.get([actor.remote().where.remote() for actor in actors], timeout=60)))
"""


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Census() as census, Lab(3, link=LinkSpec(delay_s=1e-3, rate=25e6)) as lab:
        yield lab
        lab.close()
        census.assert_gone(10)


def drive(lab: Lab, ray: RayNodes, num_nodes: int) -> dict[str, int]:
    """The address an actor on each Ray node has, and the namespace it is in, once there are so many live nodes."""
    command = [sys.executable, "-c", DRIVER, ray.address, str(num_nodes)]
    driver = lab.popen(0, command, stdout=subprocess.PIPE, text=True)
    words, _ = driver.communicate(timeout=90)
    assert driver.returncode == 0
    return dict(json.loads(words.splitlines()[-1]))


def test_actors_run_on_every_node_and_nodes_come_and_go(lab: Lab) -> None:
    where = {node.address: namespaces.identity(node.namespace) for node in lab.nodes}
    first, second = list(where)[:2]
    with RayNodes(lab) as ray:
        ray.add(1)
        assert drive(lab, ray, 2) == {first: where[first], second: where[second]}
        assert lab.counters().packets[0][1] > 50
        ray.add(2)
        ray.kill(1)
        assert not namespaces.processes({where[second]})
        assert drive(lab, ray, 2) | {second: where[second]} == where
    assert not namespaces.processes(set(where.values()))
    assert not ray.folder.exists()


YAML = """
model: {{path: {model}, dtype: float32}}
ray: {{address: '{address}'}}
device: cpu
{layout}
kv: {{num_blocks: 300}}
workers: {{threads: 1}}
server: {{listen: '127.0.0.1:0', metrics: 'off', engine_listen: '{host}:0'}}
"""


@pytest.mark.parametrize(
    ("model", "layout"),
    [("tiny", "parallel: {pipeline: 2}"), ("tiny-moe", "parallel: {data: 2}\nmoe: {dispatch: two_hop}")],
)
def test_a_deployment_in_the_lab_answers_a_client_outside(lab: Lab, model: str, layout: str) -> None:
    """Stages, or experts, on two hosts with a network of 1 ms between them."""
    params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    with LLM(model, device="cpu", dtype="float32", kv={"num_blocks": 300}) as llm:
        expected = llm.generate("import os", params)[0].token_ids
    with short_folder() as folder, RayNodes(lab, num_cpus=2) as ray:
        ray.add(1)
        with lab.nodes[0].inside():
            deployment = Deployment(
                YAML.format(model=model, layout=layout, address=ray.address, host=lab.nodes[0].address), folder
            )
        try:
            deployment.wait_ready()
            with Forward(lab.nodes[0], deployment.address) as forward, Client(forward.address) as client:
                tokens = [token for chunk in client.generate("import os", params) for token in chunk.token_ids]
                ranks = client.status().replicas[0].ranks
            assert tokens == expected
            assert all(any(node.address in rank for rank in ranks) for node in lab.nodes[:2])
            assert min(lab.counters().packets[0][1], lab.counters().packets[1][0]) > 20
        except BaseException:
            print(deployment.story())
            raise
        finally:
            deployment.stop()

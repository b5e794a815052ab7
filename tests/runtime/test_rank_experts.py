"""The expert side of one rank, without its peers. About 2 s."""

import pytest
import torch

from phalanx.models.loading import read_config
from phalanx.parallel import rendezvous
from phalanx.parallel.mesh import MeshShape
from phalanx.runtime.offline_config import resolve_offline
from phalanx.runtime.plan import ExpertLoad, ExpertStep, Prepare, Prepared, RankMessage
from phalanx.runtime.rank_experts import RankExperts
from phalanx.runtime.rank_spec import ExpertOrders, RankSpec
from phalanx.runtime.worker import Worker, warm_up
from tests.support import tiny

CPU = torch.device("cpu")


def make_spec(**fields: object) -> RankSpec:
    values = {
        "rank": 0,
        "unit": 0,
        **dict.fromkeys(("pp", "dp", "tp"), 1),
        **dict.fromkeys(("pp_rank", "dp_rank", "tp_rank"), 0),
        "store": "",
        "model_path": "",
        "device": "cpu",
        "dtype": "float32",
        "stage_layers": [(0, 1)],
        "block_size": 8,
        "num_blocks": 8,
        "max_model_len": 8,
        "max_sequences": 1,
        "max_batch_tokens": 8,
    }
    return RankSpec(**(values | fields))


def test_a_stage_of_dense_layers():
    """A DeepSeek's first layers are dense, and a pipeline stage may hold no others."""
    sent: list[RankMessage] = []
    orders = ExpertOrders(generation=0, nodes=["here"], placements=[], slots_per_rank=4)
    experts = RankExperts(make_spec(experts=orders), rendezvous.single(CPU), 0, sent.append)
    experts.attach([])
    experts.begin(ExpertStep("local", 1))
    experts.report(0)
    assert sent == [ExpertLoad(0, 0, [])]
    experts.close()


@pytest.mark.parametrize("failure", ["nobody", "interface"])
def test_groups_that_cannot_be_built_are_answered(failure):
    """Whatever the reason: an engine that hears nothing waits for its deadline, ten minutes."""
    store, address = rendezvous.host_store()
    answers: list[RankMessage] = []
    orders = ExpertOrders(generation=0, nodes=["here"], placements=[[0, 1]], slots_per_rank=2)
    interface = "no-such-0" if failure == "interface" else ""
    spec = make_spec(experts=orders, store=address, interface=interface, timeout_s=0.2)
    experts = RankExperts(spec, rendezvous.single(CPU), 0, answers.append)
    experts._prepare(Prepare(1, 0, ["here", "there"]))
    (answer,) = answers
    assert isinstance(answer, Prepared)
    assert (answer.rank, answer.generation) == (0, 1)
    assert ("no-such-0" if failure == "interface" else "did not come in time") in answer.error
    experts.close()
    del store


def test_warm_up_is_no_load(tmp_path):
    """Its tokens are nobody's: equal ones, thousands of them, which all go to the same few experts."""
    path = str(tiny.make_checkpoint("mixtral", tmp_path))
    sections = {"scheduler": {"max_batch_tokens": 32, "max_model_len": 64}, "kv": {}, "workers": {}, "moe": {}}
    config = resolve_offline(
        path,
        read_config(path),
        MeshShape(),
        stage_layers=None,
        device="cpu",
        dtype="float32",
        kernels={},
        **sections,
    )
    worker = Worker(config.rank_specs("", [""])[0], rendezvous.single(CPU), lambda _: None)
    warm_up(worker)
    assert worker.experts is not None
    assert [layer.sum() for layer in worker.experts.group.load.drain()] == [0] * len(read_config(path).moe_layers)
    worker.close()

"""Experts on disk: one by one, stacked, transposed, interleaved; read only where they live. Runs in 10 s."""

import json
import shutil

import pytest
import safetensors.torch
import torch

from phalanx import plugins
from phalanx.errors import CheckpointError
from phalanx.models.checkpoint import SINGLE, Checkpoint, StoredTensor
from phalanx.models.decoder import Decoder
from phalanx.models.hf_config import FAMILY, read_config
from phalanx.models.hf_moe import moe_locate
from phalanx.models.loading import fill, load_model
from phalanx.models.weights import Stacking
from phalanx.moe.group import ExpertGroup
from phalanx.moe.placement.linear import linear
from phalanx.parallel.group import Group
from phalanx.parallel.mesh import Mesh, MeshShape
from phalanx.parallel.rendezvous import single
from phalanx.parallel.topology import EpTopology
from tests.support import tiny

CPU = torch.device("cpu")
ALONE = single(CPU)
FAMILIES = ("qwen2_moe", "qwen3_moe", "mixtral", "deepseek_v2", "deepseek_v3", "olmoe", "glm4_moe", "gpt_oss")
PLAIN = Stacking()
KEY = "model.layers.2.mlp.experts.3.up_proj.weight"


def build(path, rank=0, num_ranks=1, layer_range=None):
    config = read_config(path)
    layer_range = layer_range or (0, len(config.layers))
    num_experts = [spec.router.num_experts for spec in config.moe_specs(layer_range)]
    slots = -(-max(num_experts) // num_ranks)
    layers = linear(num_experts, num_ranks, slots).layers
    experts = ExpertGroup(EpTopology.uniform(1, num_ranks), rank, layers, slots, exact=True, device=CPU)
    mesh = Mesh(shape=MeshShape(dp=num_ranks), rank=rank, device=CPU, tp=Group())
    return Decoder(
        config,
        mesh,
        device=CPU,
        dtype=torch.float32,
        layer_range=layer_range,
        max_model_len=64,
        experts=experts,
    )


def filled(path, names=None, **where):
    decoder = build(path, **where)
    with Checkpoint(path) as checkpoint:
        fill(decoder, checkpoint.tensors(), names or plugins.load("models", decoder.config.model_type, FAMILY))
    return {name: parameter.tensor for name, parameter in decoder.parameters().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def rewritten(path, folder, change):
    """A copy of a checkpoint whose tensors went through `change`."""
    shutil.copytree(path, folder)
    tensors = change(safetensors.torch.load_file(folder / SINGLE))
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / SINGLE)
    return folder


def stacked(tensors, stacking=PLAIN):
    """Expert by expert -> all experts of a layer in one tensor."""
    result = dict(tensors)
    for layer in {key.split(".")[2] for key in tensors if ".experts." in key}:
        head = f"model.layers.{layer}.mlp.experts"

        def each(part, head=head):
            names = [f"{head}.{e}.{part}.weight" for e in range(len(tensors)) if f"{head}.{e}.{part}.weight" in result]
            return torch.stack([result.pop(name) for name in names])

        gate, up, down = each("gate_proj"), each("up_proj"), each("down_proj")
        both = torch.stack([gate, up], 2).flatten(1, 2) if stacking.interleaved else torch.cat([gate, up], 1)
        turn = stacking.transposed
        result[f"{head}.gate_up_proj"] = both.transpose(1, 2) if turn else both
        result[f"{head}.down_proj"] = down.transpose(1, 2) if turn else down
    return result


@pytest.mark.parametrize("family", FAMILIES)
def test_in_memory_layout_of_transformers_loads_equally(family, checkpoints, tmp_path):
    """`state_dict` names and stacks; `save_pretrained` writes the classic ones."""
    path = tiny.make_checkpoint(family, checkpoints)
    state = tiny.load_hf(path).state_dict()
    assert any(key.endswith("experts.gate_up_proj") for key in state)
    other = rewritten(path, tmp_path / "other", lambda _: state)
    assert equal(filled(path), filled(other))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_every_stacking_loads_equally(transposed, interleaved, checkpoints, tmp_path):
    path, stacking = tiny.make_checkpoint("qwen3_moe", checkpoints), Stacking(transposed, interleaved)
    other = rewritten(path, tmp_path / "other", lambda tensors: stacked(tensors, stacking))

    class Names:
        @staticmethod
        def locate(key):
            return moe_locate(key, stacking=stacking)

    assert equal(filled(path), filled(other, Names))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_rank_reads_only_its_experts(family, checkpoints, monkeypatch):
    """Of 6 experts two ranks hold 3 each: together they read each expert once, in either layout."""
    path, read = tiny.make_checkpoint(family, checkpoints), {}
    original = StoredTensor.read

    def counting(self, index):
        part = original(self, index)
        read[self.key] = read.get(self.key, 0) + part.numel()
        return part

    monkeypatch.setattr(StoredTensor, "read", counting)
    parts = [filled(path, rank=rank, num_ranks=2) for rank in (0, 1)]
    with Checkpoint(path) as checkpoint:
        sizes = {stored.key: torch.Size(stored.shape).numel() for stored in checkpoint.tensors()}
    experts = [key for key in sizes if ".experts." in key]
    assert len(experts) >= 16
    assert [key for key in experts if read[key] != sizes[key]] == []
    assert equal(filled(path), parts[0] | parts[1])


def test_plain_experts_are_dropped_after_packing(checkpoints):
    path = tiny.make_checkpoint("qwen2_moe", checkpoints)
    decoder = load_model(path, ALONE, device=CPU, dtype=torch.float32, layer_range=(0, 4), max_model_len=64)
    assert not [name for name in decoder.parameters() if ".experts." in name or ".shared" in name]
    assert len(decoder.experts) == 3
    assert decoder.take_num_dropped() == 0


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_missing_expert_is_named(num_ranks, checkpoints, tmp_path):
    path = tiny.make_checkpoint("qwen3_moe", checkpoints)
    other = rewritten(path, tmp_path / "other", lambda tensors: {k: v for k, v in tensors.items() if k != KEY})
    message = r"holds no tensor for layers.2.mlp.experts.3.gate_up_proj.weight \(up\)$"
    with pytest.raises(CheckpointError, match=message):
        filled(other, rank=num_ranks - 1, num_ranks=num_ranks)
    if num_ranks == 2:
        filled(other, rank=0, num_ranks=2)  # whose expert it is not


def test_wrong_shapes_name_both(checkpoints, tmp_path):
    path = tiny.make_checkpoint("qwen3_moe", checkpoints)
    short = rewritten(path, tmp_path / "short", lambda tensors: {**tensors, KEY: tensors[KEY][:-1]})
    with pytest.raises(CheckpointError, match=rf"'{KEY}' has shape \[39, 64\], config.json says \[40, 64\]"):
        filled(short)
    key = "model.layers.2.mlp.experts.gate_up_proj"

    def fewer(tensors):
        tensors = stacked(tensors)
        return {**tensors, key: tensors[key][:-1]}

    with pytest.raises(CheckpointError, match=rf"'{key}' has shape \[5, 80, 64\], config.json says \[6, 80, 64\]"):
        filled(rewritten(path, tmp_path / "fewer", fewer))


@pytest.mark.parametrize(
    "key",
    [
        "model.layers.2.mlp.experts.6.up_proj.weight",
        "model.layers.2.mlp.experts.0.up_proj.bias",
        "model.layers.2.mlp.experts.gate_up_proj_bias",
        "model.layers.2.mlp.experts.0.w4.weight",
        "model.layers.1.mlp.experts.0.up_proj.weight",
        "model.layers.1.mlp.gate.weight",
        "model.layers.2.mlp.gate.e_score_correction_bias",
        "model.layers.2.mlp.shared_expert.up_proj.weight",
        "model.layers.4.mlp.experts.0.up_proj.weight",
    ],
)
def test_unknown_expert_tensor(key, checkpoints, tmp_path):
    path = tiny.make_checkpoint("qwen3_moe", checkpoints)
    other = rewritten(path, tmp_path / "other", lambda tensors: {**tensors, key: torch.zeros(40, 64)})
    with pytest.raises(CheckpointError, match=rf"tensor '{key}' has no place in this model"):
        filled(other)


def test_an_expert_in_both_layouts_must_agree(checkpoints, tmp_path):
    path = tiny.make_checkpoint("qwen3_moe", checkpoints)
    filled(rewritten(path, tmp_path / "same", lambda tensors: {**tensors, **stacked(tensors)}))
    with pytest.raises(CheckpointError, match=r"is stored twice, and differs"):
        filled(rewritten(path, tmp_path / "other", lambda tensors: {**stacked(tensors), **tensors, KEY: -tensors[KEY]}))


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_prediction_layers_are_skipped(family, checkpoints, tmp_path):
    """One by default, past the last layer; a second one would be another model's."""
    path = tiny.make_checkpoint(family, checkpoints)
    extra = {f"model.layers.3.{name}.weight": torch.zeros(3) for name in ("eh_proj", "enorm", "self_attn.q_a_proj")}
    longer = rewritten(path, tmp_path / "longer", lambda tensors: {**tensors, **extra})
    assert equal(filled(path), filled(longer))
    far = rewritten(path, tmp_path / "far", lambda tensors: {**tensors, "model.layers.4.enorm.weight": torch.zeros(3)})
    with pytest.raises(CheckpointError, match=r"'model.layers.4.enorm.weight' has no place"):
        filled(far)
    fields = json.loads((longer / "config.json").read_text())
    fields.pop("num_mtp_layers", None)
    (longer / "config.json").write_text(json.dumps({**fields, "num_nextn_predict_layers": 0}))
    with pytest.raises(CheckpointError, match=r"'model.layers.3.\w+.weight' has no place"):
        filled(longer)

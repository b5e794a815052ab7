"""Loading: shards, slices, and every way a checkpoint can be wrong. Runs in 2 s."""

import json
import shutil

import pytest
import safetensors.torch
import torch

from phalanx.errors import CheckpointError, ConfigError
from phalanx.models.checkpoint import INDEX, SINGLE, Checkpoint, StoredTensor
from phalanx.models.loading import load_model, read_config
from phalanx.parallel.group import Group
from phalanx.parallel.mesh import Mesh, MeshShape
from phalanx.parallel.rendezvous import single
from tests.models import drive
from tests.support import tiny

CPU = torch.device("cpu")
ALONE = single(CPU)


def load(path, mesh=ALONE, layer_range=None):
    layer_range = layer_range or (0, len(read_config(path).layers))
    return load_model(path, mesh, device=CPU, dtype=torch.float32, layer_range=layer_range, max_model_len=64)


@pytest.fixture
def llama(checkpoints, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(tiny.make_checkpoint("llama", checkpoints), tmp_path / "llama")


@pytest.fixture
def sharded(checkpoints, tmp_path):
    path = tiny.make_checkpoint("llama", checkpoints, max_shard_size="100KB")
    return shutil.copytree(path, tmp_path / "sharded")


def rewrite(path, change, name=SINGLE):
    tensors = safetensors.torch.load_file(path / name)
    change(tensors)
    safetensors.torch.save_file(tensors, path / name)


def reindex(path, change):
    index = json.loads((path / INDEX).read_text())
    change(index["weight_map"])
    (path / INDEX).write_text(json.dumps(index))


def test_shards_give_the_same_model(sharded, oracle_of):
    assert len(list(sharded.glob("*.safetensors"))) > 3
    oracle = oracle_of("llama")
    got = drive.logits_of(ALONE, str(sharded), oracle.sequences, "whole")
    whole = drive.logits_of(ALONE, str(oracle.path), oracle.sequences, "whole")
    assert torch.equal(got, whole)


def test_a_rank_reads_only_its_slices(llama, monkeypatch):
    """Bytes read by the four ranks together: the checkpoint once, but kv heads twice and norms and o_bias by each."""
    read = []
    original = StoredTensor.read

    def counting(self, index):
        part = original(self, index)
        read.append((self.key, part.numel()))
        return part

    monkeypatch.setattr(StoredTensor, "read", counting)
    for rank in range(4):
        group = Group(rank, 4)
        load(llama, Mesh(shape=MeshShape(tp=4), rank=rank, device=CPU, tp=group))
    copies = {}
    with Checkpoint(llama) as checkpoint:
        for stored in checkpoint.tensors():
            taken = sum(count for key, count in read if key == stored.key)
            copies[stored.key] = taken / torch.Size(stored.shape).numel()
    for key, count in copies.items():
        everywhere = "norm" in key or key.endswith(("o_proj.bias", "down_proj.bias"))
        assert count == (4 if everywhere else 2 if ".k_proj" in key or ".v_proj" in key else 1), key


def test_a_stage_reads_only_its_layers(llama):
    decoder = load(llama, layer_range=(1, 2))
    assert not decoder.is_first
    assert not decoder.is_last
    # Nobody else's damage matters.
    rewrite(llama, lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(1)}))
    load(llama, layer_range=(1, 2))
    with pytest.raises(CheckpointError, match=r"model.layers.0.mlp.up_proj.weight"):
        load(llama, layer_range=(0, 1))


def test_plain_weights_are_dropped_after_packing(llama):
    decoder = load(llama)
    names = set(decoder.parameters())
    assert "layers.0.attention.qkv_proj.weight" not in names
    assert "head.weight" not in names
    assert {"embedding.weight", "norm.weight", "layers.2.attn_in.weight"} <= names


def test_missing_shard_is_named(sharded):
    victim = sorted(sharded.glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(CheckpointError, match=rf"shard .*{victim.name}, named in {INDEX}, is missing"):
        load(sharded)


@pytest.mark.parametrize("keep", [0, 4, 200, 0.5, 0.999])
def test_truncated_file_is_named(llama, keep):
    data = (llama / SINGLE).read_bytes()
    (llama / SINGLE).write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError, match=rf"{SINGLE} is damaged or cut short"):
        load(llama)


def test_shard_without_the_tensor_it_should_hold(sharded):
    first, second = sorted(path.name for path in sharded.glob("*.safetensors"))[:2]

    def misplace(names):
        names.update({key: second for key, name in names.items() if name == first})

    reindex(sharded, misplace)
    with pytest.raises(CheckpointError, match=rf"{second} lacks tensor '.*', which {INDEX} says it holds"):
        load(sharded)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin", "..", "", 3])
def test_index_cannot_leave_the_folder(sharded, name):
    reindex(sharded, lambda names: names.update({"model.norm.weight": name}))
    with pytest.raises(CheckpointError, match=r"only a \*.safetensors file of the same folder is read"):
        load(sharded)


def test_damaged_index(sharded):
    for text, message in [("{}", "weight_map must map"), ("{", "cannot be read"), ('{"weight_map": []}', "must map")]:
        (sharded / INDEX).write_text(text)
        with pytest.raises(CheckpointError, match=message):
            load(sharded)


def test_wrong_shape_names_both(llama):
    key = "model.layers.1.self_attn.k_proj.weight"
    rewrite(llama, lambda tensors: tensors.update({key: tensors[key][:-1].clone()}))
    with pytest.raises(CheckpointError, match=rf"'{key}' has shape \[47, 64\], config.json says \[48, 64\]"):
        load(llama)


def test_fused_tensor_of_wrong_shape(checkpoints, tmp_path):
    path = shutil.copytree(tiny.make_checkpoint("phi3", checkpoints), tmp_path / "phi3")
    key = "model.layers.0.self_attn.qkv_proj.weight"
    rewrite(path, lambda tensors: tensors.update({key: tensors[key][:-1].clone()}))
    with pytest.raises(CheckpointError, match=r"qkv_proj.weight' has shape \[127, 64\], config.json says \[128, 64\]"):
        load(path)


@pytest.mark.parametrize(
    "key",
    [
        "model.layers.0.self_attn.rotary.weight",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.0.self_attn.q_proj.scales",
        "model.layers.3.input_layernorm.weight",
        "model.layers.x.input_layernorm.weight",
        "visual.weight",
    ],
)
def test_unknown_tensor(llama, key):
    rewrite(llama, lambda tensors: tensors.update({key: torch.zeros(24)}))
    with pytest.raises(CheckpointError, match=rf"tensor '{key}' has no place in this model"):
        load(llama)


def test_leftover_of_old_exports_is_skipped(llama):
    rewrite(llama, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(12)}))
    load(llama)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("model.layers.2.self_attn.v_proj.bias", r"layers.2.attention.qkv_proj.bias \(v\)"),
        ("model.layers.0.mlp.gate_proj.weight", r"layers.0.mlp.gate_up_proj.weight \(gate\)"),
        ("model.layers.1.post_attention_layernorm.weight", r"layers.1.mlp_in.weight \(whole\)"),
        ("lm_head.weight", r"head.weight \(whole\)"),
    ],
)
def test_missing_tensor(llama, key, name):
    rewrite(llama, lambda tensors: tensors.pop(key))
    with pytest.raises(CheckpointError, match=f"the checkpoint holds no tensor for {name}$"):
        load(llama)


def test_quantized_values_are_refused(llama):
    key = "model.layers.0.mlp.down_proj.weight"
    rewrite(llama, lambda tensors: tensors.update({key: tensors[key].to(torch.int8)}))
    with pytest.raises(CheckpointError, match=rf"tensor '{key}' is I8; only F32, F16, BF16 can be read"):
        load(llama)


def test_pickled_weights_are_never_opened(llama):
    (llama / SINGLE).unlink()
    with pytest.raises(CheckpointError, match=rf"holds neither {SINGLE} nor {INDEX}$"):
        load(llama)
    (llama / "pytorch_model.bin").write_bytes(b"not even a pickle")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin is pickled and is never opened, convert it"):
        load(llama)


def test_tied_head_stored_twice(checkpoints, tmp_path):
    """Equal copies are one matrix; different ones contradict the config."""
    path = shutil.copytree(tiny.make_checkpoint("qwen3", checkpoints), tmp_path / "qwen3")
    table = "model.embed_tokens.weight"
    rewrite(path, lambda tensors: tensors.update({"lm_head.weight": tensors[table].clone()}))
    load(path)
    rewrite(path, lambda tensors: tensors.update({"lm_head.weight": tensors[table] + 1}))
    with pytest.raises(CheckpointError, match=r"is tied to another one by config.json but has other values"):
        load(path)


def test_half_precision_files_load_into_fp32(llama):
    wanted = {key: value.half().float() for key, value in safetensors.torch.load_file(llama / SINGLE).items()}
    rewrite(llama, lambda tensors: tensors.update({key: value.half() for key, value in tensors.items()}))
    decoder = load(llama)
    assert torch.equal(decoder.parameters()["embedding.weight"].tensor, wanted["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("family", "overrides", "tp", "message"),
    [
        ("llama", {}, 3, r"num_kv_heads \(2\) does not divide parallel.tensor \(3\); use tensor: 2"),
        ("llama", {}, 8, r"num_heads \(4\) is not divisible by parallel.tensor \(8\); use tensor: 4"),
        ("llama", {"intermediate_size": 90}, 4, r"intermediate_size \(90\) is not divisible by .*; use tensor: 3"),
    ],
)
def test_tensor_axis_must_fit(checkpoints, family, overrides, tp, message):
    group = Group(0, tp)
    mesh = Mesh(shape=MeshShape(tp=tp), rank=0, device=CPU, tp=group)
    with pytest.raises(ConfigError, match=message):
        load(tiny.make_checkpoint(family, checkpoints, **overrides), mesh)


def test_layer_range_must_exist(llama):
    for layer_range in ((0, 4), (2, 2), (-1, 1)):
        with pytest.raises(ConfigError, match="is not part of a model of 3 layers"):
            load(llama, layer_range=layer_range)

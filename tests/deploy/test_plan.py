"""Resolving a deployment: what is decided, what is refused, the codec, the text, the examples. About 8 s (torch: 3)."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.deploy.config import ClusterConfig, KvConfig, ModelConfig, ParallelConfig, load_config, parse_config
from phalanx.deploy.hardware import Hardware, Node
from phalanx.deploy.placement import seat_ranks
from phalanx.deploy.plan import DeploymentPlan, decode, encode
from phalanx.deploy.plan_text import plan_json, plan_text, resolved_file
from phalanx.deploy.resolve import resolve
from phalanx.errors import ConfigError
from phalanx.models import qwen3_moe
from phalanx.models.hf_config import read_config
from phalanx.models.qwen3 import decoder_config
from phalanx.models.spec import DecoderConfig
from phalanx.parallel.mesh import MeshShape
from phalanx.runtime.memory import readable

GIB = 2**30
EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))


def qwen3(layers: int, hidden: int, inner: int, heads: int, kv_heads: int = 8, vocab: int = 151936) -> DecoderConfig:
    return decoder_config(
        {
            "model_type": "qwen3",
            "vocab_size": vocab,
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": 128,
            "hidden_act": "silu",
            "max_position_embeddings": 40960,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }
    )


QWEN3_8B = qwen3(36, 4096, 12288, 32)
QWEN3_32B = qwen3(64, 5120, 25600, 64)
QWEN3_30B_A3B = qwen3_moe.decoder_config(
    {
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
)
SMALL = qwen3(6, 256, 384, 8, 4, 1000)


def cpu_nodes(*cpus: int, memory: int = 8 * GIB) -> Hardware:
    return Hardware(
        nodes=tuple(
            Node(name=f"n{index}", cpus=count, gpus=0, gpu_memory_bytes=0, memory_bytes=memory)
            for index, count in enumerate(cpus)
        )
    )


def gpu_nodes(*gpus: int, memory: int = 80 * GIB) -> Hardware:
    return Hardware(
        nodes=tuple(
            Node(name=f"g{index}", cpus=64, gpus=count, gpu_memory_bytes=memory, memory_bytes=512 * GIB)
            for index, count in enumerate(gpus)
        )
    )


def config(text: str = "") -> ClusterConfig:
    return parse_config(f"model: {{path: /models/x}}\n{text}", "f.yaml")


def check(plan: DeploymentPlan, hardware: Hardware, model: DecoderConfig) -> None:
    """All invariants of a plan."""
    shape, nodes = plan.parallel.shape, {node.name: node for node in hardware.nodes}
    world = shape.world_size
    assert [(rank.replica, rank.rank) for rank in plan.ranks] == [
        (replica, rank) for replica in range(plan.replicas) for rank in range(world)
    ]
    assert sum(plan.parallel.stage_layers) == len(model.layers)
    for rank in plan.ranks:
        assert shape.rank(rank.pp, rank.dp, rank.tp) == rank.rank
        assert rank.first_layer == sum(plan.parallel.stage_layers[: rank.pp])
        assert rank.end_layer - rank.first_layer == plan.parallel.stage_layers[rank.pp]
        assert rank.weight_bytes + rank.workspace_bytes + rank.kv_bytes <= rank.limit_bytes
    for first in range(0, len(plan.ranks), shape.tp):
        assert len({rank.node for rank in plan.ranks[first : first + shape.tp]}) == 1
    for name, node in nodes.items():
        here = [rank for rank in plan.ranks if rank.node == name]
        assert sorted(rank.slot for rank in here) == list(range(len(here)))
        if plan.device == "cuda":
            assert len(here) <= node.gpus
            assert all(rank.limit_bytes < node.gpu_memory_bytes for rank in here)
        else:
            assert len(here) * plan.workers.threads <= node.cpus
            assert sum(rank.limit_bytes for rank in here) <= node.memory_bytes
    assert -(-plan.scheduler.max_model_len // plan.kv.block_size) <= plan.kv.num_blocks - 1
    assert plan.scheduler.max_model_len <= model.max_position
    tree = json.loads(encode(plan))
    tree["ray"]["address"] = ""  # where auto means the running cluster
    tree["moe"].pop("dispatch")  # auto there is no open decision: the engine makes it anew for every step
    assert '"auto"' not in json.dumps(tree)
    assert decode(encode(plan)) == plan
    again = resolve(parse_config(resolved_file(plan), "resolved"), hardware, model)
    assert again == plan
    assert again.digest == plan.digest


def test_decisions_on_cpu() -> None:
    plan = resolve(config("parallel: {tensor: 2, pipeline: 2}"), cpu_nodes(4, 4), SMALL)
    check(plan, cpu_nodes(4, 4), SMALL)
    assert (plan.device, plan.model.dtype, plan.model.name) == ("cpu", "bfloat16", "x")
    assert (plan.kv.block_size, plan.scheduler.max_batch_tokens, plan.workers.threads) == (16, 512, 2)
    assert plan.scheduler.max_model_len == 40960
    assert [(rank.node, rank.slot) for rank in plan.ranks] == [("n0", 0), ("n0", 1), ("n1", 0), ("n1", 1)]
    assert plan.kv.num_blocks == 256 * 1024 // 16 + 1
    # 3 layers x (k, v) x 2 kv heads x 128 x 2 bytes x 16 tokens.
    assert plan.ranks[0].kv_bytes == plan.kv.num_blocks * (3 * 2 * 2 * 128 * 2 * 16)


def test_cpu_pool_stops_at_what_is_useful() -> None:
    plan = resolve(config("scheduler: {max_sequences: 4}"), cpu_nodes(4, memory=512 * GIB), SMALL)
    assert plan.kv.num_blocks == 40960 // 16 + 1  # one longest sequence is more than 4 x 1024 tokens
    plan = resolve(config("scheduler: {max_sequences: 4, max_model_len: 100}"), cpu_nodes(4), SMALL)
    assert plan.kv.num_blocks == 4 * 7 + 1


def test_decisions_on_cuda() -> None:
    hardware = gpu_nodes(8)
    plan = resolve(config("parallel: {tensor: 2}\nreplicas: 4"), hardware, QWEN3_8B)
    check(plan, hardware, QWEN3_8B)
    assert (plan.device, plan.kv.block_size, plan.scheduler.max_batch_tokens) == ("cuda", 64, 8192)
    assert [rank.slot for rank in plan.ranks] == list(range(8))
    # 8.19e9 parameters, bf16, two ranks; the model card says 8.2B.
    assert sum(rank.weight_bytes for rank in plan.ranks[:2]) == pytest.approx(8.19e9 * 2, rel=0.002)
    rank = plan.ranks[0]
    free = int(80 * GIB * 0.9) - rank.weight_bytes - rank.workspace_bytes
    block = 36 * 2 * 4 * 128 * 2 * 64
    assert plan.kv.num_blocks == free // block
    assert plan.scheduler.max_model_len == 40960
    assert plan.workers.threads == 8


def test_the_fullest_rank_decides() -> None:
    """Stage 1 holds five of six layers, so its blocks are five times as big."""
    text = "parallel: {pipeline: 2, stage_layers: [1, 5]}\nscheduler: {max_sequences: 60000}"
    plan = resolve(config(text), cpu_nodes(1, 1), SMALL)
    assert plan.ranks[1].kv_bytes == 5 * plan.ranks[0].kv_bytes
    block = 5 * 2 * 4 * 128 * 2 * 16
    assert plan.kv.num_blocks == int(8 * GIB * 0.2) // block


def test_longest_sequence_follows_a_small_pool() -> None:
    plan = resolve(config("kv: {num_blocks: 11}"), cpu_nodes(2), SMALL)
    assert (plan.kv.num_blocks, plan.scheduler.max_model_len, plan.kv.capacity_tokens) == (11, 160, 160)


@pytest.mark.parametrize("name", ["tiny", "/models/Qwen3-8B", "/models/Qwen3-8B/", "org/Qwen3-8B"])
def test_name_is_the_last_part_of_the_path(name: str) -> None:
    plan = resolve(parse_config(f"model: {{path: {name}}}", "f"), cpu_nodes(2), SMALL)
    assert plan.model.name == ("tiny" if name == "tiny" else "Qwen3-8B")


REFUSED = [
    ("device: cuda", cpu_nodes(2), "none of 1 nodes has a GPU; use device: cpu"),
    (
        "parallel: {tensor: 3}",
        cpu_nodes(9),
        r"parallel\.tensor \(3\) does not divide num_heads \(8\); this model allows 1, 2, 4, 8$",
    ),
    ("parallel: {tensor: 3}", cpu_nodes(9), r"neither divides nor is a multiple of num_kv_heads \(4\)"),
    ("parallel: {tensor: 16}", cpu_nodes(16), r"parallel\.tensor \(16\) does not divide num_heads \(8\)"),
    ("parallel: {tensor: 5}", cpu_nodes(9), r"does not divide intermediate_size \(384\)"),
    ("parallel: {pipeline: 7}", cpu_nodes(9), r"parallel\.pipeline \(7\) is more than the model's layers \(6\); use 6"),
    (
        "parallel: {pipeline: 2, stage_layers: [3, 4]}",
        cpu_nodes(9),
        r"stage_layers \[3, 4\] add up to 7, but the model has 6",
    ),
    (
        "parallel: {tensor: 4}",
        cpu_nodes(2, 3),
        r"parallel\.tensor \(4\): a group of 4 ranks .4 CPUs. must sit on one node and the largest has 3 CPUs; "
        r"use tensor: 3 or less",
    ),
    (
        "parallel: {tensor: 2}\nworkers: {threads: 2}",
        cpu_nodes(3),
        r"2 ranks .4 CPUs. must sit on one node and the largest has 3 CPUs; use tensor: 1 or less",
    ),
    (
        "parallel: {tensor: 2, pipeline: 2, data: 2}\nreplicas: 2",
        cpu_nodes(3, 4),
        r"replicas \(2\) x parallel\.pipeline \(2\) x parallel\.data \(2\) = 8 groups of 2 ranks .2 CPUs., "
        r"but the nodes \(n0: 3, n1: 4 CPUs\) hold 3; lower one of the three or add nodes",
    ),
    ("parallel: {tensor: 8}", gpu_nodes(4, 4), r"8 ranks .8 GPUs. must sit on one node .* has 4 GPUs"),
    ("parallel: {data: 5}", gpu_nodes(2, 2), r"= 5 groups .* \(g0: 2, g1: 2 GPUs\) hold 4"),
    ("parallel: {data: 2}", Hardware(nodes=()), r"the largest has 0 CPUs"),
    (
        "",
        cpu_nodes(2, memory=2**20),
        r"a rank of pipeline stage 0 does not fit: .* of weights, .* it may use 1 MiB; raise parallel\.tensor",
    ),
    ("", gpu_nodes(1, memory=2**20), r"does not fit: .* it may use 922 KiB; raise"),
    (
        "kv: {num_blocks: 9999999}",
        cpu_nodes(2),
        r"kv\.num_blocks \(9999999\) takes .* has room for \d+ blocks .* or auto",
    ),
    (
        "kv: {num_blocks: 10}\nscheduler: {max_model_len: 145}",
        cpu_nodes(2),
        r"num_blocks \(10, .* raise num_blocks to 11 or lower max_model_len to 144",
    ),
    (
        "ray: {address: 'n0:6379'}",
        cpu_nodes(2, 2),
        r"server\.engine_listen \(127\.0\.0\.1:0\) can be reached from this machine only, .* on 2 machines; write",
    ),
    ("moe: {exact: true}", cpu_nodes(2), "moe: a qwen3 checkpoint has no experts; leave the section out"),
    ("scheduler: {max_model_len: 50000}", cpu_nodes(2), r"max_model_len \(50000\) is more than the 40960 positions"),
]


@pytest.mark.parametrize(("text", "hardware", "pattern"), REFUSED, ids=[row[2][:40] for row in REFUSED])
def test_refused_with_the_fix(text: str, hardware: Hardware, pattern: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(config(text), hardware, SMALL)
    lines = str(caught.value).splitlines()
    assert any(re.search(pattern, line) for line in lines), lines


def test_refusals_come_together() -> None:
    text = "parallel: {tensor: 3, pipeline: 9}\nscheduler: {max_model_len: 50000}"
    with pytest.raises(ConfigError) as caught:
        resolve(config(text), cpu_nodes(2), SMALL)
    assert len(str(caught.value).splitlines()) == 5  # two divisions (384 / 3 is even), layers, length, nodes


def test_a_config_made_in_python_meets_the_same_conflicts() -> None:
    made = ClusterConfig(
        model=ModelConfig(path="tiny"), kv=KvConfig(cpu_memory=1), parallel=ParallelConfig(stage_layers=(3, 3))
    )
    with pytest.raises(ConfigError) as caught:
        resolve(made, cpu_nodes(2), SMALL)
    assert "kv.cpu_memory: offload" in str(caught.value)
    assert "parallel.stage_layers: 2 entries for 1 stages" in str(caught.value)


def test_unservable_checkpoint_dtype() -> None:
    odd = dataclasses.replace(SMALL, dtype="float8_e4m3fn")
    with pytest.raises(ConfigError, match=r"'float8_e4m3fn' cannot be served; write one of float32, bfloat16, float16"):
        resolve(config(), cpu_nodes(2), odd)
    plan = resolve(parse_config("model: {path: x, dtype: float32}", "f"), cpu_nodes(2), odd)
    assert plan.model.dtype == "float32"


LAYOUTS = st.fixed_dictionaries(
    {
        "tensor": st.sampled_from([1, 2, 4, 8]),
        "pipeline": st.integers(1, 6),
        "data": st.integers(1, 2),
        "replicas": st.integers(1, 2),
        "threads": st.sampled_from(["auto", 1, 3]),
        "num_blocks": st.sampled_from(["auto", 2, 300]),
        "max_sequences": st.sampled_from([1, 17, 5000]),
        "fraction": st.sampled_from([0.2, 0.9]),
    }
)
NODES = st.lists(
    st.builds(
        Node,
        name=st.just(""),
        cpus=st.integers(0, 64),
        gpus=st.sampled_from([0, 1, 8, 16]),
        gpu_memory_bytes=st.sampled_from([GIB // 4, 8 * GIB, 80 * GIB]),
        memory_bytes=st.sampled_from([GIB // 8, 16 * GIB, 64 * GIB]),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(LAYOUTS, NODES, st.sampled_from(["cpu", "auto"]))
def test_any_accepted_plan_keeps_the_invariants(layout: dict[str, object], nodes: list[Node], device: str) -> None:
    hardware = Hardware(nodes=tuple(dataclasses.replace(node, name=f"n{index}") for index, node in enumerate(nodes)))
    text = (
        "parallel: {{tensor: {tensor}, pipeline: {pipeline}, data: {data}}}\nreplicas: {replicas}\n"
        "workers: {{threads: {threads}}}\nscheduler: {{max_sequences: {max_sequences}}}\n"
        "kv: {{num_blocks: {num_blocks}, gpu_fraction: {fraction}}}\n"
    ).format(**layout)
    try:
        plan = resolve(config(f"{text}device: {device}"), hardware, SMALL)
    except ConfigError:
        return
    check(plan, hardware, SMALL)


def test_seats_keep_a_replica_together_on_gpus_and_spread_on_cpus() -> None:
    shape = MeshShape(pp=3, dp=1, tp=2)
    packed = seat_ranks(shape, 2, [4, 4], spread=False)
    assert [[seat.node for seat in packed if seat.replica == replica] for replica in (0, 1)] == [[0] * 6, [1] * 6]
    spread = seat_ranks(shape, 2, [9, 9, 9], spread=True)
    assert [sum(seat.node == node for seat in spread) for node in range(3)] == [4, 4, 4]
    uneven = seat_ranks(shape, 2, [1, 5], spread=True)
    assert [sum(seat.node == node for seat in uneven) for node in range(2)] == [2, 10]


def test_digest_sees_every_field_and_no_order() -> None:
    plans = [
        resolve(config(text), cpu_nodes(4), SMALL)
        for text in ("", "replicas: 2", "server: {drain: 61s}", "kv: {prefix_cache: false}", "kernels: {a: b, c: d}")
    ]
    assert len({plan.digest for plan in plans}) == len(plans)
    assert resolve(config("kernels: {c: d, a: b}"), cpu_nodes(4), SMALL).digest == plans[-1].digest
    assert re.fullmatch("[0-9a-f]{64}", plans[0].digest)


@pytest.mark.parametrize("data", [b"", b"{}", b"[1]", b"\xff", b'{"model": 3}'])
def test_decode_refuses_what_is_no_plan(data: bytes) -> None:
    with pytest.raises(ConfigError, match="not a deployment plan"):
        decode(data)


def test_decode_refuses_a_wrong_type() -> None:
    tree = json.loads(encode(resolve(config(), cpu_nodes(2), SMALL)))
    tree["kv"]["num_blocks"] = "auto"
    with pytest.raises(ConfigError, match=r"kv\.num_blocks"):
        decode(json.dumps(tree).encode())


def test_text_for_people() -> None:
    plan = resolve(config("parallel: {tensor: 2, pipeline: 2}\nkv: {num_blocks: 101}"), cpu_nodes(4, 4), SMALL)
    text = plan_text(plan)
    assert "\x1b" not in text
    assert all(line == line.rstrip() for line in text.splitlines())
    rows = [line.split() for line in text.splitlines() if re.match(r" +\d+ +\d+ ", line)]
    assert [row[:8] for row in rows] == [
        ["0", "0", "0", "0", "0", "n0", "0", "0-2"],
        ["0", "1", "0", "0", "1", "n0", "1", "0-2"],
        ["0", "2", "1", "0", "0", "n1", "0", "3-5"],
        ["0", "3", "1", "0", "1", "n1", "1", "3-5"],
    ]
    for part in (
        "num_heads 8 / tensor 2 = 4 per rank",
        "layers 6 = 3 + 3",
        "100 usable blocks of 16 tokens = 1600 tokens per data rank",
        "up to 256 sequences at once, 1 of them if each has the longest length of 1600 tokens",
        plan.digest,
        resolved_file(plan),
    ):
        assert part in text
    assert "each on 2 of 8 tensor ranks" in plan_text(resolve(config("parallel: {tensor: 8}"), cpu_nodes(8), SMALL))


def test_long_node_names_are_not_cut() -> None:
    node = dataclasses.replace(cpu_nodes(2).nodes[0], name="ip-10-0-0-1.eu-central-1.compute.internal/abcdef" * 2)
    text = plan_text(resolve(config(), Hardware(nodes=(node,)), SMALL), width=80)
    assert "…" not in text


def test_data_for_programs() -> None:
    plan = resolve(config("parallel: {data: 2}"), cpu_nodes(4), SMALL)
    tree = json.loads(json.dumps(plan_json(plan)))
    assert tree["digest"] == plan.digest
    assert tree["capacity_tokens"] == (plan.kv.num_blocks - 1) * 16
    assert [rank["dp"] for rank in tree["ranks"]] == [0, 1]


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (1023 * 1024, "1023 KiB"), (80 * GIB, "80 GiB")],
)
def test_readable(num_bytes: int, text: str) -> None:
    assert readable(num_bytes) == text


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_examples_resolve(path: Path) -> None:
    """Every example parses; those of other machines are planned for the machines their comment names."""
    machines = {
        "tiny": (cpu_nodes(2, 2, memory=4 * GIB), None),
        "qwen3-8b-tp2": (gpu_nodes(2), QWEN3_8B),
        "two-nodes": (gpu_nodes(4, 4), QWEN3_32B),
        "tiny-moe": (cpu_nodes(2, 2, memory=4 * GIB), None),
        "moe-two-nodes": (gpu_nodes(4, 4), QWEN3_30B_A3B),
    }
    example = load_config(path)
    hardware, model = machines[path.stem]
    model = model or read_config(example.model.path)
    plan = resolve(example, hardware, model)
    check(plan, hardware, model)
    if path.stem != "qwen3-8b-tp2":
        assert {rank.node for rank in plan.ranks if rank.pp == 0}.isdisjoint(r.node for r in plan.ranks if r.pp == 1)

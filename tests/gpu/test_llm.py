"""The embedded models on a GPU, alone and as an expert group over NCCL: the tokens that a CPU gives.

Several NCCL ranks share the one GPU: with a host id of its own for each, NCCL takes them for ranks on different
machines. That proves that groups, dispatchers, moves and generations work over NCCL; it says nothing about speed.
"""

import os
from pathlib import Path

import pytest
import torch

from phalanx import LLM, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PROMPTS = [f"def function_{number}(" for number in range(8)]
GREEDY = SamplingParams(max_tokens=32, temperature=0, ignore_eos=True)
SEEDED = [SamplingParams(max_tokens=32, temperature=0.8, seed=seed, ignore_eos=True) for seed in range(len(PROMPTS))]
LIMITS = {"scheduler": {"max_sequences": 16}, "kv": {"num_blocks": 200}, "dtype": "float32"}


def tokens(llm: LLM) -> list[list[int]]:
    return [out.token_ids for params in (GREEDY, SEEDED) for out in llm.generate(PROMPTS, params)]


@pytest.fixture(scope="module", params=["tiny", "tiny-moe"])
def model(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def answers() -> dict[str, list[list[int]]]:
    found = {}
    for name in ("tiny", "tiny-moe"):
        with LLM(name, device="cpu", **LIMITS) as llm:  # type: ignore[arg-type]
            found[name] = tokens(llm)
    return found


@pytest.fixture
def _hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every process that Python starts from here on has an NCCL host id of its own; this one sees eight GPUs."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    (tmp_path / "sitecustomize.py").write_text("import os\nos.environ['NCCL_HOSTID'] = str(os.getpid())\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", ""), os.getcwd()]))


def test_one_rank(model: str, answers: dict[str, list[list[int]]]) -> None:
    with LLM(model, device="cuda", **LIMITS) as llm:  # type: ignore[arg-type]
        assert tokens(llm) == answers[model]
        assert tokens(llm) == answers[model], "with a prefix cache"


@pytest.mark.parametrize("experts", ["triton", "grouped_mm", "loop"])
def test_expert_back_ends(answers: dict[str, list[list[int]]], experts: str) -> None:
    with LLM("tiny-moe", device="cuda", kernels={"experts": experts}, **LIMITS) as llm:  # type: ignore[arg-type]
        assert tokens(llm) == answers["tiny-moe"]


def test_bf16_runs() -> None:
    options = {**LIMITS, "dtype": "bfloat16"}
    with LLM("tiny-moe", device="cuda", **options) as llm:  # type: ignore[arg-type]
        assert all(len(ids) == 32 for ids in tokens(llm))


@pytest.mark.usefixtures("_hosts")
@pytest.mark.parametrize(
    ("data", "tensor", "dispatch", "node_size"),
    [(2, 1, "allgather", 1), (2, 1, "flat", 2), (4, 1, "two_hop", 2), (1, 2, "flat", 2)],
)
def test_expert_group(
    answers: dict[str, list[list[int]]], data: int, tensor: int, dispatch: str, node_size: int
) -> None:
    moe = {"dispatch": dispatch, "node_size": node_size, "rebalance": {"interval_steps": 0}}
    with LLM("tiny-moe", device="cuda", data=data, tensor=tensor, moe=moe, **LIMITS) as llm:  # type: ignore[arg-type]
        assert tokens(llm) == answers["tiny-moe"]


@pytest.mark.usefixtures("_hosts")
def test_experts_move_and_the_group_grows(answers: dict[str, list[list[int]]]) -> None:
    moe = {"dispatch": "flat", "redundant_experts": 8, "rebalance": {"interval_steps": 10, "max_moved": 0.5}}
    with LLM("tiny-moe", device="cuda", data=2, moe=moe, **LIMITS) as llm:  # type: ignore[arg-type]
        planner = llm.engine.mesh.planner
        assert planner is not None
        for _ in range(4):
            assert tokens(llm) == answers["tiny-moe"]
            llm.engine.mesh.rebalance()
        assert planner.num_moved > 0
        llm.scale(3)
        assert tokens(llm) == answers["tiny-moe"]
        llm.scale(2)
        assert tokens(llm) == answers["tiny-moe"]


@pytest.mark.usefixtures("_hosts")
def test_exact_mode() -> None:
    """In bf16 too, the bits of every log-probability depend on no dispatcher and no placement."""
    params = SamplingParams(max_tokens=16, temperature=0, logprobs=3, ignore_eos=True)
    found = []
    for dispatch, node_size in (("flat", 2), ("allgather", 1), ("two_hop", 1)):
        moe = {"exact": True, "dispatch": dispatch, "node_size": node_size, "redundant_experts": 8}
        options = {**LIMITS, "dtype": "bfloat16"}
        with LLM("tiny-moe", device="cuda", data=2, moe=moe, **options) as llm:  # type: ignore[arg-type]
            for rebalanced in (False, True):
                found.append([llm.generate([prompt], params)[0].logprobs for prompt in PROMPTS])
                if not rebalanced:
                    llm.engine.mesh.rebalance()
                    tokens(llm)
    assert all(one == found[0] for one in found[1:])

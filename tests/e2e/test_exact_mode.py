"""`moe.exact`: the same bits of every logit, however many ranks, whichever dispatcher and placement. About 12 s.

Requests run one after the other, so that attention and dense layers see the same rows in the same batches everywhere;
what differs is which ranks the experts are on and how rows get there.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from phalanx import LLM, SamplingParams
from tests.support.engines import SHARING_CORES, forked_ranks, read_records
from tests.support.oracle import TOLERANCE, Oracle
from tests.support.traffic import planner_of

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, prompt_logprobs=0)
LIMITS: dict[str, Any] = {
    "scheduler": {"max_batch_tokens": 24, "max_sequences": 4, "max_model_len": 112},
    "kv": {"num_blocks": 60, "block_size": 8, "prefix_cache": False},
}
LAYOUTS: list[tuple[int, list[str], int, int]] = [
    (2, ["flat", "allgather", "two_hop"], 1, 0),
    (2, ["flat", "allgather"], 2, 4),
    (4, ["flat", "allgather", "two_hop"], 2, 6),
    (4, ["two_hop", "flat"], 1, 2),
]
"""Data ranks, dispatchers, node size, redundant experts."""

Logits = dict[tuple[int, ...], Tensor]


def logits_of(folder: Path, oracle: Oracle, kinds: list[str], **layout: Any) -> list[Logits]:
    """Every logit of three requests, once per dispatcher, in one process group."""
    folder.mkdir()
    found: list[Logits] = []
    with forked_ranks(folder), LLM(str(oracle.path), **layout, **SHARING_CORES, **LIMITS) as llm:
        sizes: dict[Path, int] = {}
        for kind in kinds:
            planner_of(llm.engine).policy.fix(kind)
            for i in range(3):
                (result,) = llm.generate([oracle.prompts[i]], GREEDY)
                assert result.token_ids == oracle.outputs[i][: GREEDY.max_tokens]
            while llm.engine.has_work:
                llm.engine.step(1.0)
            found.append({})
            for path in folder.iterdir():
                start, sizes[path] = sizes.get(path, 0), path.stat().st_size
                part = folder.parent / "part"
                part.mkdir(exist_ok=True)
                (part / path.name).write_bytes(path.read_bytes()[start:])
            for record in read_records(folder.parent / "part"):
                found[-1][record.token_ids] = record.logits
    return found


@pytest.mark.multi
def test_bits_depend_on_nothing_but_the_tokens(moe_oracle: Oracle, tmp_path: Path) -> None:
    (alone,) = logits_of(tmp_path / "alone", moe_oracle, ["local"], moe={"exact": True})
    expected = dict(moe_oracle.contexts())
    assert len(alone) >= sum(len(prompt) + 5 for prompt in moe_oracle.prompts[:3])
    assert max(float((row - expected[ids]).abs().max()) for ids, row in alone.items()) < TOLERANCE
    for number, (data, kinds, node_size, redundant) in enumerate(LAYOUTS):
        moe = {"exact": True, "node_size": node_size, "redundant_experts": redundant}
        runs = logits_of(tmp_path / str(number), moe_oracle, kinds, data=data, moe=moe)
        for kind, logits in zip(kinds, runs, strict=True):
            assert logits.keys() == alone.keys()
            different = [ids for ids, row in logits.items() if not torch.equal(row, alone[ids])]
            assert not different, f"data {data}, {kind}, node size {node_size}, redundant {redundant}"


@pytest.mark.multi
def test_without_it_bits_differ(moe_oracle: Oracle, tmp_path: Path) -> None:
    """The comparison above can fail: summed in another order, some logits have other bits."""
    (alone,) = logits_of(tmp_path / "alone", moe_oracle, ["local"])
    (two,) = logits_of(tmp_path / "two", moe_oracle, ["flat"], data=2)
    assert any(not torch.equal(row, alone[ids]) for ids, row in two.items())

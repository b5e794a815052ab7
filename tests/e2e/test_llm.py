"""The offline API on the embedded model: prompts, parameters, answers. Runs in 10 s."""

import math
import random
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from phalanx import LLM, SamplingParams
from phalanx.models.loading import resolve_path
from phalanx.runtime.frames import TokenLogprobs
from tests.support import oracle, tiny
from tests.support.engines import SHARING_CORES

TEXT = "def read_config(path):\n    "
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a list?"}]
REPEATING = "x = x + 1\n" * 6 + "x ="
"""The likeliest next ids stand in the prompt, so that it matters which penalties count those."""

IDS = random.Random(5).choices(range(3, 4000), k=90)
LIMITS = {"scheduler": {"max_batch_tokens": 64, "max_model_len": 256}}
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("tiny", **SHARING_CORES, **LIMITS) as llm:
        yield llm


@pytest.fixture(autouse=True)
def _nothing_left(llm: LLM) -> Iterator[None]:
    """After every test the engine is idle, whole and empty."""
    yield
    assert not llm.engine.has_work
    llm.engine.check()


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.load_hf(resolve_path("tiny"))


def _greedy(**fields: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 24, "ignore_eos": True, **fields})


class TestPrompts:
    def test_every_form_and_the_order_of_results(self, llm, model):
        prompts = [TEXT, IDS, CHAT, TEXT + "x"]
        results = llm.generate(prompts, _greedy())
        encode = llm.tokenizer.encode
        expected = [encode(TEXT), IDS, llm.tokenizer.encode_chat(CHAT), encode(TEXT + "x")]
        assert [result.prompt_token_ids for result in results] == expected
        for result in results:
            assert result.token_ids == tiny.greedy(model, result.prompt_token_ids, 24)[0]
            assert result.text == llm.tokenizer.decode(result.token_ids)
            assert result.finish_reason == "length"

    @pytest.mark.parametrize("prompt", [TEXT, IDS, CHAT], ids=["text", "ids", "chat"])
    def test_one_prompt_needs_no_list(self, llm, prompt):
        (alone,), (listed,) = llm.generate(prompt, _greedy()), llm.generate([prompt], _greedy())
        assert (alone.prompt_token_ids, alone.token_ids) == (listed.prompt_token_ids, listed.token_ids)

    def test_params_for_each(self, llm):
        each = [_greedy(max_tokens=3), _greedy(max_tokens=9), SamplingParams(max_tokens=5, ignore_eos=True, n=2)]
        results = llm.generate([IDS, IDS, IDS], each)
        assert [[len(choice.token_ids) for choice in result.choices] for result in results] == [[3], [9], [5, 5]]
        assert results[1].token_ids[:3] == results[0].token_ids

    def test_no_max_tokens_means_all_that_fit(self, llm):
        result = llm.generate(IDS, SamplingParams(temperature=0, ignore_eos=True))[0]
        assert len(IDS) + len(result.token_ids) == 256

    def test_no_prompts_no_results(self, llm):
        assert llm.generate([]) == []

    def test_more_prompts_than_slots(self, model):
        with LLM("tiny", **SHARING_CORES, scheduler={"max_sequences": 2, "max_model_len": 256}) as narrow:
            prompts = [IDS[i : i + 20] for i in range(9)]
            results = narrow.generate(prompts, _greedy(max_tokens=6))
        assert [result.token_ids for result in results] == [tiny.greedy(model, prompt, 6)[0] for prompt in prompts]


class TestStopping:
    def test_stop_string_ends_the_text_before_it(self, llm):
        whole = llm.generate(TEXT, _greedy())[0]
        stop = whole.text[len(whole.text) // 2 :][:3]
        cut = llm.generate(TEXT, _greedy(stop=("no such text", stop)))[0].choices[0]
        assert (cut.finish_reason, cut.stop_match) == ("stop", stop)
        assert cut.text == whole.text[: whole.text.index(stop)]
        assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
        # The last id is the one that completed the string.
        assert stop in llm.tokenizer.decode(cut.token_ids)
        assert stop not in llm.tokenizer.decode(cut.token_ids[:-1])

    def test_stop_id_is_the_last_id_and_no_text(self, llm):
        whole = llm.generate(IDS, _greedy())[0]
        stop_id = whole.token_ids[-1]
        first = whole.token_ids.index(stop_id)
        cut = llm.generate(IDS, _greedy(stop_token_ids=(stop_id,)))[0]
        assert cut.finish_reason == "stop"
        assert cut.token_ids == whole.token_ids[: first + 1]
        assert cut.text == llm.tokenizer.decode(whole.token_ids[:first])

    @pytest.mark.parametrize("eos", [2, 0])
    def test_end_of_sequence_ends_unless_ignored(self, llm, eos):
        assert eos in llm.config.model.eos_token_ids
        certain = {"logit_bias": {eos: 100.0}, "max_tokens": 5}
        ended = llm.generate(TEXT, _greedy(**certain, ignore_eos=False))[0]
        assert (ended.token_ids, ended.text, ended.finish_reason) == ([eos], "", "stop")
        ignored = llm.generate(TEXT, _greedy(**certain))[0]
        assert (ignored.token_ids, ignored.finish_reason) == ([eos] * 5, "length")

    @pytest.mark.parametrize("ignore_eos", [False, True])
    def test_min_tokens_puts_off_every_stop_id(self, llm, ignore_eos):
        params = _greedy(
            logit_bias={2: 100.0, 777: 40.0}, stop_token_ids=(777,), min_tokens=4, ignore_eos=ignore_eos, max_tokens=8
        )
        ids = llm.generate(TEXT, params)[0].token_ids
        if ignore_eos:  # then 2 is an id like any other
            assert ids == [2] * 8
        else:
            assert len(ids) == 5
            assert not {2, 777} & set(ids[:4])
            assert ids[4] == 2

    def test_special_tokens_in_the_text(self, llm):
        params = {"logit_bias": {2: 100.0}, "max_tokens": 2}
        assert llm.generate(TEXT, _greedy(**params))[0].text == ""
        assert llm.generate(TEXT, _greedy(**params, skip_special_tokens=False))[0].text == "<|im_end|>" * 2


class TestSampling:
    CASES = {  # noqa: RUF012
        "repetition": {"repetition_penalty": 1.5},
        "presence and frequency": {"presence_penalty": 1.5, "frequency_penalty": -0.3},
        "bias": {"logit_bias": {400: 9.0, 401: 9.5, 402: -100.0}},
        "all, sampled": {
            "temperature": 1.1,
            "top_k": 50,
            "top_p": 0.95,
            "min_p": 0.01,
            "repetition_penalty": 1.2,
            "presence_penalty": 0.3,
            "frequency_penalty": 0.2,
            "logit_bias": {400: 3.0},
            "seed": 99,
        },
        "less than one": {"repetition_penalty": 0.8, "temperature": 1.0, "seed": 5},
        "hot and narrow": {"temperature": 50.0, "top_k": 3, "seed": 6},
    }

    @pytest.mark.parametrize("prompt", [IDS[:30], REPEATING], ids=["random", "repeating"])
    @pytest.mark.parametrize("case", CASES)
    def test_equals_the_slow_sampler(self, llm, model, case, prompt):
        params = _greedy(**self.CASES[case])
        got = llm.generate(prompt, params)[0]
        assert got.token_ids == oracle.sample(model, got.prompt_token_ids, params, params.seed or 0)
        if "penalty" in str(self.CASES[case]):
            assert got.token_ids != llm.generate(prompt, _greedy())[0].token_ids, "or the case proves nothing"

    def test_a_tiny_temperature_is_greedy(self, llm):
        nearly, fully = llm.generate([IDS, IDS], [_greedy(temperature=1e-6, seed=1), _greedy()])
        assert nearly.token_ids == fully.token_ids


class TestLogprobs:
    @pytest.mark.parametrize("k", [0, 1, 20])
    def test_of_the_output(self, llm, model, k):
        """Of the model's own distribution: bias and temperature change the choice, not the numbers."""
        params = SamplingParams(seed=3, max_tokens=16, ignore_eos=True, logprobs=k, logit_bias={500: 8.0})
        result = llm.generate(IDS, params)[0]
        expected = torch.log_softmax(tiny.hf_logits(model, IDS + result.token_ids), -1)[len(IDS) - 1 : -1]
        _check(result.logprobs, result.token_ids, expected, k)

    @pytest.mark.parametrize("k", [0, 5])
    def test_of_the_prompt(self, llm, model, k):
        """The prompt takes two steps; entry i is about prompt token i + 1. With a cached prefix too, beside others."""
        expected = torch.log_softmax(tiny.hf_logits(model, IDS), -1)
        for _ in range(2):
            plain, result = llm.generate([IDS[:40], IDS], [_greedy(), _greedy(prompt_logprobs=k)])
            assert plain.prompt_logprobs is None
            _check(result.prompt_logprobs, IDS[1:], expected[:-1], k)
            assert result.token_ids == llm.generate(IDS, _greedy())[0].token_ids

    def test_a_prompt_of_one_token_has_none(self, llm):
        assert llm.generate([[7]], _greedy(prompt_logprobs=2))[0].prompt_logprobs == []

    def test_each_request_gets_what_it_asked_for(self, llm):
        results = llm.generate([IDS] * 4, [_greedy(logprobs=k) for k in (None, 0, 2, 7)])
        assert results[0].logprobs is None
        for result, k in zip(results[1:], (0, 2, 7), strict=True):
            assert [len(entry.top_ids) for entry in result.logprobs] == [k] * 24

    def test_with_a_stop_string_there_is_one_per_id(self, llm):
        whole = llm.generate(TEXT, _greedy())[0]
        cut = llm.generate(TEXT, _greedy(stop=(whole.text[10:13],), logprobs=1))[0]
        assert [entry.token_id for entry in cut.logprobs] == cut.token_ids


def _check(entries: list[TokenLogprobs], token_ids: list[int], expected: torch.Tensor, k: int) -> None:
    """Entries against log-softmax rows (position, vocab), best first, equal ones by id."""
    assert [entry.token_id for entry in entries] == token_ids
    for entry, row in zip(entries, expected, strict=True):
        assert math.isclose(entry.logprob, row[entry.token_id], abs_tol=TOLERANCE)
        assert abs(entry.rank - 1 - int((row > row[entry.token_id]).sum())) <= int(
            ((row - row[entry.token_id]).abs() < TOLERANCE).sum() - 1
        )
        assert len(entry.top_ids) == len(entry.top_logprobs) == k
        best = row.topk(k)
        torch.testing.assert_close(torch.tensor(entry.top_logprobs), best.values, atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(row[entry.top_ids], best.values, atol=TOLERANCE, rtol=0)


def test_importing_phalanx_is_light():
    code = (
        "import sys, phalanx; phalanx.SamplingParams(max_tokens=3);"
        "heavy = {'torch', 'ray', 'grpc', 'transformers', 'numpy', 'yaml'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=20)

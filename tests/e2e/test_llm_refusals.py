"""What `LLM` refuses, each with its error and sentence; after every refusal it goes on as before. Runs in 6 s."""

import math
import random
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from safetensors.torch import load_file, save_file

from phalanx import LLM, SamplingParams
from phalanx.errors import CheckpointError, ConfigError, InvalidRequestError, RequestTooLongError, StepError
from tests.support import tiny
from tests.support.engines import SHARING_CORES

CHAT = [{"role": "user", "content": "What is a list?"}]
IDS = random.Random(5).choices(range(3, 4000), k=90)
LIMITS = {"scheduler": {"max_batch_tokens": 64, "max_model_len": 256}}
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("tiny", **SHARING_CORES, **LIMITS) as llm:
        yield llm


@pytest.fixture(scope="module")
def answer(llm: LLM) -> list[int]:
    return llm.generate(IDS, GREEDY)[0].token_ids


@pytest.fixture(autouse=True)
def _goes_on(llm: LLM, answer: list[int]) -> Iterator[None]:
    yield
    assert not llm.engine.has_work
    assert not llm._jobs
    llm.engine.check()
    assert llm.generate(IDS, GREEDY)[0].token_ids == answer


REQUESTS: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "empty text": ("", None, InvalidRequestError, r"the prompt text \(''\) makes no tokens; send some text"),
    "no ids": ([[]], None, InvalidRequestError, "prompt_token_ids is empty; send at least one id"),
    "id too large": ([5, 4096], None, InvalidRequestError, r"prompt_token_ids\[1\] \(4096\) must be .* 0 to 4095"),
    "negative id": ([5, -1], None, InvalidRequestError, r"prompt_token_ids\[1\] \(-1\) must be .* 0 to 4095"),
    "not an id": ([5, "x"], None, InvalidRequestError, r"prompt_token_ids\[1\] \('x'\) must be an integer"),
    "a number": (7, None, InvalidRequestError, r"prompts \(int\) must be a prompt or a list of prompts"),
    "not a prompt": ([5.5], None, InvalidRequestError, r"prompt \(float\) must be a text, a list of ids"),
    "no prompt": ([None], None, InvalidRequestError, r"prompt \(NoneType\) must be a text, a list of ids"),
    "too long": ([5] * 256, None, RequestTooLongError, r"256 tokens; .* 256 \(max_model_len\), so send at most 255"),
    "too much": ([5] * 200, {"max_tokens": 57}, RequestTooLongError, r"the largest max_tokens that fits is 56"),
    "bias out of range": ([5], {"logit_bias": {4096: 1.0}}, InvalidRequestError, r"logit_bias: id 4096 .*\(4096\)"),
    "stop id out of range": ([5], {"stop_token_ids": (9999,)}, InvalidRequestError, r"stop_token_ids: id 9999"),
    "message without role": ([{"content": "x"}], None, InvalidRequestError, r"role"),
    "lone surrogate": ("\ud800", None, InvalidRequestError, r"text\[0\] .* is a lone surrogate"),
}
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown scheduler key": (
        {"scheduler": {"max_tokens": 5}},
        r"scheduler: .*`max_tokens`.*valid keys: max_batch_tokens, max_sequences, max_model_len",
    ),
    "unknown kv key": ({"kv": {"blocks": 5}}, r"kv: .*`blocks`.*valid keys: .*num_blocks"),
    "type of a key": ({"kv": {"num_blocks": "many"}}, r"kv: .*num_blocks"),
    "negative blocks": ({"kv": {"num_blocks": -3}}, r"num_blocks \(-3\)"),
    "zero budget": ({"scheduler": {"max_batch_tokens": 0}}, r"max_batch_tokens \(0\)"),
    "zero sequences": ({"scheduler": {"max_sequences": 0}}, r"max_sequences \(0\)"),
    "pool too small": (
        {"kv": {"num_blocks": 4}, "scheduler": {"max_model_len": 100}},
        r"num_blocks \(4, .*too small .*max_model_len \(100\).*raise num_blocks to 8 or lower max_model_len to 48",
    ),
    "device": ({"device": "tpu"}, r"device \('tpu'\) is not supported; use auto, cpu or cuda"),
    "dtype": ({"dtype": "int8"}, r"dtype \('int8'\) is not supported; use one of auto, float32"),
    "tensor that does not divide": ({"tensor": 3}, r"heads \(8\).*3"),
    "tensor zero": ({"tensor": 0}, r"tensor \(0\) must be an integer from 1"),
    "tensor as text": ({"tensor": "2"}, r"tensor \('2'\) must be an integer from 1"),
    "block size": ({"kv": {"block_size": 12}}, r"kv.block_size \(12\) must be one of 8, 16, 32"),
    "fraction": ({"kv": {"gpu_fraction": 1.5}}, r"kv.gpu_fraction \(1.5\) must be a number in \(0, 1\]"),
    "threads": ({"workers": {"threads": 0}}, r"workers.threads \(0\) must be an integer from 1"),
    "more stages than layers": ({"pipeline": 7}, r"pipeline \(7\) must be between 1 and .* \(6\)"),
    "layers per stage": ({"pipeline": 2, "stage_layers": [1, 2]}, r"layers per stage \[1, 2\].*add up to 6"),
    "kernel": ({"kernels": {"linear": "magic"}}, r"magic"),
    "op": ({"kernels": {"convolution": "reference"}}, r"convolution"),
}


@pytest.mark.parametrize("case", REQUESTS)
def test_request(llm, case):
    prompt, fields, error, message = REQUESTS[case]
    with pytest.raises(error, match=message) as caught:
        llm.generate(prompt, SamplingParams(**fields or {}))
    assert type(caught.value) is error


@pytest.mark.parametrize("case", CONFIGS)
def test_config(case):
    arguments, message = CONFIGS[case]
    with pytest.raises(ConfigError, match=message):
        LLM("tiny", **{**SHARING_CORES, **arguments})


def test_number_of_params(llm):
    with pytest.raises(InvalidRequestError, match="1 params for 2 prompts; give one, or one per prompt"):
        llm.generate([IDS, IDS], [SamplingParams()])


def test_one_bad_prompt_and_nothing_runs(llm):
    before = llm.engine.scheduler.step
    with pytest.raises(InvalidRequestError):
        llm.generate([IDS, [4096]])
    assert llm.engine.scheduler.step == before


def test_no_such_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        LLM(str(tmp_path / "nowhere"))


def test_a_model_without_tokenizer(tmp_path):
    folder = tiny.make_checkpoint("qwen3", tmp_path)
    with LLM(str(folder), **SHARING_CORES) as silent:
        result = silent.generate([[5, 6, 7]], SamplingParams(max_tokens=4, ignore_eos=True))[0]
        assert (len(result.token_ids), result.text) == (4, "")
        for prompt, params in (("text", None), (CHAT, None), ([[5]], SamplingParams(stop=("x",)))):
            with pytest.raises(InvalidRequestError, match=r"no tokenizer\.json"):
                silent.generate(prompt, params)


def test_a_row_of_nan_fails_its_request_alone(tmp_path):
    folder = tiny.make_checkpoint("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][5] = math.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    prompt, params = [6, 7, 8] * 20, msgspec.structs.replace(GREEDY, logit_bias={5: -100.0})
    with LLM(str(folder), **SHARING_CORES) as broken:
        good = broken.generate([prompt], params)[0].token_ids
        with pytest.raises(StepError, match="NaN or infinity"):
            broken.generate([[*prompt, 5], prompt], params)
        assert not broken._jobs
        assert [result.token_ids for result in broken.generate([prompt, prompt], params)] == [good, good]
        broken.engine.check()


def test_an_interrupt_leaves_the_engine_usable(llm, monkeypatch):
    steps = iter(range(5))
    step = llm.engine.step

    def interrupted(timeout_s: float, **options: Any) -> Any:
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return step(timeout_s, **options)

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate([IDS, IDS[3:]], GREEDY)


def test_exact_mode_needs_rows_that_stand_alone():
    with pytest.raises(ConfigError, match=r"moe\.exact: the bits of a row of grouped_mm experts depend"):
        LLM("tiny-moe", device="cpu", dtype="float32", moe={"exact": True}, kernels={"experts": "grouped_mm"})

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.errors import CheckpointError, InvalidRequestError
from phalanx.runtime import chat_template
from phalanx.runtime.chat_template import MAX_MESSAGES, MAX_TEMPLATE_BYTES, ChatTemplate
from phalanx.runtime.tokenizer import Tokenizer, encode_prompt
from tests.support.tokenizer_folders import CHATML, byte_fallback, byte_level, write

CONFIG: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": {"content": "<|im_start|>", "__type": "AddedToken"},
    "eos_token": "<|im_end|>",
    "clean_up_tokenization_spaces": False,
}
TALK = [
    {"role": "system", "content": "be <b>brief</b> & 'kind'"},
    {"role": "user", "content": " the stop? 你好 \N{ROCKET}\n"},
    {"role": "assistant", "content": "the\tcat"},
    {"role": "user", "content": "{{ messages }} <|im_end|>"},
]
TEMPLATES = {
    "chatml": CHATML,
    "json, special tokens, namespace": (
        "{{ bos_token }}{% set ns = namespace(count=0) %}{% for m in messages %}\n"
        "  {%- set ns.count = ns.count + 1 %}\n"
        "{{ ns.count }}:{{ m | tojson }}{{ m['content'] | trim | tojson(indent=2) }}{{ eos_token }}\n    {% endfor %}\n"
    ),
    "loop controls, generation, absent tools": (
        "{% if tools is not none %}tools{% endif %}{% for m in messages %}{% if m.role == 'system' %}{% continue %}"
        "{% endif %}{% generation %}[{{ m.content }}]{% endgeneration %}{% if loop.index > 2 %}{% break %}{% endif %}"
        "{% endfor %}{{ pad_token is defined }}"
    ),
    "date": "{{ strftime_now('%Y') }}{{ messages[0].content.split(' ') | join('-') | upper }}",
}


def tokenizer(folder: Path) -> Tokenizer:
    loaded = Tokenizer.from_folder(folder)
    assert loaded is not None
    return loaded


def transformers_tokenizer(folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder)


def test_a_folder_without_tokenizer(tmp_path: Path) -> None:
    assert Tokenizer.from_folder(tmp_path) is None
    for prompt in ("text", TALK):
        with pytest.raises(InvalidRequestError, match=r"no tokenizer\.json; send prompt_token_ids"):
            encode_prompt(None, prompt)
    assert encode_prompt(None, [1, 5, 9]) == [1, 5, 9]


@pytest.mark.parametrize("ends", [{}, {"add_bos_token": True}, {"add_bos_token": False, "add_eos_token": False}])
def test_encode_equals_transformers(tmp_path: Path, ends: dict[str, bool]) -> None:
    # The class that takes tokenizer.json as it is; Llama 2's own class builds its tokenizer anew.
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **ends}
    folder = write(tmp_path, byte_fallback(), config)
    ours, oracle = tokenizer(folder), transformers_tokenizer(folder)
    for text in ("the stop", "", " the  stop\n", "<s>the</s> x", "你好 \N{ROCKET} é", "[INST] a [/INST]"):
        for add in (True, False):
            assert ours.encode(text, add) == oracle.encode(text, add_special_tokens=add)
        ids = ours.encode(text)
        for skip in (True, False):
            assert ours.decode(ids, skip) == oracle.decode(ids, skip_special_tokens=skip)


def test_ends_that_tokenizer_json_leaves_to_the_config(tmp_path: Path) -> None:
    # As DeepSeek-V3 ships it; transformers 4 adds the token for its class, 5 forgets it.
    bos, eos = (byte_level().token_to_id(token) for token in ("<|im_start|>", "<|im_end|>"))
    plain = byte_level().encode("the").ids
    for key, expected in (("add_bos_token", [bos, *plain]), ("add_eos_token", [*plain, eos]), ("add_x", plain)):
        ours = tokenizer(write(tmp_path / key, byte_level(), CONFIG | {key: True}))
        assert ours.encode("the") == expected
        assert ours.encode("the", add_special_tokens=False) == plain


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_equals_transformers(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path, byte_level(), CONFIG, TEMPLATES[name])
    oracle = transformers_tokenizer(folder)
    expected = oracle.apply_chat_template(TALK, add_generation_prompt=True, return_dict=False)
    assert tokenizer(folder).encode_chat(TALK) == encode_prompt(tokenizer(folder), TALK) == expected


def test_special_tokens_and_sizes(tmp_path: Path) -> None:
    ours = tokenizer(write(tmp_path, byte_level(), CONFIG))
    assert ours.eos_token_ids == (byte_level().token_to_id("<|im_end|>"),)
    assert ours.vocab_size == byte_level().get_vocab_size()
    assert ours.decode([-1, ours.vocab_size, 2**40]) == ""


def test_template_files(tmp_path: Path) -> None:
    named = [{"name": "rag", "template": "rag"}, {"name": "default", "template": "config"}]
    for key, file, expected in (
        (named, None, "config"),
        ("config", None, "config"),
        ("config", "file", "file"),
        (None, "file", "file"),
    ):
        folder = write(tmp_path / str(expected) / str(file), byte_level(), CONFIG | {"chat_template": key}, file)
        ours = tokenizer(folder)
        assert ours.decode(ours.encode_chat(TALK)) == expected


def test_no_template(tmp_path: Path) -> None:
    ours = tokenizer(write(tmp_path, byte_level(), CONFIG))
    with pytest.raises(InvalidRequestError, match="no chat template; send a text"):
        ours.encode_chat(TALK)


def test_training_settings_do_not_cut_or_pad(tmp_path: Path) -> None:
    cut = byte_level()
    cut.enable_truncation(4)
    cut.enable_padding(length=32)
    text = "the stop the stop"
    assert tokenizer(write(tmp_path, cut, CONFIG)).encode(text) == byte_level().encode(text).ids


@settings(deadline=None, derandomize=True, max_examples=200)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="é")))  # é: an added token, see KINDS
def test_byte_level_round_trip(text: str) -> None:
    ours = Tokenizer(byte_level().to_str().encode(), CONFIG, None)
    assert ours.decode(ours.encode(text), skip_special_tokens=False) == text


def test_lone_surrogates_and_length(tmp_path: Path) -> None:
    ours = tokenizer(write(tmp_path, byte_level(), CONFIG, CHATML))
    for call in (lambda text: ours.encode(text), lambda text: ours.encode_chat([{"role": "user", "content": text}])):
        with pytest.raises(InvalidRequestError, match=r"text\[\d+\] \('\\ud800'\) is a lone surrogate; send valid"):
            call("ab\ud800")
        with pytest.raises(InvalidRequestError, match=r"\d+ characters; at most 16777216"):
            call("a" * (2**24 + 1))


@pytest.mark.parametrize("prompt", ["", None, 5, {"role": "user"}])
def test_prompts_that_are_none(tmp_path: Path, prompt: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"makes no tokens|must be a text"):
        encode_prompt(tokenizer(write(tmp_path, byte_level(), CONFIG)), prompt)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages has 0 entries; 1 to 1024 are allowed"),
        ([TALK[0]] * (MAX_MESSAGES + 1), "messages has 1025 entries"),
        ([{"role": "user"}], r"messages\[0\] must have exactly the keys"),
        ([TALK[1], TALK[1] | {"name": "x"}], r"messages\[1\] must have exactly the keys"),
        (["hello"], r"messages\[0\] must have exactly"),
        ([{"role": "root", "content": "x"}], r"messages\[0\].role \('root'\) must be one of system, developer, user"),
        ([{"role": 3, "content": "x"}], r"role \(3\) must be one of"),
        ([{"role": ["user"], "content": "x"}], "must be one of"),
        ([{"role": "user", "content": ["x"]}], r"messages\[0\].content must be a string, got list"),
        ([{"role": "user", "content": None}], "got NoneType"),
    ],
)
def test_messages_of_another_form(messages: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        ChatTemplate(CHATML, {}).render(messages)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses these messages: roles must alternate"),
        ("{{ messages[9].content }}", "refuses these messages: .*no element 9"),
        ("{{ messages[0].content + 1 }}", "refuses these messages: can only concatenate"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ nothing.at.all }}", "is undefined"),
        ("{% include 'x' %}", "refuses"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages[0].update(a=1) }}", "unsafe"),
        ("{{ raise_exception.__globals__['json'] }}", "unsafe"),
        ("{% for i in range(1000000000) %}a{% endfor %}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ lipsum(n=1000000) }}", "undefined"),
        ("{% for i in range(99999) %}{{ messages[0].content * 999 }}{% endfor %}", "makes over 16777216 characters"),
    ],
)
def test_hostile_and_broken_templates(source: str, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        ChatTemplate(source, {}).render(TALK)


def test_objects_of_python_show_nothing() -> None:
    for source in ("{{ ''.__class__ }}", "{{ '{0.__class__}'.format(messages) }}", "{{ strftime_now.__globals__ }}"):
        assert ChatTemplate(source, {}).render(TALK) == ""


def test_time_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_RENDER_S", 0.05)
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}"
    with pytest.raises(InvalidRequestError, match=r"runs for over 0\.05 s; send fewer messages"):
        ChatTemplate(loops, {}).render(TALK)


def test_the_conversation_is_not_changed_nor_parsed() -> None:
    talk = json.loads(json.dumps(TALK))
    text = ChatTemplate(CHATML, {}).render(talk)
    assert talk == TALK
    assert "{{ messages }} <|im_end|>" in text


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for %}", "chat template, line 1: .*; repair or remove it"),
        ("\n\n{% endif %}", "line 3"),
        ("{% for i in [] %}" * 30 + "{% endfor %}" * 30, "too many"),
        ("a" * (MAX_TEMPLATE_BYTES + 1), "262145 bytes; at most 262144"),
        ("é" * (MAX_TEMPLATE_BYTES // 2 + 1), "262146 bytes"),
    ],
)
def test_templates_that_do_not_load(source: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        ChatTemplate(source, {})


def test_empty_result(tmp_path: Path) -> None:
    ours = tokenizer(write(tmp_path, byte_level(), CONFIG, "{% if messages %}{% endif %}"))
    with pytest.raises(InvalidRequestError, match="makes no tokens of these messages"):
        ours.encode_chat(TALK)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", b"{", r"tokenizer\.json cannot be read: .*; fetch it again"),
        ("tokenizer.json", b"", "cannot be read"),
        ("tokenizer_config.json", b"{,}", r"tokenizer_config\.json is not JSON"),
        ("tokenizer_config.json", b"\xff\xfe", "is not JSON"),
        ("tokenizer_config.json", b"[" * 100_000, "is not JSON"),
        ("tokenizer_config.json", b"[]", "holds a list, not an object"),
        ("chat_template.jinja", b"\xff", "is not UTF-8"),
    ],
)
def test_damaged_files(tmp_path: Path, file: str, content: bytes, message: str) -> None:
    folder = write(tmp_path, byte_level(), CONFIG)
    (folder / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_folder(folder)


def test_fingerprint_follows_what_decides_ids(tmp_path: Path) -> None:
    folders = [
        write(tmp_path / "a", byte_level(), CONFIG, CHATML),
        write(tmp_path / "b", byte_fallback(), CONFIG, CHATML),
        write(tmp_path / "c", byte_level(), CONFIG | {"eos_token": "<tool>"}, CHATML),
        write(tmp_path / "d", byte_level(), CONFIG | {"add_bos_token": True}, CHATML),
        write(tmp_path / "e", byte_level(), CONFIG, CHATML + "!"),
        write(tmp_path / "f", byte_level(), CONFIG),
    ]
    prints = [tokenizer(folder).fingerprint for folder in folders]
    assert len(set(prints)) == len(folders)
    same = write(tmp_path / "same", byte_level(), CONFIG | {"model_max_length": 7}, CHATML)
    assert tokenizer(same).fingerprint == prints[0]


def test_a_chat_gets_no_ends_but_the_templates(tmp_path: Path) -> None:
    ours = tokenizer(write(tmp_path, byte_fallback(), {"bos_token": "<s>"}, "{{ bos_token }}the stop"))
    assert ours.encode_chat(TALK) == byte_fallback().encode("<s>the stop", add_special_tokens=False).ids
    assert ours.encode_chat(TALK).count(1) == 1

"""The strict YAML reader against PyYAML's BaseLoader (which guesses no types either). About 4 s."""

import time

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.deploy.yaml_source import (
    MAX_BYTES,
    MAX_DEPTH,
    Complaint,
    Mapping,
    Node,
    Scalar,
    Sequence,
    read_tree,
    refuse,
)
from phalanx.errors import ConfigError


def read(text: str) -> tuple[Node | None, list[Complaint]]:
    complaints: list[Complaint] = []
    return read_tree(text, complaints), complaints


def plain(node: Node | None) -> object:
    if isinstance(node, Mapping):
        return {key: plain(entry.value) for key, entry in node.entries.items()}
    if isinstance(node, Sequence):
        return [plain(item) for item in node.items]
    assert isinstance(node, Scalar)
    return node.text


def scalars(node: Node | None) -> list[Scalar]:
    if isinstance(node, Mapping):
        return [scalar for entry in node.entries.values() for scalar in scalars(entry.value)]
    if isinstance(node, Sequence):
        return [scalar for item in node.items for scalar in scalars(item)]
    return [node] if isinstance(node, Scalar) else []


REFUSED = [
    ("a: &x 1", "1:4", "anchor &x"),
    ("a: 1\nb: *a", "2:4", "alias .a"),
    ("a: !!int 3", "1:4", "tag !!int"),
    ("a: !mine 3", "1:4", "tag !mine"),
    ("a: !!python/object:os.system {}", "1:4", "tag"),
    ("<<: {b: 1}", "1:1", "merge key"),
    ("a: {<<: {b: 1}}", "1:5", "merge key"),
    ("a: 1\nb: 2\na: 3", "3:1", "already set at 1:1"),
    ("{a: 1, 'a': 2}", "1:8", "already set at 1:2"),
    ("1: x", "1:1", "not a string in YAML .int."),
    ("yes: x", "1:1", "not a string in YAML .bool."),
    ("~: x", "1:1", "not a string in YAML .null."),
    ("1.5: x", "1:1", ".float."),
    ("2024-01-01: x", "1:1", ".timestamp."),
    ("[a]: x", "1:1", "cannot be a key"),
    ("? {a: b}\n: x", "1:3", "cannot be a key"),
    ("*a : x", "1:1", "alias"),
    ("a: 1\n---\nb: 2", "2:1", "second document"),
    ("a: [1", "1:", "not YAML"),
    ("a: 'x", "1:6", "not YAML"),
    ("a:\n\t- b", "2:1", "not YAML"),
    ("a: \x07", "1:4", "U.0007"),
    ('a: "\\UFFFFFFFF"', "1:1", "too big a number"),
    ("%YAML " + "9" * 5000 + ".1\n--- a", "1:1", "too big a number"),
    ("[" * 2000, f"1:{MAX_DEPTH + 1}", "nested deeper than 16"),
    ("a: 1 #" + "x" * MAX_BYTES, "1:1", "at most 1048576"),
]


@pytest.mark.parametrize(("text", "where", "sentence"), REFUSED, ids=[row[0][:16] for row in REFUSED])
def test_refused_with_its_place(text: str, where: str, sentence: str) -> None:
    _, complaints = read(text)
    with pytest.raises(ConfigError, match=f"(?m)^f:{where}.*{sentence}"):
        refuse("f", complaints)


def test_all_complaints_at_once_in_file_order() -> None:
    _, complaints = read("a: &x 1\nb: *x\nc: !!str 2\na: 1")
    with pytest.raises(ConfigError) as caught:
        refuse("f.yaml", complaints)
    assert [line.split(": ")[0] for line in str(caught.value).splitlines()] == [
        "f.yaml:1:4",
        "f.yaml:2:4",
        "f.yaml:3:4",
        "f.yaml:4:1",
    ]


def test_scalars_stay_text() -> None:
    traps = ["no", "yes", "on", "017", "12:30:45", "1_000", ".nan", ".inf", "0x10", "1e3", "true", "~", "2024-01-01"]
    tree, complaints = read("\n".join(f"k{index}: {text}" for index, text in enumerate(traps)))
    assert complaints == []
    assert [scalar.text for scalar in scalars(tree)] == traps


def test_depth_limit_is_exact() -> None:
    assert read("[" * MAX_DEPTH + "]" * MAX_DEPTH)[1] == []
    assert len(read("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1))[1]) == 1


def test_hostile_files_are_answered_quickly() -> None:
    bomb = "a: &a [x, x]\n" + "\n".join(f"b{index}: [*a, *a]" for index in range(2000))
    for text in (bomb, "[" * 900_000, "{a: " * 200_000, "- " * 400_000, "? " * 400_000):
        started = time.monotonic()
        assert read(text)[1]
        assert time.monotonic() - started < 3


TREES = st.recursive(
    st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(TREES, st.sampled_from([None, True, False]))
def test_reads_what_was_dumped(tree: object, flow: bool | None) -> None:
    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: object) -> bool:
            return True

    text = yaml.dump(tree, Dumper=Dumper, default_flow_style=flow)
    node, complaints = read(text)
    assert complaints == []
    assert plain(node) == yaml.load(text, Loader=yaml.BaseLoader) == tree


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from([*"ab:-{}[]#&*!|>'\"%@,? \n\t0", "\\x", "<<", "---", ": ", "- "]), max_size=24))
def test_any_text_is_answered_and_places_point_into_it(parts: list[str]) -> None:
    text = "".join(parts)
    node, complaints = read(text)
    if complaints:
        return
    if node is not None:
        assert plain(node) == yaml.load(text, Loader=yaml.BaseLoader)
    lines = text.split("\n")
    for scalar in scalars(node):
        if scalar.plain and scalar.text:
            line, column = scalar.mark
            assert lines[line - 1][column - 1 :].startswith(scalar.text[0])

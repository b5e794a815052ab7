"""Typed fields: a configuration dataclass says beside each field how its text is read; `build` fills it from a tree.

A field is annotated `Annotated[int, integer(1, 64)]`; a field whose type is another such dataclass is a section.
Nothing is guessed from the text, and every error is recorded, so that a user sees all of them at once.
"""

import difflib
import math
import re
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, NamedTuple, Protocol, TypeVar, get_args, get_type_hints

from phalanx.deploy.yaml_source import Complaint, Mapping, Mark, Node, Refused, Scalar, Sequence

T = TypeVar("T")

BYTE_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
SECOND_UNITS = {"ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0}

_NULLS = ("~", "null", "Null", "NULL")
# What YAML 1.1 makes of a text that our types refuse: said in the message, since other tools accept it.
_TRAPS = (
    (r"(?i)yes|no|on|off|y|n|true|false", "a YAML 1.1 boolean; only `true` and `false` are booleans here"),
    (r"[-+]?0[0-7]+", "YAML 1.1 reads a leading zero as octal; write it in decimal without the zero"),
    (r"[-+]?0[xXbBoO][0-9a-fA-F_]+", "write it in decimal"),
    (r"[-+]?[0-9][0-9_]*_[0-9_.]*", "leave the underscores out"),
    (
        r"[-+]?[0-9]+(:[0-5]?[0-9])+(\.[0-9]*)?",
        "YAML 1.1 reads colons as base 60; write a number, with its unit",
    ),
    (r"(?i)[-+]?\.?(nan|inf)", "only finite numbers are accepted"),
)


class Report(Protocol):
    """Takes one error."""

    def __call__(self, mark: Mark, sentence: str) -> None:
        """Record `sentence` at `mark`."""


@dataclass(frozen=True, slots=True)
class Kind:
    """How a scalar is read: `parse` raises `ValueError` for a text that is not what `expects` says."""

    expects: str
    parse: Callable[[str], Any]

    def read(self, node: Node, report: Report) -> Any:
        """The value, or None after a report."""
        if isinstance(node, Refused):
            return None
        if not isinstance(node, Scalar):
            report(node.mark, f"a {type(node).__name__.lower()} stands where {self.expects} is expected")
        elif node.text == "" or (node.plain and node.text in _NULLS):
            report(node.mark, f"the value is {node.text or 'empty'}; write {self.expects}, or leave the key out")
        else:
            try:
                return self.parse(node.text)
            except ValueError:
                report(node.mark, f"{node.text[:80]!r} is not {self.expects}{_trap(node.text)}")
        return None


@dataclass(frozen=True, slots=True)
class ListOf:
    """A list of scalars of one kind, or the word `auto`; the value is a tuple."""

    kind: Kind

    def read(self, node: Node, report: Report) -> Any:
        """The value, or None after a report."""
        if isinstance(node, Sequence):
            return tuple(self.kind.read(item, report) for item in node.items)
        return Kind(f"a list such as [9, 9], each {self.kind.expects}, or auto", _choose(("auto",))).read(node, report)


@dataclass(frozen=True, slots=True)
class MapOf:
    """Free keys to scalars; the value is a dict."""

    key: Kind
    value: Kind

    def read(self, node: Node, report: Report) -> Any:
        """The value, or None after a report."""
        if not isinstance(node, Mapping):
            if not isinstance(node, Refused):
                report(node.mark, f"a mapping is expected: {self.key.expects} to {self.value.expects}")
            return None
        read = {}
        for key, entry in node.entries.items():
            self.key.read(Scalar(entry.mark, key, plain=False), report)
            read[key] = self.value.read(entry.value, report)
        return read


def integer(low: int, high: int) -> Kind:
    """Decimal digits only."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"-?(0|[1-9][0-9]{0,18})", text) or not low <= int(text) <= high:
            raise ValueError
        return int(text)

    return Kind(f"an integer from {low} to {high}", parse)


def power_of_two(low: int, high: int) -> Kind:
    """An integer that is a power of two."""
    words = tuple(str(2**exponent) for exponent in range(low.bit_length() - 1, high.bit_length()))
    return Kind(one_of(*words).expects, lambda text: int(_choose(words)(text)))


def number(low: float, high: float) -> Kind:
    """A finite decimal number above `low` and up to `high`; `1e3` is one."""

    def parse(text: str) -> float:
        if not re.fullmatch(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]{1,3})?", text):
            raise ValueError
        if re.fullmatch(r"[-+]?0[0-9].*", text) or not low < float(text) <= high:
            raise ValueError
        return float(text)

    return Kind(f"a number above {low:g} and up to {high:g}", parse)


def boolean() -> Kind:
    """`true` or `false`, in lower case."""
    return Kind("true or false", lambda text: _choose(("true", "false"))(text) == "true")


def one_of(*words: str) -> Kind:
    """One of the words as written."""
    return Kind(" or ".join(", ".join(words).rsplit(", ", 1)), _choose(words))


def string(pattern: str, expects: str) -> Kind:
    """A string that matches a regular expression as a whole; YAML's special words are plain text here."""

    def parse(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError
        return text

    return Kind(expects, parse)


def size() -> Kind:
    """Bytes with a binary unit: `64GiB`, `1.5MiB`, or 0."""
    return Kind("a size with a unit (B, KiB, MiB, GiB, TiB) such as 64MiB", lambda text: _whole(text, BYTE_UNITS))


def duration() -> Kind:
    """Seconds with a unit: `30s`, `250ms`, or 0."""
    return Kind("a duration with a unit (ms, s, min, h) such as 30s", lambda text: _quantity(text, SECOND_UNITS))


def address() -> Kind:
    """`host:port`; port 0 = any free one."""

    def parse(text: str) -> str:
        _, port = split_address(text)
        if port > 65535:
            raise ValueError
        return text

    return Kind("an address host:port with a port from 0 to 65535", parse)


def split_address(text: str) -> tuple[str, int]:
    """Host and port of `host:port` or `[v6]:port`.

    Raises:
        ValueError: it is neither.
    """
    match = re.fullmatch(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})", text)
    if match is None:
        raise ValueError(f"{text!r} is not host:port")
    return match[1], int(match[2])


def either(kind: Kind, *words: str) -> Kind:
    """What `kind` reads, or one of the words as itself; `either(integer(1, 8), "auto")`."""
    return Kind(f"{kind.expects}, or {' or '.join(words)}", lambda text: text if text in words else kind.parse(text))


class Built(NamedTuple):
    """What `build` returns.

    Attributes:
        value: the dataclass; None in it marks a required field that is missing or wrong (then there are complaints).
        marks: dotted name of each key that the file sets -> the place of its value.
        failed: dotted names that have a complaint.
    """

    value: Any
    marks: dict[str, Mark]
    failed: set[str]


def build(cls: type[T], tree: Node | None, complaints: list[Complaint]) -> Built:
    """Fill `cls` and its sections from a tree; a wrong field keeps its default and adds to `complaints`."""
    built = Built(None, {}, set())
    value = _section(cls, Mapping(Mark(1, 1)) if tree is None else tree, "", built, complaints)
    return built._replace(value=value)


def keys(cls: type) -> list[str]:
    """Dotted names of every key that a user can write, in order."""
    found = []
    for item, hint in _hints(cls):
        found += [f"{item.name}.{key}" for key in keys(hint)] if isinstance(hint, type) else [item.name]
    return found


def _section(cls: type[T], node: Node, path: str, built: Built, complaints: list[Complaint]) -> T:
    """One dataclass; `path` is its dotted name with a dot at the end, empty for the whole file."""
    hints = _hints(cls)
    valid = ", ".join(item.name for item, _ in hints)
    entries = node.entries if isinstance(node, Mapping) else {}
    if isinstance(node, Scalar | Sequence):
        where = f"{path[:-1]}: " if path else ""
        complaints.append(Complaint(node.mark, f"{where}keys are expected below; valid keys: {valid}"))
    for key in entries.keys() - {item.name for item, _ in hints}:
        near = difflib.get_close_matches(key, valid.split(", "), 1, cutoff=0.0)[0]
        sentence = f"unknown key {(path + key)[:80]!r}; the nearest is {path + near!r}; valid keys: {valid}"
        complaints.append(Complaint(entries[key].mark, sentence))
    values: dict[str, Any] = {}
    for item, hint in hints:
        name = f"{path}{item.name}"
        child = entries[item.name].value if item.name in entries else None
        if isinstance(hint, type):
            values[item.name] = _section(hint, child or Mapping(node.mark), f"{name}.", built, complaints)
        elif child is not None:
            built.marks[name] = child.mark
            values[item.name] = _field(name, item, hint, child, built, complaints)
        else:
            values[item.name] = _default(item)
            if _is_required(item):
                built.failed.add(name)
                complaints.append(Complaint(node.mark, f"{name} is missing: it has no default"))
    return cls(**values)


def _field(name: str, item: Field[Any], hint: Any, node: Node, built: Built, complaints: list[Complaint]) -> Any:
    """The value of one key, or its default after a complaint."""
    before = len(complaints)
    reader = next(extra for extra in get_args(hint) if isinstance(extra, Kind | ListOf | MapOf))
    value = reader.read(node, lambda mark, sentence: complaints.append(Complaint(mark, f"{name}: {sentence}")))
    if len(complaints) == before and not isinstance(node, Refused):
        return value
    built.failed.add(name)
    return _default(item)


def _is_required(item: Field[Any]) -> bool:
    return item.default is MISSING and item.default_factory is MISSING


def _default(item: Field[Any]) -> Any:
    """None stands for the value of a required field, which then has a complaint."""
    if _is_required(item):
        return None
    return item.default if item.default_factory is MISSING else item.default_factory()


def _hints(cls: type) -> list[tuple[Field[Any], Any]]:
    hints = get_type_hints(cls, include_extras=True)
    return [(item, hints[item.name]) for item in fields(cls)]


def _trap(value: str) -> str:
    return next((f" ({sentence})" for pattern, sentence in _TRAPS if re.fullmatch(pattern, value)), "")


def _choose(words: tuple[str, ...]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in words:
            raise ValueError
        return text

    return parse


def _quantity(text: str, units: dict[str, float]) -> float:
    """A non-negative number with one of `units`; a bare 0 needs none."""
    match = re.fullmatch(r"((?:0|[1-9][0-9]{0,15})(?:\.[0-9]{1,6})?)([A-Za-z]+)", text)
    if text == "0":
        return 0.0
    if match is None or match[2] not in units:
        raise ValueError
    return float(match[1]) * units[match[2]]


def _whole(text: str, units: dict[str, int]) -> int:
    value = _quantity(text, dict(units))
    if not math.isfinite(value) or value != int(value):
        raise ValueError
    return int(value)

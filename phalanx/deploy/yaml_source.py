"""Strict YAML: text to a tree of positions and plain text, before any type is known.

PyYAML's loaders guess types (`no` is False, `017` is 15, `12:30:45` is 45045), keep the last of two equal keys and
follow aliases. Here only its event stream is used: scalars stay text until the field they belong to parses them
(`phalanx/deploy/fields.py`), and whatever has a hidden meaning is refused with its line and column.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import yaml

from phalanx.errors import ConfigError

MAX_BYTES = 2**20
MAX_DEPTH = 16
MAX_COMPLAINTS = 100

_resolver = yaml.resolver.Resolver()


class Mark(NamedTuple):
    """A place in the file, both counted from 1."""

    line: int
    column: int


class Complaint(NamedTuple):
    """One error and where it stands."""

    mark: Mark
    sentence: str


@dataclass(frozen=True, slots=True)
class Scalar:
    """Text as written; `plain` = without quotes or block style."""

    mark: Mark
    text: str
    plain: bool


@dataclass(frozen=True, slots=True)
class Sequence:
    """A list."""

    mark: Mark
    items: list["Node"] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Entry:
    """A key's place and its value."""

    mark: Mark
    value: "Node"


@dataclass(frozen=True, slots=True)
class Mapping:
    """Keys and values in file order; keys are unique."""

    mark: Mark
    entries: dict[str, Entry] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Refused:
    """A value whose complaint is already recorded; readers pass over it in silence."""

    mark: Mark


Node = Scalar | Sequence | Mapping | Refused


def read_tree(text: str, complaints: list[Complaint]) -> Node | None:
    """The tree of one YAML document, or None for an empty file. One iterative pass, so depth cannot exhaust the stack.

    Everything wrong is appended to `complaints`; a syntax error, a second document, a depth over `MAX_DEPTH` or more
    than `MAX_COMPLAINTS` complaints end the pass.
    """
    size = len(text.encode(errors="replace"))
    if size > MAX_BYTES:
        complaints.append(Complaint(Mark(1, 1), f"the file has {size} bytes; at most {MAX_BYTES} are read"))
        return None
    builder = _Builder(complaints)
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if not builder.feed(event) or len(complaints) > MAX_COMPLAINTS:
                break
    except yaml.MarkedYAMLError as error:
        what = " ".join(part for part in (error.problem, error.context) if part)
        complaints.append(Complaint(_mark(error.problem_mark or error.context_mark), f"not YAML: {what}"))
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        mark = Mark(before.count("\n") + 1, error.position - before.rfind("\n"))
        complaints.append(Complaint(mark, f"not YAML: the character U+{error.character:04X} is not allowed"))
    except (ValueError, OverflowError):  # PyYAML converts the digits of escapes and of %YAML without a check
        complaints.append(
            Complaint(builder.last_mark, "not YAML: an escape or directive after this holds too big a number")
        )
    return builder.root


def refuse(name: str, complaints: list[Complaint]) -> None:
    """Raise one `ConfigError` that lists every complaint as `file:line:column: sentence`; nothing if there is none."""
    if not complaints:
        return
    lines = [f"{name}:{mark.line}:{mark.column}: {sentence}" for mark, sentence in sorted(complaints)]
    raise ConfigError("\n".join(lines))


class _Open:
    """A collection whose end has not come yet; in a mapping, `key` is the one waiting for its value."""

    __slots__ = ("at_key", "key", "node")

    def __init__(self, node: Sequence | Mapping) -> None:
        self.node = node
        self.at_key = True
        self.key: tuple[str, Mark] | None = None  # None while a value is expected: that value is dropped


class _Builder:
    """Turns events into nodes."""

    def __init__(self, complaints: list[Complaint]) -> None:
        self.root: Node | None = None
        self.last_mark = Mark(1, 1)
        self._complaints = complaints
        self._open: list[_Open] = []
        self._num_documents = 0

    def feed(self, event: yaml.Event) -> bool:
        """Take one event; False = stop reading."""
        mark = self.last_mark = _mark(event.start_mark)
        if isinstance(event, yaml.DocumentStartEvent):
            self._num_documents += 1
            if self._num_documents > 1:
                return self._refuse(mark, "a second document starts here; a file holds one")
        elif isinstance(event, yaml.AliasEvent):
            self._refuse(mark, f"the alias *{event.anchor} is refused; write the value out")
            self._add(Refused(mark))
        elif isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent):
            return self._node(event, mark)
        elif isinstance(event, yaml.CollectionEndEvent):
            self._add(self._open.pop().node)
        return True

    def _node(self, event: yaml.ScalarEvent | yaml.CollectionStartEvent, mark: Mark) -> bool:
        if event.anchor is not None:
            self._refuse(mark, f"the anchor &{event.anchor} is refused; write the value out where it is needed")
        if event.tag is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            self._refuse(mark, f"the tag {tag} is refused; the key already says the type")
        if isinstance(event, yaml.ScalarEvent):
            self._add(Scalar(mark, event.value, plain=event.style is None))
            return True
        if len(self._open) == MAX_DEPTH:
            return self._refuse(mark, f"nested deeper than {MAX_DEPTH} levels")
        self._open.append(_Open(Mapping(mark) if isinstance(event, yaml.MappingStartEvent) else Sequence(mark)))
        return True

    def _add(self, node: Node) -> None:
        """Put a finished node where it belongs: the root, a list, or a mapping's key or value."""
        if not self._open:
            self.root = node
            return
        top = self._open[-1]
        if isinstance(top.node, Sequence):
            top.node.items.append(node)
            return
        if top.at_key:
            top.key = self._key(node, top.node)
        elif top.key is not None:
            name, mark = top.key
            top.node.entries[name] = Entry(mark, node)
        top.at_key = not top.at_key

    def _key(self, node: Node, mapping: Mapping) -> tuple[str, Mark] | None:
        """The key's text, or None if it is refused."""
        if isinstance(node, Refused):
            return None
        if not isinstance(node, Scalar):
            self._refuse(node.mark, "a list or mapping cannot be a key")
            return None
        name = node.text
        guessed = _resolver.resolve(yaml.ScalarNode, name, (True, False)) if node.plain else ""
        if guessed.endswith(":merge"):
            self._refuse(node.mark, "the merge key << is refused; write the keys out")
        elif node.plain and not guessed.endswith(":str"):
            self._refuse(node.mark, f"the key {name!r} is not a string in YAML ({guessed.rpartition(':')[2]})")
        elif name in mapping.entries:
            line, column = mapping.entries[name].mark
            self._refuse(node.mark, f"the key {name!r} is already set at {line}:{column}; keep one of them")
        else:
            return name, node.mark
        return None

    def _refuse(self, mark: Mark, sentence: str) -> bool:
        self._complaints.append(Complaint(mark, sentence))
        return False


def _mark(mark: Any) -> Mark:  # yaml.Mark, of the Python or the C parser, or None
    return Mark(1, 1) if mark is None else Mark(mark.line + 1, mark.column + 1)

"""The rules of the code base as functions: a parsed file in, one sentence per violation out.

`tests/test_architecture.py` applies them to every file, and to planted violations that each must be refused.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

LAYERS = ("kernels", "parallel", "moe", "models", "runtime", "deploy")
"""A room may import only what stands to its left."""

OWNERS = {
    "triton": ("kernels",),
    "torch.utils.cpp_extension": ("kernels",),
    "torch.distributed": ("parallel",),
    "safetensors": ("models",),
    "msgpack": ("runtime", "deploy"),
    "msgspec": ("runtime", "deploy"),
    "ray": ("deploy",),
    "grpc": ("deploy",),
    "grpc_health": ("deploy",),
    "grpc_status": ("deploy",),
    "google": ("deploy",),
    "prometheus_client": ("deploy",),
    "yaml": ("deploy",),
    "importlib": ("plugins.py",),
    "transformers": (),
    "pickle": (),
    "torch.load": (),
    "torch.save": (),
}
"""Library -> the rooms (or root files) that may use it."""

UNPICKLES = ("broadcast_object_list", "scatter_object_list", "send_object_list", "recv_object_list")
UNPICKLES += ("all_gather_object", "gather_object")

SANS_IO = re.compile(r"runtime/(scheduler|kv|controller|policies)")
SHELLS = {
    "runtime/kv/tiers/": "moves bytes between tiers; which block lives where is decided outside it",
}
IO_MODULES = ("time", "random", "os", "socket", "threading", "asyncio", "subprocess", "multiprocessing", "torch")
IO_MODULES += ("tokenizers", "jinja2", "prometheus_client")

BROAD_EXCEPT = {
    "runtime/rank.py": "outermost frame of a rank process: prints whatever ended the step loop and exits 1",
    "deploy/server/boundary.py": "gRPC boundary: an error of ours becomes INTERNAL with an incident id, never its repr",
}
"""Files with a handler that swallows any exception, and why. One that cleans up and raises again is no such handler."""

MAX_FILE_LINES = 500
MAX_MEDIAN_FILE_LINES = 150
MAX_FUNCTION_LINES = 80
MAX_P90_FUNCTION_LINES = 40

EMPTY_CALLS = ("dict", "list", "set", "defaultdict", "OrderedDict", "deque", "Counter", "WeakValueDictionary")


@dataclass(frozen=True, slots=True)
class Source:
    """A file of the package; `path` is relative to `phalanx/`."""

    path: PurePosixPath
    text: str
    tree: ast.Module

    @property
    def room(self) -> str:
        """Its layer, or the file's own name for one at the root."""
        return self.path.parts[0]


def parse(path: str, text: str) -> Source:
    return Source(PurePosixPath(path), text, ast.parse(text))


def imports(source: Source) -> Iterator[str]:
    """Rule 1: layer order, absolute imports only, root modules import no layer."""
    lazy = {id(node) for node in _lazy_nodes(source.tree)} if source.path.name == "__init__.py" else set()
    allowed = LAYERS[: LAYERS.index(source.room) + 1] if source.room in LAYERS else ()
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield f"line {node.lineno}: relative import; write it out from phalanx"
    for name, node in _used_names(source.tree):
        root, _, rest = name.partition(".")
        below = rest.partition(".")[0]
        if root != "phalanx" or below not in LAYERS or below in allowed:
            continue
        if source.path.parts == ("__init__.py",) and id(node) in lazy:
            continue  # the package's public names, imported on first use
        yield f"line {node.lineno}: {source.room} may not use {name}"


def owners(source: Source) -> Iterator[str]:
    """Rule 2: heavy libraries stay in their rooms; nothing unpickles or evaluates what a peer sent."""
    for name, node in _used_names(source.tree):
        for library, rooms in OWNERS.items():
            if f"{name}.".startswith(f"{library}.") and source.room not in rooms:
                yield f"line {node.lineno}: {library} may be used only in {', '.join(rooms) or 'no file'}"
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        if isinstance(called, ast.Name) and called.id in ("eval", "exec", "__import__"):
            yield f"line {node.lineno}: {called.id}() is never used"
        if isinstance(called, ast.Attribute) and called.attr in UNPICKLES:
            yield f"line {node.lineno}: {called.attr} pickles; send tensors or msgpack bytes"
        bare = isinstance(called, ast.Attribute) and called.attr == "recv" and not node.args and not node.keywords
        if bare and source.room in ("runtime", "deploy"):
            yield f"line {node.lineno}: recv() of a Connection unpickles; use recv_bytes(maxlength)"


def is_sans_io(path: PurePosixPath) -> bool:
    return bool(SANS_IO.match(str(path))) and not str(path).startswith(tuple(SHELLS))


def sans_io(source: Source) -> Iterator[str]:
    """Rule 3: clock, RNG, disk and devices come into these files as arguments."""
    if is_sans_io(source.path):
        for name, node in _used_names(source.tree):
            if name.partition(".")[0] in IO_MODULES:
                yield f"line {node.lineno}: a sans-IO file may not use {name}; take it as an argument"


def sizes(source: Source) -> Iterator[str]:
    """Rule 4, for one file; the medians are over all of them."""
    lines = source.text.count("\n")
    if lines > MAX_FILE_LINES:
        yield f"{lines} lines; at most {MAX_FILE_LINES}"
    for name, length in function_lengths(source.tree):
        if length > MAX_FUNCTION_LINES:
            yield f"{name} has {length} lines without its docstring; at most {MAX_FUNCTION_LINES}"


def function_lengths(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Lines of each function, from `def` to its end, docstring and decorators not counted; Triton kernels left out."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if any(ast.unparse(decorator).startswith("triton.") for decorator in node.decorator_list):
            continue
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        if ast.get_docstring(node) is not None:
            doc = node.body[0]
            length -= (doc.end_lineno or doc.lineno) - doc.lineno + 1
        yield node.name, length


def manners(source: Source) -> Iterator[str]:
    """Rule 5: names, hidden state, swallowed errors, forgotten work."""
    pieces = {piece for part in source.path.with_suffix("").parts for piece in part.split("_")}
    if pieces & {"utils", "util", "common", "helpers"}:
        yield "a file is named after what it holds, not utils or common"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ClassDef) and re.fullmatch(r".+(Manager|Impl|Info)", node.name):
            yield f"line {node.lineno}: class {node.name}: name what it is"
        if isinstance(node, ast.Global):
            yield f"line {node.lineno}: global {', '.join(node.names)}; pass it as an argument"
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "object.__setattr__":
            yield f"line {node.lineno}: object.__setattr__ on a frozen object; make a new one with replace()"
    for node in source.tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None and _is_empty(node.value):
            yield f"line {node.lineno}: an empty container at module level, which somebody will fill"
    for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
        if token.type == tokenize.COMMENT and re.search(r"\b(TODO|FIXME|XXX)\b(?!\(#\d+\))", token.string):
            yield f"line {token.start[0]}: write TODO(#issue), or do it"


def broad_excepts(source: Source) -> Iterator[str]:
    """Rule 5: any exception is swallowed only in the files of `BROAD_EXCEPT`."""
    if str(source.path) not in BROAD_EXCEPT:
        for line in swallows(source.tree):
            yield f"line {line}: a broad except; name the exceptions, or raise again as the last statement"


def swallows(tree: ast.Module) -> Iterator[int]:
    """Lines of handlers that catch everything and may not raise it again."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            leaves = any(isinstance(inner, ast.Return | ast.Break | ast.Continue) for inner in ast.walk(node))
            last = node.body[-1]
            raises = isinstance(last, ast.Raise) and last.exc is None and not leaves
            if _is_broad(node.type) and not raises:
                yield node.lineno
        elif isinstance(node, ast.Call):
            is_suppress = ast.unparse(node.func).endswith("suppress")
            if is_suppress and any(_is_broad(argument) for argument in node.args):
                yield node.lineno


RULES = (imports, owners, sans_io, sizes, manners, broad_excepts)


def _used_names(tree: ast.AST) -> Iterator[tuple[str, ast.stmt | ast.expr]]:
    """Full dotted names that a file imports or spells out, aliases followed, inside functions and TYPE_CHECKING too."""
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                aliases[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
                yield alias.name, node
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                aliases[alias.asname or alias.name] = name
                yield name, node
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            root, _, rest = ast.unparse(node).partition(".")
            if root in aliases:
                yield f"{aliases[root]}.{rest}", node


def _lazy_nodes(tree: ast.Module) -> Iterator[ast.AST]:
    """Everything inside functions and `if TYPE_CHECKING`."""
    for node in tree.body:
        is_typing = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if is_typing or isinstance(node, ast.FunctionDef):
            yield from ast.walk(node)


def _is_empty(value: ast.expr) -> bool:
    if isinstance(value, ast.Dict):
        return not value.keys
    if isinstance(value, ast.List):
        return not value.elts
    if not isinstance(value, ast.Call):
        return False
    name = ast.unparse(value.func).rpartition(".")[2]
    return name in EMPTY_CALLS and (not value.args or name == "defaultdict")


def _is_broad(caught: ast.expr | None) -> bool:
    if isinstance(caught, ast.Tuple):
        return any(_is_broad(item) for item in caught.elts)
    return caught is None or ast.unparse(caught) in ("Exception", "BaseException")

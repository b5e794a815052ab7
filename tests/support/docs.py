"""Paths and functions that a Markdown page names in backticks, and whether they exist."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

TOP_FOLDERS = ("phalanx", "tests", "scripts", "docs", "examples", "benchmarks", "requirements")
ROOT_FILES = ("ARCHITECTURE.md", "README.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "pyproject.toml")


def missing_references(root: Path, page: str) -> Iterator[str]:
    """One sentence per reference of the page's text that does not exist under `root`.

    A reference is a word of a code span (not of a fenced block) that starts with a top folder, is a root file, or
    has the form `folder/file.py` with an optional `:function` or `:Class.method`. `{a,b}` and `*` are expanded.
    """
    prose = re.sub(r"^(```|~~~).*?^\1", "", page, flags=re.MULTILINE | re.DOTALL)
    for span in re.findall(r"`([^`\n]+)`", prose):
        for word in span.split():
            word = re.sub(r"\(\)$", "", word.rstrip(",.;:")).removeprefix("./")
            if not _is_reference(word):
                continue
            path, _, symbol = word.partition(":")
            for name in _expand(path):
                problem = _missing(root, name, symbol)
                if problem:
                    yield f"`{word}`: {problem}"


def has_symbol(text: str, symbol: str) -> bool:
    """True if a module defines `function`, `Class`, `Class.method` or `CONSTANT`."""
    body: list[ast.stmt] = ast.parse(text).body
    for name in symbol.split("."):
        found = [node for node in body if name in _defined(node)]
        if not found:
            return False
        body = found[-1].body if isinstance(found[-1], ast.ClassDef) else []
    return True


def _is_reference(word: str) -> bool:
    if "<" in word or "..." in word or "://" in word:
        return False
    path = word.partition(":")[0]
    if path in ROOT_FILES or (path.partition("/")[0] in TOP_FOLDERS and "/" in path):
        return True
    return bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)+\.py", path) or re.fullmatch(r"[\w./-]+\.py:[\w.]+", word))


def _expand(path: str) -> list[str]:
    match = re.search(r"\{([^{}]*)\}", path)
    if match is None:
        return [path]
    parts = [path[: match.start()] + choice.strip() + path[match.end() :] for choice in match[1].split(",")]
    return [name for part in parts for name in _expand(part)]


def _missing(root: Path, path: str, symbol: str) -> str:
    files = sorted(root.glob(path.rstrip("/"))) if "*" in path else [root / path]
    files = [file for file in files if file.exists()]
    if not files:
        return "there is no such file"
    if symbol and not any(has_symbol(file.read_text(), symbol) for file in files if file.suffix == ".py"):
        return f"{path} defines no {symbol}"
    return ""


def _defined(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}

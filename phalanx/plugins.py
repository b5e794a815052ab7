"""One file adds a thing: load a module of a folder by its name."""

import importlib
import pkgutil
from collections.abc import Iterator
from types import ModuleType

from phalanx.errors import ConfigError


def load(folder: str, name: str, required: tuple[str, ...] = ()) -> ModuleType:
    """Import `phalanx.<folder>.<name>`; a dotted name is loaded from outside the tree.

    A module counts only if it has every attribute in `required`, so shared files of the folder are never taken
    for an entry.

    Raises:
        ConfigError: the name is unknown; the message lists the valid ones.
    """
    path = name if "." in name else f"{_package(folder)}.{name}"
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name != path:
            raise
        module = None
    if module is None or not all(hasattr(module, attribute) for attribute in required):
        raise ConfigError(f"{folder}: {name!r} is unknown; known: {', '.join(names(folder, required))}")
    return module


def names(folder: str, required: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The entries of a folder, sorted: its modules that have every attribute in `required`."""
    return tuple(name for name, _ in entries(folder, required))


def entries(folder: str, required: tuple[str, ...] = ()) -> Iterator[tuple[str, ModuleType]]:
    """`(name, module)` of every entry of a folder, sorted by name."""
    package = importlib.import_module(_package(folder))
    for found in sorted(pkgutil.iter_modules(package.__path__), key=lambda found: found.name):
        if found.ispkg or found.name.startswith("_"):
            continue
        module = importlib.import_module(f"{package.__name__}.{found.name}")
        if all(hasattr(module, attribute) for attribute in required):
            yield found.name, module


def _package(folder: str) -> str:
    return f"phalanx.{folder.replace('/', '.')}"

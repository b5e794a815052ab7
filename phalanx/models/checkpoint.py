"""A safetensors checkpoint on disk: one file, or shards with an index. Pickled weights are refused."""

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from phalanx.errors import CheckpointError
from phalanx.models.hf_config import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = ("F32", "F16", "BF16")


class StoredTensor:
    """One tensor of an open checkpoint; nothing is read before `read`."""

    def __init__(self, key: str, path: Path, view: Any) -> None:
        self.key = key
        self.path = path
        self.shape: tuple[int, ...] = tuple(view.get_shape())
        self.dtype: str = view.get_dtype()
        self._view = view

    def read(self, index: tuple[slice, ...]) -> Tensor:
        """The part `index` of the tensor, on the CPU, in the dtype of the file; only those bytes are read.

        Raises:
            CheckpointError: the values are not plain floats, or the file is damaged.
        """
        return self.raw(index, *FLOATS)

    def raw(self, index: tuple[slice, ...], *dtypes: str) -> Tensor:
        """As `read`, of a tensor in one of these dtypes, named as safetensors does."""
        if self.dtype not in dtypes:
            raise CheckpointError(
                f"{self.path}: tensor {self.key!r} is {self.dtype}; only {', '.join(dtypes)} can be read"
            )
        try:
            part: Tensor = self._view[index]
        except SafetensorError as error:
            raise CheckpointError(f"{self.path}: tensor {self.key!r} cannot be read: {error}") from error
        return part


class Checkpoint:
    """The tensors of a folder by name; a context manager that keeps the files open (mapped, not read).

    Args:
        folder: with `model.safetensors`, or `model.safetensors.index.json` and the shards it names.

    Raises:
        CheckpointError: a file is missing or damaged, or an index leads out of the folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, Any] = {}
        index = folder / INDEX
        self._file_of_key = _read_index(index) if index.is_file() else dict.fromkeys(self._single_keys(), SINGLE)

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.clear()

    def tensors(self) -> Iterator[StoredTensor]:
        """Every tensor, file by file.

        Raises:
            CheckpointError: a shard is missing or damaged, or lacks a tensor that the index names in it.
        """
        for key, _ in sorted(self._file_of_key.items(), key=lambda item: (item[1], item[0])):
            yield self.tensor(key)

    def __contains__(self, key: str) -> bool:
        return key in self._file_of_key

    def tensor(self, key: str) -> StoredTensor:
        """One of its tensors; raises as `tensors`."""
        name = self._file_of_key[key]
        file = self._open(name)
        try:
            view = file.get_slice(key)
        except SafetensorError as error:
            raise CheckpointError(f"{self._folder / name} lacks tensor {key!r}, which {INDEX} says it holds") from error
        return StoredTensor(key, self._folder / name, view)

    def _single_keys(self) -> list[str]:
        if not (self._folder / SINGLE).is_file():
            pickled = sorted(file.name for kind in ("*.bin", "*.pt", "*.pth") for file in self._folder.glob(kind))
            found = f"; {pickled[0]} is pickled and is never opened, convert it to safetensors" if pickled else ""
            raise CheckpointError(f"{self._folder} holds neither {SINGLE} nor {INDEX}{found}")
        return list(self._open(SINGLE).keys())

    def _open(self, name: str) -> Any:
        if name not in self._files:
            path = self._folder / name
            try:
                self._files[name] = safe_open(path, framework="pt")
            except FileNotFoundError as error:
                raise CheckpointError(f"shard {path}, named in {INDEX}, is missing; download it again") from error
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} is damaged or cut short ({error}); download it again") from error
        return self._files[name]


def _read_index(path: Path) -> dict[str, str]:
    """`tensor name -> file name`, both checked: a shard lies in the folder itself."""
    names = read_json(path).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{path}: weight_map must map tensor names to files")
    for key, name in names.items():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: {key!r} lies in {name!r}; only a *.safetensors file of the same folder is read"
            )
    return names

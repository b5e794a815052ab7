"""One folder of tiny checkpoints and one copy of transformers' logits for all model tests of a run."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from phalanx.models.loading import read_config
from tests.support import tiny

LENGTH = 24


class Oracle(NamedTuple):
    """A checkpoint, two sequences, and transformers' logits (sequence, position, vocab) on it."""

    path: Path
    sequences: list[list[int]]
    logits: Tensor


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="session")
def oracle_of(checkpoints: Path) -> Callable[..., Oracle]:
    made: dict[str, Oracle] = {}

    def make(family: str, **overrides: object) -> Oracle:
        key = repr((family, sorted(overrides.items())))
        if key not in made:
            path = tiny.make_checkpoint(family, checkpoints, **overrides)
            generator = torch.Generator().manual_seed(1)
            ids = torch.randint(0, read_config(path).vocab_size, (2, LENGTH), generator=generator).tolist()
            model = tiny.load_hf(path)
            made[key] = Oracle(path, ids, torch.stack([tiny.hf_logits(model, row) for row in ids]))
        return made[key]

    return make

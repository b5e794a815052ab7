"""Tensors on huge pages: like any other tensor, only aligned."""

import pytest
import torch

from phalanx.kernels import memory

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [(0,), (3, 5), (3, 1000, 1001)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_ordinary_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = memory.empty(shape, dtype, CPU)
    assert tensor.shape == shape
    assert tensor.dtype == dtype
    assert tensor.is_contiguous()
    tensor.fill_(3)
    assert torch.equal(tensor, torch.full(shape, 3, dtype=dtype))
    if tensor.nbytes >= memory.HUGE_PAGE and memory._madvise() is not None:
        assert tensor.data_ptr() % memory.HUGE_PAGE == 0


def test_where_there_is_no_such_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_madvise", lambda: None)
    assert memory.empty((2000, 1000), torch.float32, CPU).shape == (2000, 1000)

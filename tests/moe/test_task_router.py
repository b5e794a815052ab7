"""Task-level routing: the table is what tokens get, and what a worker loads is what its tasks use. Milliseconds."""

import pytest
import torch

from phalanx.errors import ConfigError, InvalidRequestError
from phalanx.moe.routers.task import TaskRouter

TASKS, LAYERS, TOP_K, EXPERTS = 5, 3, 2, 8


def table(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((TASKS, LAYERS, EXPERTS), generator=generator).argsort(dim=-1)[..., :TOP_K]


def test_tokens_get_their_tasks_row() -> None:
    ids_NLK, weights_NLK = table(), torch.rand((TASKS, LAYERS, TOP_K))
    tasks = [3, 0, -1, 4, 3]
    for weights in (None, weights_NLK):
        router = TaskRouter(ids_NLK, EXPERTS, weights)
        for layer in range(LAYERS):
            routing = router.route(torch.tensor(tasks), layer)
            assert routing.topk_ids_TK.dtype == torch.int32
            assert routing.topk_weights_TK.dtype == torch.float32
            for task, ids, got in zip(tasks, *(column.tolist() for column in routing), strict=True):
                assert ids == ([-1] * TOP_K if task < 0 else ids_NLK[task, layer].tolist())
                given = [0.5] * TOP_K if weights is None else weights[task, layer].tolist()
                assert got == ([0.0] * TOP_K if task < 0 else given)


def test_no_tokens() -> None:
    routing = TaskRouter(table(), EXPERTS).route(torch.zeros(0, dtype=torch.int64), 0)
    assert routing.topk_ids_TK.shape == routing.topk_weights_TK.shape == (0, TOP_K)


@pytest.mark.parametrize("tasks", [[], [2], [4, 1, 4], range(TASKS)])
def test_load_names_exactly_what_the_tasks_use(tasks: list[int]) -> None:
    router = TaskRouter(table(), EXPERTS)
    experts = router.load(tasks)
    task_T = torch.tensor(list(tasks), dtype=torch.int64)
    assert len(experts) == LAYERS
    for layer in range(LAYERS):
        used = router.route(task_T, layer).topk_ids_TK.unique().tolist()
        assert list(experts[layer]) == used


@pytest.mark.parametrize("task", [-1, TASKS])
def test_unknown_task(task: int) -> None:
    with pytest.raises(InvalidRequestError, match=rf"task \({task}\).*0 to 4"):
        TaskRouter(table(), EXPERTS).load([0, task])


@pytest.mark.parametrize(
    ("ids", "weights", "message"),
    [
        (torch.zeros((2, 2), dtype=torch.int64), None, r"shape \(2, 2\)"),
        (torch.zeros((2, 2, 1)), None, "float32"),
        (torch.zeros((2, 0, 1), dtype=torch.int64), None, r"shape \(2, 0, 1\)"),
        (torch.tensor([[[0, 8]]]), None, "experts 0 to 8; use 0 to 7"),
        (torch.tensor([[[-1, 2]]]), None, "experts -1 to 2"),
        (torch.tensor([[[2, 3, 2]]]), None, "twice"),
        (torch.tensor([[[2, 3]]]), torch.ones((1, 1, 1)), r"weights have shape \(1, 1, 1\)"),
    ],
)
def test_bad_tables_are_refused(ids: torch.Tensor, weights: torch.Tensor | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TaskRouter(ids, EXPERTS, weights)

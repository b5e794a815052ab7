"""One rank holds every slot: nothing travels. What this computes is what every other kind must compute."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from phalanx.moe.dispatch.dispatcher import DispatchConfig, Dispatched
from phalanx.moe.dispatch.rows import gather_in_order, weigh_up
from phalanx.parallel.transport import Exchange, Request


class Handle(NamedTuple):
    """What `combine` needs."""

    here_TK: Tensor
    weights_TK: Tensor


class LocalDispatcher:
    """Rows are the tokens themselves; makes no requests."""

    def __init__(self, config: DispatchConfig) -> None:
        self._config = config

    def dispatch(
        self, x_TD: Tensor, expert_slots_TK: Tensor, topk_weights_TK: Tensor, padded_T: int
    ) -> Exchange[Dispatched]:
        """See `Dispatcher`; also tokens without a slot are among the rows."""
        yield from _nothing()
        here_TK = expert_slots_TK >= 0
        weights_TK = topk_weights_TK.masked_fill(~here_TK, 0.0)
        return Dispatched(x_TD, expert_slots_TK, weights_TK, Handle(here_TK, weights_TK))

    def combine(self, y: Tensor, handle: Handle) -> Exchange[Tensor]:
        """See `Dispatcher`."""
        yield from _nothing()
        if self._config.exact:
            return weigh_up(y, gather_in_order(handle.here_TK, y.shape[0]), handle.weights_TK)
        return y.to(self._config.dtype)


def _nothing() -> Iterator[Request]:
    return iter(())


DISPATCHER = LocalDispatcher

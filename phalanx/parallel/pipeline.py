"""Pipeline stages: which layers each holds, and the two lanes between them.

    hidden lane   stage i -> stage i + 1    hidden states, once per step
    token lane    last stage -> stage 0     sampled token ids, once per step

Sends do not wait for the receiver, so stages drift apart by as many steps as are in flight. Two rules keep the lanes
free of deadlock: stage 0 posts the receive of a step's tokens when it runs that step, and at most stages + 1 sends of a
lane are unfinished. Each (dp, tp) coordinate has its own pair of lanes.
"""

import itertools
from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor

from phalanx.errors import ConfigError


def split_layers(num_layers: int, stages: int, override: tuple[int, ...] | None = None) -> tuple[tuple[int, int], ...]:
    """The half-open layer range of each stage.

    Args:
        num_layers: of the model.
        stages: of the mesh.
        override: layers per stage, first to last; None = as equal as can be, the first stages take the remainder
            (the last one computes the head, too).

    Raises:
        ConfigError: a stage would be empty, or the override does not add up.
    """
    if not 1 <= stages <= num_layers:
        raise ConfigError(f"parallel.pipeline ({stages}) must be between 1 and the number of layers ({num_layers})")
    counts = override or tuple(num_layers // stages + (stage < num_layers % stages) for stage in range(stages))
    if len(counts) != stages:
        raise ConfigError(f"layers per stage {list(counts)} names {len(counts)} stages, parallel.pipeline is {stages}")
    if min(counts) < 1 or sum(counts) != num_layers:
        raise ConfigError(
            f"layers per stage {list(counts)} must be positive and add up to {num_layers}, not {sum(counts)}"
        )
    bounds = [sum(counts[:stage]) for stage in range(stages + 1)]
    return tuple(itertools.pairwise(bounds))


class PendingTokens:
    """Token ids on their way from the last stage."""

    def __init__(self, ids: Tensor, work: dist.Work | None) -> None:
        self._ids = ids
        self._work = work

    def wait(self) -> Tensor:
        """The ids (N) int32, on the rank's device. On CUDA the current stream waits, not the host."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._ids


class Pipeline:
    """One rank's ends of its two lanes.

    Args:
        stage: of this rank.
        num_stages: at least 2.
        hidden_lane: process group of the ranks of this (dp, tp) coordinate, in stage order.
        token_lane: another process group over the same ranks.
        device: of everything sent and received.
    """

    def __init__(
        self,
        stage: int,
        num_stages: int,
        hidden_lane: dist.ProcessGroup,
        token_lane: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        self._stage = stage
        self._last = num_stages - 1
        self._hidden_lane = hidden_lane
        self._token_lane = token_lane
        self._device = device
        self._depth = num_stages + 1  # the engine keeps num_stages steps in flight
        self._hidden_sends: deque[tuple[dist.Work, Tensor]] = deque()
        self._token_sends: deque[tuple[dist.Work, Tensor]] = deque()

    def send_hidden(self, hidden_states: Tensor) -> None:
        """Send (T, hidden) to the next stage, which must call `recv_hidden`; nothing is sent for T = 0.

        The tensor is kept until it has left and must not be written any more.
        """
        self._send(hidden_states, self._hidden_lane, self._stage + 1, self._hidden_sends)

    def recv_hidden(self, num_tokens: int, hidden_size: int, dtype: torch.dtype) -> Tensor:
        """Receive (T, hidden) from the previous stage; peer of `send_hidden`."""
        hidden_states = torch.empty((num_tokens, hidden_size), dtype=dtype, device=self._device)
        if num_tokens:
            dist.recv(hidden_states, group=self._hidden_lane, group_src=self._stage - 1)
        return hidden_states

    def send_tokens(self, token_ids: Tensor) -> None:
        """Last stage: send (N) int32 sampled ids to stage 0 without waiting; nothing is sent for N = 0."""
        self._send(token_ids, self._token_lane, 0, self._token_sends)

    def recv_tokens(self, num_tokens: int) -> PendingTokens:
        """Stage 0: post the receive of one step's sampled ids, in step order; peer of `send_tokens`."""
        ids = torch.empty(num_tokens, dtype=torch.int32, device=self._device)
        work = dist.irecv(ids, group=self._token_lane, group_src=self._last) if num_tokens else None
        return PendingTokens(ids, work)

    def flush(self) -> None:
        """Wait until all that was sent has left: before an orderly `Mesh.close`, or the neighbour may miss the end."""
        for unfinished in (self._hidden_sends, self._token_sends):
            while unfinished:
                unfinished.popleft()[0].wait()

    def _send(
        self, x: Tensor, lane: dist.ProcessGroup, to_stage: int, unfinished: deque[tuple[dist.Work, Tensor]]
    ) -> None:
        if not x.numel():
            return
        while len(unfinished) >= self._depth:
            unfinished.popleft()[0].wait()
        x = x.contiguous()
        work = dist.isend(x, group=lane, group_dst=to_stage)
        assert work is not None, "this rank is a member of its own lane"
        unfinished.append((work, x))

"""Drive a decoder by hand: what the worker does, as plainly as can be. Imported by rank processes: no transformers."""

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from phalanx.kernels.types import AttnMeta
from phalanx.models.batch import ForwardBatch
from phalanx.models.decoder import Decoder
from phalanx.models.loading import load_model, read_config
from phalanx.moe.group import EpStep, ExpertGroup
from phalanx.moe.placement.linear import linear
from phalanx.parallel.membership import build
from phalanx.parallel.mesh import Mesh
from phalanx.parallel.pipeline import split_layers
from phalanx.parallel.rendezvous import connect_store
from phalanx.parallel.topology import EpTopology

BLOCK_SIZE = 4
Rows = list[tuple[int, int, int]]  # (sequence, first position, number of tokens), decodes first


class Experts(NamedTuple):
    """How the expert ranks of a stage meet: the store's address, the dispatcher, and bits that depend on neither."""

    address: str
    kind: str
    exact: bool = True


@contextlib.contextmanager
def expert_group(path: str, mesh: Mesh, experts: Experts | None) -> Iterator[ExpertGroup | None]:
    """This rank's expert group, on two nodes, with a redundant slot per rank; None if the stage needs none."""
    config, shape, here = read_config(path), mesh.shape, mesh.coordinate
    specs = config.moe_specs(split_layers(len(config.layers), shape.pp)[here.pp])
    num_ranks = shape.dp * shape.tp
    if not specs or num_ranks == 1:
        yield None
        return
    assert experts is not None
    num_experts = [spec.router.num_experts for spec in specs]
    slots = min(-(-max(num_experts) // num_ranks) + 1, max(num_experts))
    placement = linear(num_experts, num_ranks, slots)
    topology = EpTopology.uniform(2, num_ranks // 2)
    rank, cpu = here.dp * shape.tp + here.tp, torch.device("cpu")
    group = ExpertGroup(topology, rank, placement.layers, slots, exact=experts.exact, device=cpu)
    membership = build(
        connect_store(experts.address, 30),
        prefix=f"experts/{here.pp}",
        generation=0,
        topology=topology,
        rank=rank,
        device=cpu,
        timeout_s=30,
        interface="lo",
    )
    group.enter(membership.transport, placement.layers)
    yield group
    membership.destroy()


def load_stage(
    path: str,
    mesh: Mesh,
    max_model_len: int = 64,
    dtype: torch.dtype = torch.float32,
    experts: ExpertGroup | None = None,
) -> Decoder:
    """This rank's stage on the CPU."""
    stages = split_layers(len(read_config(path).layers), mesh.shape.pp)
    return load_model(
        path,
        mesh,
        device=torch.device("cpu"),
        dtype=dtype,
        layer_range=stages[mesh.coordinate.pp],
        max_model_len=max_model_len,
        experts=experts,
    )


class Driver:
    """Runs steps over a fixed set of sequences whose tokens are known beforehand (teacher forcing)."""

    def __init__(
        self,
        decoder: Decoder,
        mesh: Mesh,
        sequences: list[list[int]],
        dtype: torch.dtype = torch.float32,
        kind: str | None = None,
    ) -> None:
        self._decoder = decoder
        self._kind = kind
        self._mesh = mesh
        self._sequences = sequences
        blocks_each = -(-max(map(len, sequences)) // BLOCK_SIZE)
        num_blocks = 1 + blocks_each * len(sequences)
        # Scattered blocks, and NaN in every slot nobody wrote.
        order = torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(7)) + 1
        self._tables = order.view(len(sequences), blocks_each).to(torch.int32)
        self.kv = torch.full(decoder.kv_shape(num_blocks, BLOCK_SIZE), torch.nan, dtype=dtype)

    def batch(self, rows: Rows, sample: str = "all", num_elsewhere: int = 0) -> ForwardBatch:
        """The step that computes `rows`; `sample` is "all" tokens, the "last" of each row, or "none".

        Other dp ranks may have up to `num_elsewhere` tokens.
        """
        tokens, positions, slots = [], [], []
        for sequence, first, count in rows:
            tokens += self._sequences[sequence][first : first + count]
            positions += range(first, first + count)
            table = self._tables[sequence]
            slots += [int(table[p // BLOCK_SIZE]) * BLOCK_SIZE + p % BLOCK_SIZE for p in range(first, first + count)]
        bounds = torch.tensor([0, *(count for _, _, count in rows)]).cumsum(0).to(torch.int32)
        ends = [first + count for _, first, count in rows]
        picked = {"all": torch.arange(len(tokens)), "last": bounds[1:].long() - 1, "none": torch.arange(0)}[sample]
        meta = AttnMeta(
            cu_seqlens_q=bounds,
            seq_lens=torch.tensor(ends, dtype=torch.int32),
            block_tables=self._tables[[sequence for sequence, _, _ in rows]],
            num_decodes=sum(1 for _ in _leading_decodes(rows)),
            max_q_len=max((count for _, _, count in rows), default=0),
            max_seq_len=max(ends, default=0),
        )
        return ForwardBatch(
            token_ids=torch.tensor(tokens, dtype=torch.int32),
            positions=torch.tensor(positions, dtype=torch.int32),
            slot_mapping=torch.tensor(slots, dtype=torch.int64),
            meta=meta,
            sample_rows=picked,
            num_tokens=len(tokens),
            ep=self._ep_step(max(len(tokens), num_elsewhere)),
        )

    def _ep_step(self, num_tokens: int) -> EpStep | None:
        return None if self._kind is None else EpStep(self._kind, -(-num_tokens // self._mesh.shape.tp))

    @torch.inference_mode()
    def step(self, rows: Rows, sample: str = "all", num_elsewhere: int = 0) -> Tensor:
        """Logits of the sampled rows on the last stage; hidden states on the others."""
        batch, pipeline = self.batch(rows, sample, num_elsewhere), self._mesh.pipeline
        hidden = None
        if pipeline is not None and not self._mesh.is_first_stage:
            hidden = pipeline.recv_hidden(batch.num_tokens, self._decoder.config.hidden_size, torch.float32)
        out = self._decoder.forward(batch, self.kv, hidden)
        if pipeline is not None and not self._mesh.is_last_stage:
            pipeline.send_hidden(out)
        return out


def _leading_decodes(rows: Rows) -> list[int]:
    counts = [count for _, _, count in rows]
    return counts[: next((i for i, count in enumerate(counts) if count > 1), len(counts))]


def whole(driver: Driver, length: int) -> Tensor:
    """Both sequences in one prefill; logits of every position, sequence by sequence."""
    return driver.step([(0, 0, length), (1, 0, length)]).view(2, length, -1)


def chunked(driver: Driver, length: int) -> Tensor:
    """Prefill in uneven chunks while the other sequence decodes, then both decode to the end."""
    first, second = [], []
    first.append(driver.step([(0, 0, 7)]))
    first.append(driver.step([(0, 7, 4)]))
    for position in range(3):
        out = driver.step([(0, 11 + position, 1), (1, 5 * position, 5)])
        first.append(out[:1])
        second.append(out[1:])
    driver.step([], "none")
    for position in range(length - 15):
        out = driver.step([(0, 14 + position, 1), (1, 15 + position, 1)])
        first.append(out[:1])
        second.append(out[1:])
    first.append(driver.step([(0, length - 1, 1)]))
    return torch.stack([torch.cat(first), torch.cat(second)])


PROGRAMS: dict[str, Callable[[Driver, int], Tensor]] = {"whole": whole, "chunked": chunked}


def logits_of(
    mesh: Mesh, path: str, sequences: list[list[int]], program: str, experts: Experts | None = None
) -> Tensor | None:
    """(sequence, position, vocab) logits through a program, on the last stage; None on the others.

    Of several dp ranks the first has all the work, the others take part in every step without a token.
    """
    with expert_group(path, mesh, experts) as group:
        kind = None if group is None or experts is None else experts.kind
        driver = Driver(load_stage(path, mesh, experts=group), mesh, sequences, kind=kind)
        if mesh.coordinate.dp > 0:
            for rows, _ in _steps_of(program, len(sequences[0])):
                driver.step([], "none", sum(count for _, _, count in rows))
        elif mesh.is_last_stage:
            return PROGRAMS[program](driver, len(sequences[0]))
        else:
            for rows, sample in _steps_of(program, len(sequences[0])):
                driver.step(rows, sample)
    return None


def _steps_of(program: str, length: int) -> list[tuple[Rows, str]]:
    """What a program does; the shapes of the results it sees do not matter."""
    steps: list[tuple[Rows, str]] = []

    class Recorder:
        def step(self, rows: Rows, sample: str = "all") -> Tensor:
            steps.append((rows, sample))
            return torch.zeros(sum(count for _, _, count in rows), 1)

    PROGRAMS[program](Recorder(), length)  # type: ignore[arg-type]
    return steps

"""One rank: executes `StepPlan`s and decides nothing."""

import time
from collections import deque
from collections.abc import Callable

import torch

from phalanx.kernels import memory
from phalanx.kernels.types import AttnMeta
from phalanx.models.batch import ForwardBatch
from phalanx.models.loading import load_model, read_config
from phalanx.moe.group import ALONE, EpStep
from phalanx.parallel.mesh import Mesh
from phalanx.parallel.pipeline import PendingTokens
from phalanx.runtime.pending_result import PendingResult
from phalanx.runtime.plan import Enter, PlanError, RankMessage, StepPlan, roll_hash
from phalanx.runtime.rank_experts import RankExperts
from phalanx.runtime.rank_spec import RankSpec
from phalanx.runtime.sampler import Sampler
from phalanx.runtime.slot_table import SampleRows, SlotTable


class Worker:
    """A rank's model shard, KV pool and slots.

    Args:
        spec: the rank's orders.
        mesh: joined already.
        send: takes messages for the engine other than results, from any thread.

    Raises:
        CheckpointError, ConfigError: the model cannot be loaded on this rank.
    """

    def __init__(self, spec: RankSpec, mesh: Mesh, send: Callable[[RankMessage], None]) -> None:
        self.spec, self.mesh, self.dp_rank = spec, mesh, spec.dp_rank
        self.dtype = getattr(torch, spec.dtype)
        where = mesh.coordinate
        self.is_reporter = mesh.is_last_stage and where.tp == 0
        self.experts = None
        if spec.experts is not None:
            first = sum(layer < spec.stage_layers[where.pp][0] for layer in read_config(spec.model_path).moe_layers)
            self.experts = RankExperts(spec, mesh, first, send)
        self.model = load_model(
            spec.model_path,
            mesh,
            device=mesh.device,
            dtype=self.dtype,
            layer_range=spec.stage_layers[where.pp],
            max_model_len=spec.max_model_len,
            choose=spec.choose,
            experts=None if self.experts is None else self.experts.group,
            capacity=None if spec.experts is None else spec.experts.capacity,
        )
        if self.experts is not None:
            self.experts.attach(self.model.experts)
        shape = self.model.kv_shape(spec.num_blocks, spec.block_size)
        # Not cleared: kernels mask what no token has written.
        self.kv = memory.empty(shape, self.dtype, mesh.device)
        has_tasks = self.model.config.num_tasks > 0
        self.table = SlotTable(spec.max_sequences, spec.kv, mesh.device, has_tasks=has_tasks)
        self.sampler = Sampler(self.table, spec.choose)
        self.is_broken = False
        self._next_step, self._hash = 0, 0
        self._arriving: deque[tuple[int, SampleRows, PendingTokens]] = deque()

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> PendingResult | None:
        """Run this rank's part of a step; a result on the reporting rank of each dp rank, None elsewhere.

        Raises:
            PlanError: the plan is not the next one, or not what the other ranks were told.
        """
        started = time.perf_counter()
        domain = plan.domains[self.dp_rank]
        self._check(plan)
        ep = None
        if self.experts is not None and plan.experts is not None:
            self.experts.begin(plan.experts)
            ep = EpStep(plan.experts.kind, -(-plan.experts.padded_tokens // self.mesh.shape.tp))
        # Before the changes: an id that arrives late must not land in a slot's next owner.
        self._take_tokens(domain.num_settled)
        self.table.apply(domain)
        batch, rows = self.table.build(domain.rows, ep)
        pipeline, hidden = self.mesh.pipeline, None
        if pipeline is not None and not self.mesh.is_first_stage:
            hidden = pipeline.recv_hidden(batch.num_tokens, self.model.config.hidden_size, self.dtype)
        out = self.model.forward(batch, self.kv, hidden)
        if self.experts is not None and plan.experts is not None and plan.experts.report_load:
            self.experts.report(self.model.take_num_dropped())
        if not self.mesh.is_last_stage:
            assert pipeline is not None, "a mesh with several stages has lanes"
            pipeline.send_hidden(out)
            if self.mesh.is_first_stage:
                self._arriving.append((plan.step, rows, pipeline.recv_tokens(len(rows.slots))))
            return None
        sampled = self.sampler.sample(out, rows)
        self.table.store(rows, sampled.token_ids)
        if pipeline is not None:
            pipeline.send_tokens(sampled.token_ids.to(torch.int32))
        return PendingResult(plan, self.dp_rank, rows, sampled, started) if self.is_reporter else None

    def enter(self, order: Enter) -> None:
        """Go on in another generation, in which this rank may have another dp rank.

        Raises:
            PlanError: it was not prepared.
        """
        assert self.experts is not None, "only expert groups change"
        self.dp_rank = self.experts.enter(order)
        self._next_step, self._hash, self.is_broken = order.step, order.schedule_hash, False
        if order.reset:
            self.table.clear()
            self._arriving.clear()

    @property
    def outlives_peers(self) -> bool:
        """Whether this rank waits for another generation when an exchange fails, instead of ending."""
        return self.spec.experts is not None and self.spec.experts.outlives_peers

    def skip(self, plan: StepPlan) -> None:
        """Of a plan that follows a broken step: only the flips, which the engine counts as done."""
        if self.experts is not None and plan.experts is not None:
            self.experts.flip(plan.experts)

    def break_off(self) -> None:
        """After a step that failed in an exchange: skip plans until `enter`."""
        assert self.experts is not None
        self.is_broken = True
        self.experts.leave()  # peers that wait for this rank in another exchange wake up, too

    def close(self) -> None:
        """Leave the process groups, after what was sent has left."""
        if self.experts is not None:
            self.experts.close()
        if self.mesh.pipeline is not None:
            self.mesh.pipeline.flush()
        self.mesh.close()

    def _check(self, plan: StepPlan) -> None:
        for part in plan.domains:
            self._hash = roll_hash(self._hash, part.rows)
        if plan.step != self._next_step or plan.schedule_hash != self._hash:
            raise PlanError(
                f"rank {self.spec.rank} got step {plan.step} (hash {plan.schedule_hash:x}) but expects step "
                f"{self._next_step} (hash {self._hash:x}); the replica must restart"
            )
        self._next_step += 1

    def _take_tokens(self, num_settled: int) -> None:
        """Stage 0: store the ids of steps the engine has seen the results of, so they are here or all but here."""
        while self._arriving and self._arriving[0][0] < num_settled:
            _, rows, pending = self._arriving.popleft()
            self.table.store(rows, pending.wait())


@torch.inference_mode()
def warm_up(worker: Worker) -> None:
    """Run the largest prefill and a decode on the null block, so that no request pays for a first use.

    Every rank of a tensor group must call it; stages and expert groups do not wait for each other.
    """
    device, spec = worker.mesh.device, worker.spec
    for num_tokens in (min(spec.max_batch_tokens, spec.max_model_len), 1):
        zeros = torch.zeros(num_tokens, dtype=torch.int32, device=device)
        blocks = spec.kv.max_blocks(num_tokens) + 1
        meta = AttnMeta(
            torch.tensor([0, num_tokens], dtype=torch.int32, device=device),
            torch.tensor([num_tokens], dtype=torch.int32, device=device),
            torch.zeros((1, blocks), dtype=torch.int32, device=device),
            int(num_tokens == 1),
            num_tokens,
            num_tokens,
        )
        batch = ForwardBatch(
            zeros,
            torch.arange(num_tokens, dtype=torch.int32, device=device),
            zeros.long() - 1,
            meta,
            zeros[:1].long(),
            num_tokens,
            None if worker.experts is None else EpStep(ALONE, num_tokens),
        )
        hidden = None
        if not worker.mesh.is_first_stage:
            hidden = torch.zeros((num_tokens, worker.model.config.hidden_size), dtype=worker.dtype, device=device)
        worker.model.forward(batch, worker.kv, hidden)
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""A replica's engine: frames in, plans to the ranks, token rows out. No clock, no socket; the shells own those."""

from array import array

from phalanx.runtime.engine_config import EngineConfig
from phalanx.runtime.executor.executor import Executor, HasFileno
from phalanx.runtime.frames import Abort, FinishReason, Place, TokenRow
from phalanx.runtime.plan import StepResult
from phalanx.runtime.replica_mesh import Rearrange, ReplicaMesh
from phalanx.runtime.scaling import ScaleOp
from phalanx.runtime.scheduler import Scheduler
from phalanx.runtime.sequence import FINISHED, Sequence


class Engine:
    """Scheduler and executor of one replica; called from one thread.

    Args:
        config: what the ranks run.
        executor: the ranks, up already.
        store: address of the rendezvous store, for ranks that come later.
        interface: network interface of their collectives.
    """

    def __init__(self, config: EngineConfig, executor: Executor, store: str = "", interface: str = "") -> None:
        self.config, self.executor = config, executor
        self.scheduler = Scheduler(config.scheduler, config.kv, prefix_cache=config.prefix_cache)
        self.mesh = ReplicaMesh(config, executor, store, interface, self._rearrange)
        tasks = range(config.model.num_tasks) or (None,)
        self._roots = {task: config.kv_root(task) for task in tasks}
        self._eos = frozenset(config.model.eos_token_ids)
        self._jobs: dict[str, list[Sequence]] = {}
        self._arrivals = 0
        self._settled: list[TokenRow] = []

    @property
    def has_work(self) -> bool:
        """Something is queued, running or in flight."""
        return bool(self._settled or self._jobs or self.scheduler.num_in_flight)

    def place(self, frame: Place) -> None:
        """Start or resume the unfinished choices of a request.

        A request that can never fit is answered with an error row; the controller's limits should have caught it.
        """
        self._drop(self._jobs.get(frame.job, []))
        arrival, self._arrivals = self._arrivals, self._arrivals + 1
        problem = self._problem(frame)
        prompt, params = array("I", frame.prompt_token_ids if problem is None else b""), frame.params
        max_tokens = params.max_tokens if params.max_tokens is not None else self.limit - len(prompt)
        sequences = []
        for choice, output in enumerate(frame.outputs):
            if output is None:
                continue
            if problem is not None:
                self._settled.append(TokenRow(frame.job, frame.epoch, choice, 0, [], finish="error", error=problem))
                continue
            seq = Sequence(
                job=frame.job,
                epoch=frame.epoch,
                choice=choice,
                prompt=prompt,
                output=array("I", output),
                params=params,
                seed=frame.seed,
                eos_token_ids=self._eos,
                max_tokens=max_tokens,
                root=self._roots[params.task],
                order=(frame.priority, arrival, choice),
            )
            sequences.append(seq)
            self._enqueue(seq)
        if live := [seq for seq in sequences if seq.status != FINISHED]:
            self._jobs[frame.job] = live

    def abort(self, frame: Abort) -> None:
        """Drop a choice, or all choices, of a request; unknown ones are ignored."""
        placed = [seq for seq in self._jobs.get(frame.job, []) if seq.epoch == frame.epoch]
        self._drop([seq for seq in placed if frame.choice in (-1, seq.choice)])
        self._forget(frame.job)

    def step(
        self, timeout_s: float = 0.0, *, now: float = 0.0, prove_alive: bool = False, wake: HasFileno | None = None
    ) -> list[TokenRow]:
        """Plan and send what may be sent, then take what has arrived.

        Args:
            timeout_s: longest wait for a result.
            now: seconds of a clock that never goes back; deadlines of scaling count by it.
            wake: something with a `fileno` whose readability ends the wait.
            prove_alive: when idle, run an empty step: its result shows that every rank answers.

        Raises:
            ReplicaLostError: a rank is gone; the replica is over.
        """
        self.mesh.tick(self.scheduler.num_in_flight, now)
        prove_alive = prove_alive or (self.mesh.is_busy and not self.scheduler.num_in_flight)
        while not self.mesh.holds and (plan := self.scheduler.schedule(allow_empty=prove_alive)) is not None:
            self.executor.submit(self.mesh.stamp(plan))
            prove_alive = False
        rows, self._settled = self._settled, []
        for event in self.executor.poll(0.0 if rows else timeout_s, wake):
            if not isinstance(event, StepResult):
                self.mesh.handle(event, now)
            elif event.generation == self.mesh.generation:  # else of a step that a lost rank has ended
                self.mesh.note_step(event.seconds)
                rows += self.scheduler.apply(event)
        for row in rows:
            if row.finish is not None:
                self._forget(row.job)
        return rows

    def scale(self, op_id: str, data: int, now: float, leave: tuple[str, ...] = ()) -> ScaleOp:
        """Begin to change the number of dp ranks; `step` carries it on. The same id is the same operation.

        Args:
            op_id: names the operation.
            data: dp ranks wanted.
            now: monotonic seconds.
            leave: names of nodes on which no rank shall stay.

        Raises:
            ConfigError: it cannot be, or another operation is running.
        """
        return self.mesh.scale(op_id, data, now, leave)

    def abort_scale(self, op_id: str, reason: str, now: float) -> None:
        """Take an operation back, if it is the one under way and has not been committed."""
        self.mesh.abort(op_id, reason, now)

    @property
    def limit(self) -> int:
        """Tokens one request may have, prompt and output together."""
        return self.config.kv.capacity_tokens

    def check(self) -> None:
        """All invariants; with nothing live also that every block and slot is back."""
        self.scheduler.check()
        if not self.has_work:
            for domain in self.scheduler.domains:
                assert domain.cache.num_free == self.config.kv.num_blocks - 1, "an idle pool is free"
                assert len(domain.free_slots) == self.config.max_sequences, "an idle table is free"

    def _rearrange(self, change: Rearrange) -> tuple[int, int]:
        self.scheduler.rearrange(change.keep, reset=change.reset)
        return self.scheduler.step, self.scheduler.digest

    def _enqueue(self, seq: Sequence) -> None:
        # A resumed choice may have been complete when its replica died, the finish alone was lost.
        last = seq.tokens[-1] if seq.num_output else None
        if seq.num_output >= seq.max_tokens or last in seq.stop_ids:
            finish: FinishReason = "stop" if last in seq.stop_ids else "length"
            self._settled.append(TokenRow(seq.job, seq.epoch, seq.choice, seq.num_output, [], finish=finish))
            seq.status = FINISHED
        else:
            self.scheduler.add(seq)

    def _drop(self, sequences: list[Sequence]) -> None:
        for seq in sequences:
            if seq.status != FINISHED:
                self.scheduler.cancel(seq)

    def _problem(self, frame: Place) -> str | None:
        """Why this engine cannot run a request; the controller's checks should have caught it before."""
        packed = [frame.prompt_token_ids, *(output for output in frame.outputs if output)]
        if any(len(ids) % 4 for ids in packed):
            return "token ids are not packed as 32-bit integers"
        highest = max((max(array("I", ids), default=0) for ids in packed), default=0)
        if highest >= self.config.model.vocab_size:
            return f"token id {highest} is outside the vocabulary (0..{self.config.model.vocab_size - 1})"
        num_prompt, max_tokens = len(frame.prompt_token_ids) // 4, frame.params.max_tokens or 1
        if not num_prompt:
            return "the prompt is empty; give at least one token"
        if frame.params.task not in self._roots:
            return f"task {frame.params.task} is none of this model's {self.config.model.num_tasks}"
        if num_prompt + max_tokens > self.limit:
            room = self.limit - num_prompt
            fix = f"use max_tokens <= {room}" if room > 0 else "shorten the prompt"
            return f"prompt ({num_prompt} tokens) + max_tokens ({max_tokens}) is above the limit ({self.limit}); {fix}"
        return None

    def _forget(self, job: str) -> None:
        if all(seq.status == FINISHED for seq in self._jobs.get(job, [])):
            self._jobs.pop(job, None)

"""One choice of one request, as the scheduler sees it.

    tokens     |<------- prompt ------->|<---- output ---->|. pending .|
    KV         |<-- settled -->|<-- in flight -->|
    index      0               num_settled       num_computed          num_known

`tokens` holds what the engine has; `pending` ids were sampled by steps in flight and exist only on the ranks so far.
"""

from array import array

import msgspec

from phalanx.runtime.frames import TokenLogprobs
from phalanx.runtime.kv.prefix_cache import Table
from phalanx.runtime.plan import SlotSampling
from phalanx.runtime.sampling_params import SamplingParams

WAITING, RUNNING, FINISHED = 0, 1, 2
NO_SLOT = -1
REPORTED, UNKNOWN = -1, -2  # of `num_cached`; -1 is what rows say


class Sequence:
    """Mutable state of a choice; owned by the scheduler, which alone changes it.

    Attributes:
        order: (priority, arrival, choice), the place in the queue; kept through preemption.
        num_computed: tokens whose KV is computed or scheduled; 0 again after a preemption.
        num_settled: tokens whose KV a finished step has computed; 0 again after a preemption.
        num_known: tokens that exist, here or on the ranks.
        num_in_flight: steps in flight that hold a row of this sequence.
        max_length: tokens it may have, prompt included.
        next_full: when so many tokens are settled, another block is full.
        num_cached: prompt tokens found when it was first admitted; UNKNOWN before, REPORTED once a row has told it.
        stop_ids: ids that end the output.
        prompt_logprobs: entry i for prompt token i + 1, collected until the first row takes them; None = not wanted.
        waited: schedule passes spent waiting for another sequence that computes the same prefix.
    """

    __slots__ = (
        "choice",
        "domain",
        "epoch",
        "job",
        "max_length",
        "max_tokens",
        "next_full",
        "num_cached",
        "num_computed",
        "num_in_flight",
        "num_known",
        "num_prompt",
        "num_settled",
        "order",
        "params",
        "prompt_logprobs",
        "sampling",
        "slot",
        "status",
        "stop_ids",
        "table",
        "tokens",
        "waited",
    )

    def __init__(
        self,
        *,
        job: str,
        epoch: int,
        choice: int,
        prompt: "array[int]",
        output: "array[int]",
        params: SamplingParams,
        seed: int,
        eos_token_ids: frozenset[int],
        max_tokens: int,
        root: bytes,
        order: tuple[int, int, int],
    ) -> None:
        self.job, self.epoch, self.choice = job, epoch, choice
        self.params, self.max_tokens, self.order = params, max_tokens, order
        self.tokens = array("I", prompt)
        self.tokens.extend(output)
        self.num_prompt = len(prompt)
        self.max_length = self.num_prompt + max_tokens
        self.table = Table(self.tokens, root)
        self.stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos_token_ids)
        self.sampling = slot_sampling(params, seed, choice, self.stop_ids)
        self.prompt_logprobs: list[TokenLogprobs] | None = None if params.prompt_logprobs is None else []
        if output:  # the first row, which brought them, has been delivered
            self.take_prompt_logprobs()
        self.status, self.slot, self.domain, self.waited = WAITING, NO_SLOT, -1, 0
        self.num_known, self.num_cached = len(self.tokens), UNKNOWN
        self.num_computed = self.num_settled = self.num_in_flight = self.next_full = 0

    @property
    def num_output(self) -> int:
        """Output ids the engine knows."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_remaining(self) -> int:
        """Tokens that exist and whose KV is not yet scheduled; 1 = ready to decode."""
        return self.num_known - self.num_computed

    def take_prompt_logprobs(self) -> list[TokenLogprobs] | None:
        """What was collected, once; the ranks are not asked again when it enters another slot."""
        collected, self.prompt_logprobs = self.prompt_logprobs, None
        self.sampling = msgspec.structs.replace(self.sampling, prompt_logprobs=-1)
        return collected


def slot_sampling(params: SamplingParams, seed: int, choice: int, stop_ids: frozenset[int]) -> SlotSampling:
    """The part of a request's parameters that ranks need."""
    return SlotSampling(
        temperature=float(params.temperature),
        top_k=params.top_k,
        top_p=float(params.top_p),
        min_p=float(params.min_p),
        repetition_penalty=float(params.repetition_penalty),
        presence_penalty=float(params.presence_penalty),
        frequency_penalty=float(params.frequency_penalty),
        logit_bias=params.logit_bias,
        seed=seed,
        choice=choice,
        min_tokens=params.min_tokens,
        stop_token_ids=sorted(stop_ids) if params.min_tokens else [],
        logprobs=-1 if params.logprobs is None else params.logprobs,
        prompt_logprobs=-1 if params.prompt_logprobs is None else params.prompt_logprobs,
        task=-1 if params.task is None else params.task,
    )

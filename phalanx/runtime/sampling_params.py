"""What a request asks of the sampler, checked once where it enters."""

import msgspec

from phalanx.errors import InvalidRequestError

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_STOP_TOKEN_IDS = 128


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """Sampling and stopping of one request.

    Order of work on the logits: logit_bias, repetition / presence / frequency penalties, min_tokens mask, temperature,
    top_k, top_p, min_p, then the sample.

    Attributes:
        temperature: 0 = greedy (ties to the lowest id), at most 100.
        top_k: keep the k likeliest; 0 = all.
        top_p: keep the smallest set whose probability reaches p; (0, 1].
        min_p: drop what is less likely than `min_p` times the likeliest; [0, 1].
        repetition_penalty: divides positive and multiplies negative logits of ids seen in prompt or output (CTRL,
            arXiv:1909.05858); (0, 100].
        presence_penalty, frequency_penalty: subtracted once per id, or per occurrence, in the output; [-2, 2].
        logit_bias: token id -> added to its logit; [-100, 100], at most 1024 entries.
        seed: unsigned 64-bit; None = drawn once where the request enters, and reported.
        n: independent choices of the same prompt.
        max_tokens: None = up to the model's limit.
        min_tokens: no stop token before this many.
        stop: strings that end the text and are not part of it.
        stop_token_ids: ids that end the output; they are part of the token ids, not of the text.
        ignore_eos: the model's own end-of-sequence ids do not stop.
        logprobs: log-probabilities of the sampled token and of the likeliest `logprobs` (0-20) ids; None = off.
        prompt_logprobs: the same for each prompt token but the first; None = off.
        skip_special_tokens: leave special tokens out of the text.
        task: chooses the experts, in models with task-level routing; None = their task 0.

    Raises:
        InvalidRequestError: a field is outside its range; the message names field, value and limit.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    n: int = 1
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    task: int | None = None

    def __post_init__(self) -> None:
        _real("temperature", self.temperature, 0.0, 100.0)
        _integer("top_k", self.top_k, 0, 2**31 - 1)
        _real("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _real("min_p", self.min_p, 0.0, 1.0)
        _real("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_low=True)
        _real("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _real("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _integer("n", self.n, 1, MAX_CHOICES)
        _integer("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.seed is not None:
            _integer("seed", self.seed, 0, 2**64 - 1)
        if self.task is not None:
            _integer("task", self.task, 0, 2**31 - 1)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
            if self.min_tokens > self.max_tokens:
                raise InvalidRequestError(
                    f"min_tokens ({self.min_tokens}) is above max_tokens ({self.max_tokens}); lower it"
                )
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 0, MAX_LOGPROBS)
        for name in ("ignore_eos", "skip_special_tokens"):
            if type(getattr(self, name)) is not bool:
                raise InvalidRequestError(f"{name} ({_shown(getattr(self, name))}) must be true or false")
        self._check_collections()

    def _check_collections(self) -> None:
        if type(self.logit_bias) is not dict:
            raise InvalidRequestError(f"logit_bias ({_shown(self.logit_bias)}) must be a dict of token id -> number")
        _count("logit_bias", len(self.logit_bias), MAX_LOGIT_BIAS)
        for token_id, bias in self.logit_bias.items():
            _integer("logit_bias token id", token_id, 0, 2**31 - 1)
            _real(f"logit_bias[{token_id}]", bias, -100.0, 100.0)
        _sequence("stop", self.stop, "strings", MAX_STOP_STRINGS)
        for text in self.stop:
            # Half a surrogate pair is a str, but no text: it could not be sent on.
            if type(text) is not str or not 1 <= len(text) <= MAX_STOP_LENGTH or not _is_text(text):
                raise InvalidRequestError(f"stop string {_shown(text)} must have 1 to {MAX_STOP_LENGTH} characters")
        _sequence("stop_token_ids", self.stop_token_ids, "token ids", MAX_STOP_TOKEN_IDS)
        for token_id in self.stop_token_ids:
            _integer("stop_token_ids", token_id, 0, 2**31 - 1)


# Exact types: a bool is no number here, and subclasses (numpy scalars among them) cannot be put into a frame.
def _real(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    # Written so that NaN fails: every comparison with it is false.
    if type(value) in (int, float) and (low < value if open_low else low <= value) and value <= high:  # type: ignore[operator]
        return
    raise InvalidRequestError(
        f"{name} ({_shown(value)}) must be a number in {'(' if open_low else '['}{low:g}, {high:g}]"
    )


def _integer(name: str, value: object, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise InvalidRequestError(f"{name} ({_shown(value)}) must be an integer from {low} to {high}")


def _sequence(name: str, value: object, items: str, limit: int) -> None:
    if type(value) not in (list, tuple):
        hint = f"the string {_shown(value)}; use [{_shown(value)}]" if isinstance(value, str) else _shown(value)
        raise InvalidRequestError(f"{name} must be a sequence of {items}, got {hint}")
    _count(name, len(value), limit)  # type: ignore[arg-type]


def _count(name: str, count: int, limit: int) -> None:
    if count > limit:
        raise InvalidRequestError(f"{name} has {count} entries; at most {limit} are allowed")


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(value: object) -> str:
    """The value in a message; the repr of anything larger may be huge, or fail (integers of 4300 digits)."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    is_plain = value is None or isinstance(value, int | float | str)
    return f"{value!a:.80}" if is_plain else f"a {type(value).__name__}"

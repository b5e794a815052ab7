"""Counters and latency histograms of the controller: plain integers that `deploy/metrics.py` exposes."""

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

# Bucket bounds in seconds: OpenTelemetry semantic conventions for generative AI metrics.
TIME_TO_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
TIME_PER_OUTPUT_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
REQUEST_DURATION = tuple(0.01 * 2**n for n in range(14))


class Histogram:
    """Counts of observed values per bucket; the last bucket is unbounded."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count a value (seconds) in the first bucket whose bound is not below it."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


@dataclass(slots=True)
class Meters:
    """Everything the controller counts; cumulative since it started.

    Attributes:
        finished: choices by finish reason.
        rejected: requests refused, by reason.
        migrations: jobs taken off a replica and queued again, by cause.
        fenced: messages dropped, by the check that dropped them.
        losses: incarnations lost, by cause.
    """

    time_to_first_token_s: Histogram = field(default_factory=lambda: Histogram(TIME_TO_FIRST_TOKEN))
    time_per_output_token_s: Histogram = field(default_factory=lambda: Histogram(TIME_PER_OUTPUT_TOKEN))
    request_duration_s: Histogram = field(default_factory=lambda: Histogram(REQUEST_DURATION))
    prompt_tokens: int = 0
    output_tokens: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    migrations: Counter[str] = field(default_factory=Counter)
    fenced: Counter[str] = field(default_factory=Counter)
    losses: Counter[str] = field(default_factory=Counter)

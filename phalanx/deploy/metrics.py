"""The Prometheus endpoint of the controller.

The runtime keeps plain integers; one collector turns them into metric families when somebody asks. No multiprocess
mode, no registry shared with anybody else, and it listens where it is told and nowhere else.
"""

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, disable_created_metrics, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from phalanx.deploy.server.addresses import bind_error, split_address
from phalanx.runtime.controller.core import Core
from phalanx.runtime.controller.meters import Histogram
from phalanx.runtime.controller.replicas import Replica
from phalanx.runtime.frames import Heartbeat

GAUGES: Mapping[str, tuple[str, Callable[[Heartbeat], float]]] = {
    "phalanx_num_requests_running": ("Sequences in the running batch.", lambda beat: beat.num_running),
    "phalanx_num_requests_waiting": ("Sequences waiting in the engine.", lambda beat: beat.num_waiting),
    "phalanx_kv_blocks_total": ("KV blocks of all dp ranks.", lambda beat: beat.num_total_blocks),
    "phalanx_kv_cache_usage_ratio": (
        "Share of the KV blocks in use.",
        lambda beat: 1 - beat.num_free_blocks / beat.num_total_blocks if beat.num_total_blocks else 0.0,
    ),
    "phalanx_moe_single_experts": (
        "Experts with one copy, where a lost rank should only shrink the group.",
        lambda beat: beat.num_single_experts,
    ),
    "phalanx_moe_balancedness_ratio": (
        "Mean over largest load of the expert ranks; 1 = even.",
        lambda beat: (
            sum(beat.expert_load) / len(beat.expert_load) / max(beat.expert_load) if any(beat.expert_load) else 1.0
        ),
    ),
}
COUNTERS: Mapping[str, tuple[str, Callable[[Heartbeat], float]]] = {
    "phalanx_prefix_cache_queries": ("Prompt tokens looked up in the prefix cache.", lambda beat: beat.prefix_queries),
    "phalanx_prefix_cache_hits": ("Prompt tokens found in the prefix cache.", lambda beat: beat.prefix_hits),
    "phalanx_preemptions": ("Sequences put back into the queue.", lambda beat: beat.num_preemptions),
    "phalanx_engine_prompt_tokens": ("Prompt tokens computed.", lambda beat: beat.num_prompt_tokens),
    "phalanx_engine_generated_tokens": ("Tokens sampled.", lambda beat: beat.num_generated_tokens),
    "phalanx_moe_dropped_choices": ("Choices of an expert dropped by a capacity limit.", lambda beat: beat.num_dropped),
    "phalanx_moe_moved_experts": ("Experts that changed their slot while serving.", lambda beat: beat.num_moved),
}


class ControllerCollector(Collector):
    """Metric families of one controller; `core` is read when they are collected.

    Called from the endpoint's thread while the event loop goes on: every container is copied in one atomic operation.
    Engine counters run from the start of an incarnation and begin again with the next, as Prometheus expects.
    """

    def __init__(self, core: Core, model: str) -> None:
        self._core = core
        self._model = model

    def collect(self) -> Iterator[Metric]:
        """All families."""
        yield from self._engines()
        yield from self._latencies()
        yield from self._reliability()

    def _engines(self) -> Iterator[Metric]:
        replicas = [self._core.replicas[number] for number in sorted(self._core.replicas)]
        beats = [(replica, replica.heartbeat) for replica in replicas if replica.heartbeat is not None]
        for families, kind in ((GAUGES, GaugeMetricFamily), (COUNTERS, CounterMetricFamily)):
            for name, (text, value) in families.items():
                family = kind(name, text, labels=("replica", "model"))
                for replica, beat in beats:
                    family.add_metric(self._labels(replica), value(beat))
                yield family
        block_size = GaugeMetricFamily(
            "phalanx_kv_block_size_tokens", "Tokens per KV block.", labels=("replica", "model")
        )
        startup = GaugeMetricFamily(
            "phalanx_startup_phase_seconds", "Duration of a start-up phase.", labels=("replica", "model", "phase")
        )
        up = GaugeMetricFamily("phalanx_replica_up", "1 while the replica serves.", labels=("replica", "model"))
        for replica in replicas:
            up.add_metric(self._labels(replica), replica.state == "ready")
            if replica.hello is not None:
                block_size.add_metric(self._labels(replica), replica.hello.block_size)
                for phase, seconds in sorted(replica.hello.startup_s.items()):
                    startup.add_metric([*self._labels(replica), phase], seconds)
        yield from (block_size, startup, up)

    def _latencies(self) -> Iterator[Metric]:
        meters = self._core.meters
        for name, text, histogram in (
            ("time_to_first_token", "From submit to the first token.", meters.time_to_first_token_s),
            ("time_per_output_token", "Between the tokens of a choice, mean.", meters.time_per_output_token_s),
            ("request_duration", "From submit to the end of a request.", meters.request_duration_s),
        ):
            family = HistogramMetricFamily(f"phalanx_{name}_seconds", text, labels=("model",))
            family.add_metric([self._model], buckets=_buckets(histogram), sum_value=histogram.total)
            yield family

    def _reliability(self) -> Iterator[Metric]:
        meters = self._core.meters
        queue = GaugeMetricFamily("phalanx_queue_jobs", "Jobs waiting for a replica.", labels=("model",))
        queue.add_metric([self._model], len(self._core.queue))
        yield queue
        for name, text, value in (
            ("prompt_tokens", "Prompt tokens of accepted requests.", meters.prompt_tokens),
            ("output_tokens", "Tokens appended to outputs.", meters.output_tokens),
        ):
            plain = CounterMetricFamily(f"phalanx_{name}", text, labels=("model",))
            plain.add_metric([self._model], value)
            yield plain
        for name, label, text, counts in (
            ("finished_choices", "reason", "Choices that have ended.", meters.finished),
            ("rejected", "reason", "Requests refused.", meters.rejected),
            ("migrations", "reason", "Jobs taken off a replica and placed again.", meters.migrations),
            ("fenced_messages", "kind", "Messages dropped by a fence.", meters.fenced),
            ("replica_restarts", "cause", "Incarnations lost.", meters.losses),
        ):
            family = CounterMetricFamily(f"phalanx_{name}", text, labels=("model", label))
            for key, count in sorted(counts.copy().items()):
                family.add_metric([self._model, key], count)
            yield family

    def _labels(self, replica: Replica) -> list[str]:
        return [str(replica.replica), self._model]


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    # Prometheus counts from the left: every bucket holds those before it.
    total, buckets = 0, []
    for bound, count in zip([*map(str, histogram.bounds), "+Inf"], histogram.counts, strict=True):
        total += count
        buckets.append((bound, float(total)))
    return buckets


class MetricsServer:
    """Serves `/metrics` from a thread of its own.

    Args:
        address: host:port; port 0 = any free one.

    Raises:
        ConfigError: the address cannot be had.
    """

    def __init__(self, address: str, core: Core, model: str) -> None:
        disable_created_metrics()
        registry = CollectorRegistry(auto_describe=False)
        registry.register(ControllerCollector(core, model))
        host, port = split_address(address)
        try:
            self._server, self._thread = start_http_server(port, addr=host, registry=registry)
        except OSError as error:
            raise bind_error(address) from error

    @property
    def port(self) -> int:
        """The port it listens on."""
        return self._server.server_port

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

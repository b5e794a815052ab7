"""The Prometheus endpoint, read back with Prometheus' own parser (about 2 s)."""

import json
import socket
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from phalanx.deploy.metrics import MetricsServer
from phalanx.errors import ConfigError, OverloadedError
from phalanx.runtime.controller.meters import TIME_TO_FIRST_TOKEN, Histogram
from phalanx.runtime.sampling_params import SamplingParams
from tests.deploy.fake_engine import Service, serving

REPLICA = {"replica": "0", "model": "tiny"}
NAMES = """
phalanx_num_requests_running phalanx_num_requests_waiting phalanx_kv_cache_usage_ratio phalanx_kv_blocks_total
phalanx_kv_block_size_tokens phalanx_prefix_cache_hits phalanx_prefix_cache_queries phalanx_preemptions
phalanx_startup_phase_seconds phalanx_time_to_first_token_seconds phalanx_time_per_output_token_seconds
phalanx_request_duration_seconds phalanx_migrations phalanx_fenced_messages phalanx_replica_restarts phalanx_rejected
"""


def scrape(service: Service) -> dict[tuple[str, str], float]:
    """(sample name, labels as JSON) -> value."""
    with urllib.request.urlopen(f"http://127.0.0.1:{service.ports.metrics}/metrics") as reply:
        text = reply.read().decode()
    families = list(text_string_to_metric_families(text))
    assert set(NAMES.split()) <= {family.name for family in families}
    samples = [sample for family in families for sample in family.samples]
    assert not any(sample.name.endswith("_created") for sample in samples)
    assert not any("request_id" in sample.labels for sample in samples)
    return {(sample.name, json.dumps(sample.labels, sort_keys=True)): sample.value for sample in samples}


def key(name: str, **labels: str) -> tuple[str, str]:
    return f"phalanx_{name}", json.dumps(labels, sort_keys=True)


def test_scrape(tmp_path: Path) -> None:
    with serving(tmp_path, metrics_listen="127.0.0.1:0", core={"max_queue": 1}) as service, service.client() as client:
        client.submit([1], SamplingParams(max_tokens=2), request_id="queued")
        with pytest.raises(OverloadedError):
            client.submit([1], SamplingParams(max_tokens=2))
        before = scrape(service)
        assert before[key("queue_jobs", model="tiny")] == 1
        assert before[key("rejected_total", model="tiny", reason="queue_full")] == 1
        engine = service.engine()
        service.wait_until(lambda: service.core.replicas[0].heartbeat is not None)
        list(client.generate([1, 2, 3], SamplingParams(max_tokens=20)))
        list(client.stream("queued"))
        service.run(engine.drop_link())
        service.wait_until(lambda: service.core.meters.losses)
        after = scrape(service)
    assert after[key("kv_blocks_total", **REPLICA)] == 100
    assert after[key("kv_block_size_tokens", **REPLICA)] == 16
    assert 0 <= after[key("kv_cache_usage_ratio", **REPLICA)] < 1
    assert after[key("prefix_cache_queries_total", **REPLICA)] == 40
    assert after[key("prefix_cache_hits_total", **REPLICA)] == 10
    assert after[key("preemptions_total", **REPLICA)] == 2
    assert after[key("startup_phase_seconds", phase="load", **REPLICA)] == 0.5
    assert after[key("replica_up", **REPLICA)] == 0
    assert after[key("replica_restarts_total", model="tiny", cause="link")] == 1
    assert after[key("prompt_tokens_total", model="tiny")] == 4
    assert after[key("output_tokens_total", model="tiny")] == 22
    assert after[key("finished_choices_total", model="tiny", reason="length")] == 2
    for name in ("time_to_first_token", "time_per_output_token", "request_duration"):
        assert after[key(f"{name}_seconds_count", model="tiny")] == 2
        assert after[key(f"{name}_seconds_bucket", model="tiny", le="+Inf")] == 2
        assert after[key(f"{name}_seconds_sum", model="tiny")] > 0


def test_listens_where_it_is_told_only(tmp_path: Path) -> None:
    with serving(tmp_path, metrics_listen="127.0.0.2:0") as service:
        assert service.ports.metrics is not None
        with pytest.raises(OSError, match="refused"), socket.create_connection(("127.0.0.1", service.ports.metrics), 1):
            pass
        with pytest.raises(ConfigError, match="Address already in use"):
            MetricsServer(f"127.0.0.2:{service.ports.metrics}", service.core, "tiny")


def test_histogram_buckets() -> None:
    histogram = Histogram(TIME_TO_FIRST_TOKEN)
    for value in (0.0, 0.001, 0.0011, 10.0, 10.1):
        histogram.observe(value)
    assert histogram.counts[:2] == [2, 1]  # a bound belongs to the bucket below it
    assert histogram.counts[-2:] == [1, 1]
    assert sum(histogram.counts) == 5

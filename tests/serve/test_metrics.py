"""The metrics at /metrics and their values."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from dance_jax.engine.report import EngineReport
from dance_jax.engine.sequence import OutputDelta
from dance_jax.models.counters import Moved, PeerCounters, Sums
from dance_jax.serve.app import ServeInfo
from dance_jax.serve.queue import ClientQueueFull, QueueFull, Unavailable
from tests.serve.scripted import MODEL, ScriptedQueue, client

REPORT = EngineReport(
    steps=10,
    running=3,
    waiting=2,
    kv_blocks=40,
    kv_blocks_used=10,
    preemptions=1,
    prefix_queries=100,
    prefix_hits=60,
    shares_prefixes=False,
    state_bytes_used=3000,
    prompt_tokens=70,
    generation_tokens=30,
    calls_local=300,
    calls_remote=100,
    transfers=55,
    bytes_sent=[0, 1000],
    bytes_received=[0, 2000],
    experts_resident=20,
    step_seconds={"compute": 1.5, "wait": 0.25},
    cpu_seconds=1.25,
    longest_step_s=0.5,
    rows=90,
    busiest_rows=40,
    positions=1234,
    masks=9,
    mask_seconds=0.25,
    bucket_steps={"4+0": 7, "16+1": 3},
    calls_served=350,
    sums=Sums(layers_waited=8, rows_away=45),
    spare_slots=5,
)
#: (name, other labels ordered by name) -> value
EXPECTED = {
    ("num_requests_running",): 3,
    ("num_requests_waiting",): 2,
    ("kv_cache_usage_perc",): 0.25,
    ("longest_step_seconds",): 0.5,
    ("num_preemptions_total",): 1,
    ("prefix_cache_enabled",): 0,
    ("state_bytes",): 3000,
    ("prefix_cache_queries_total",): 100,
    ("prefix_cache_hits_total",): 60,
    ("prompt_tokens_total",): 70,
    ("generation_tokens_total",): 30,
    ("attended_positions_total",): 1234,
    ("sampling_masks_total",): 9,
    ("sampling_mask_seconds_total",): 0.25,
    ("local_share",): 0.75,
    ("expert_calls_total", "local"): 300,
    ("expert_calls_total", "remote"): 100,
    ("transfers_total",): 55,
    ("busiest_transfers_total",): 40,
    ("layers_waited_total",): 8,
    ("token_layers_away_total",): 45,
    ("expert_calls_served_total",): 350,
    ("bucket_steps_total", "4+0"): 7,
    ("bucket_steps_total", "16+1"): 3,
    ("link_bytes_total", "sent", "beta"): 1000,
    ("link_bytes_total", "received", "beta"): 2000,
    ("experts_resident",): 20,
    ("spare_slots",): 5,
    ("steps_total",): 10,
    ("engine_cpu_seconds_total",): 1.25,
    ("step_seconds_total", "compute"): 1.5,
    ("step_seconds_total", "wait"): 0.25,
}
#: Metrics that exist only if servers step on their own.
CALLS = {
    ("peer_calls_total", "beta"): 11,
    ("peer_rows_total", "beta"): 12,
    ("peer_repeats_total", "beta"): 15,
    ("peer_refusals_total", "beta"): 16,
    ("peer_lost_total", "beta"): 17,
    ("peer_failed_rows_total", "beta"): 18,
    ("peer_waited_seconds_total", "beta"): 1.5,
    ("peer_answered_total", "beta"): 20,
    ("peer_answered_rows_total", "beta"): 21,
    ("peer_queued_seconds_total", "beta"): 0.25,
    ("calls_served_seconds_total",): 0.75,
    ("calls_served_batches_total",): 13,
    ("failed_sequences_total",): 6,
    ("stalled_sequences",): 2,
}
FRONT_END = {
    ("requests_in_flight",): 0,
    ("engine_restarts_total",): 0,
    ("http_connections",): 0,
    ("http_connections_refused_total", "too_many"): 0,
    ("http_connections_refused_total", "late"): 0,
    ("placement_version",): 1,
    ("placement_decisions_total",): 0,
    ("migrations_total",): 0,
    ("migration_failures_total",): 0,
    ("experts_migrated_total",): 0,
}


def scraped(
    queue: ScriptedQueue, info: ServeInfo, http: Any = None
) -> dict[tuple[str, ...], float]:
    """(name without prefix, labels except the model's ...) -> value, of everything at /metrics."""
    answer = (http or client(queue, info)).get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(answer.text):
        assert family.documentation
        for sample in family.samples:
            prefix, _, name = sample.name.partition(":")
            assert prefix == "dance_jax"
            assert sample.labels.pop("model_name") == MODEL
            found[name, *dict(sorted(sample.labels.items())).values()] = sample.value
    return found


def engine_metrics(found: dict[tuple[str, ...], float]) -> dict[tuple[str, ...], float]:
    """The metrics without the histograms and counters of HTTP calls."""
    own = ("request_", "requests_refused", "streams_not_read", "time_to", "inter_token", "e2e")
    return {key: value for key, value in found.items() if not key[0].startswith(own)}


def test_the_engines_report(info: ServeInfo) -> None:
    queue = ScriptedQueue()
    assert engine_metrics(scraped(queue, info)) == FRONT_END
    queue.report, queue.in_flight, queue.restarts = REPORT, 7, 2
    own = {("requests_in_flight",): 7, ("engine_restarts_total",): 2}
    assert engine_metrics(scraped(queue, info)) == EXPECTED | FRONT_END | own


def test_expert_calls(info: ServeInfo) -> None:
    queue = ScriptedQueue()
    peer = PeerCounters(11, 12, 13, 14, 15, 16, 17, 18, 1_500_000_000, 20, 21, 250_000_000)
    report = msgspec.structs.replace(
        REPORT,
        peers=[PeerCounters(), peer],
        sums=dataclasses.replace(
            REPORT.sums, served_s=0.75, served_batches=13, moved=Moved(1, 2, 3, 4, 5, 6)
        ),
        failed_sequences=6,
        stalled=2,
    )
    # Decoded as a report from the engine is.
    plain = msgspec.msgpack.decode(msgspec.msgpack.encode(report))
    queue.report = msgspec.convert(plain, EngineReport)
    assert queue.report == report
    assert engine_metrics(scraped(queue, info)) == EXPECTED | FRONT_END | CALLS


def test_no_calls_have_no_share(info: ServeInfo) -> None:
    queue = ScriptedQueue()
    queue.report = msgspec.structs.replace(REPORT, calls_local=0, calls_remote=0)
    assert math.isnan(scraped(queue, info)["local_share",])


def test_calls_are_counted(info: ServeInfo) -> None:
    queue = ScriptedQueue()
    http = client(queue, info)
    body = {"prompt": ["hi", "hello"], "n": 2, "max_tokens": 5}
    for stream in (False, True):
        assert http.post("/v1/completions", json=body | {"stream": stream}).is_success
    found = scraped(queue, info, http)
    assert found["request_success_total", "length"] == 8
    assert found["request_success_total", "abort"] == 0
    assert found["time_to_first_token_seconds_count",] == 4
    assert found["e2e_request_latency_seconds_count",] == 4
    assert found["inter_token_latency_seconds_count",] == 8 * 4
    assert found["request_time_per_output_token_seconds_count",] == 8
    assert found["request_prompt_tokens_sum",] == 2 * (2 + 5)
    assert found["request_generation_tokens_sum",] == 4 * 10
    assert 0 < found["e2e_request_latency_seconds_sum",] < 600


def test_calls_that_fail_are_counted(info: ServeInfo) -> None:
    def script(request: Any) -> Any:
        yield OutputDelta(request.request_id, 0, token_ids=[5], text="a")
        yield OutputDelta(request.request_id, 0, finish_reason="error", stop_reason="poison")

    queue = ScriptedQueue(script)
    http = client(queue, info)
    assert http.post("/v1/completions", json={"prompt": ["a", "b"]}).status_code == 500
    found = scraped(queue, info, http)
    # The other prompt of the call is aborted.
    assert found["request_success_total", "error"] == 1
    assert found["request_success_total", "abort"] == 1
    assert found["e2e_request_latency_seconds_count",] == 0


def test_refusals_are_counted(info: ServeInfo) -> None:
    for refusal, reason in (
        (QueueFull(), "queue_full"),
        (ClientQueueFull(), "client_queue_full"),
        (Unavailable(), "unavailable"),
    ):
        queue = ScriptedQueue(refusal=refusal)
        http = client(queue, info)
        http.post("/v1/completions", json={"prompt": "a"})
        found = scraped(queue, info, http)
        assert found["requests_refused_total", reason] == 1
        assert sum(value for key, value in found.items() if key[0] == "requests_refused_total") == 1

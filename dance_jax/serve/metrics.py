"""Prometheus metrics: the front end's own counters, and the engine's latest report."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dance_jax.engine.sequence import OutputDelta, Request
from dance_jax.models.counters import PeerCounters, Sums
from dance_jax.serve.queue import REASONS, QueueFull, Unavailable

if TYPE_CHECKING:
    from dance_jax.engine.report import EngineReport
    from dance_jax.serve.placement_state import PlacementState
    from dance_jax.serve.queue import RequestQueue
    from dance_jax.serve.view import Latest

PREFIX = "dance_jax:"
#: Unit suffix of a counter's name -> seconds per unit.
_SECONDS = {"s": 1.0, "ns": 1e-9}

# Upper ends of the histograms' buckets, the same as vLLM's.
_FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_TOKEN_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_TOKENS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))


@dataclasses.dataclass
class HttpConnections:
    """Counts of the HTTP server's connections."""

    #: Open at present.
    open: int = 0
    #: Refused because too many were open.
    refused: int = 0
    #: Closed because the headers of a request did not arrive in time.
    late: int = 0


class Metrics:
    """All metrics of one server.

    Args:
        queue: provides the requests in flight and the engine's report.
        experts: the current placement of experts.
        connections: provides the counts of HTTP connections.
        model: value of the label `model_name` of every metric.
        servers: names of all servers, by rank.
        rank: this server's rank.
        latest: gets the latest latencies.
    """

    def __init__(
        self,
        queue: RequestQueue,
        experts: PlacementState,
        connections: HttpConnections,
        model: str,
        servers: Sequence[str],
        rank: int,
        latest: Latest,
    ) -> None:
        self._model = model
        self.latest = latest
        self._registry = CollectorRegistry()
        self._registry.register(_EngineMetrics(queue, experts, connections, model, servers, rank))
        self.queue_time = self._histogram(
            "request_queue_time_seconds",
            "Time from a request's arrival to its first step",
            _FIRST_TOKEN_S,
        )
        self.first_token = self._histogram(
            "time_to_first_token_seconds",
            "Time from a request's arrival to its first token",
            _FIRST_TOKEN_S,
        )
        self.inter_token = self._histogram(
            "inter_token_latency_seconds",
            "Time between consecutive tokens of a sample",
            _TOKEN_S,
        )
        self.per_token = self._histogram(
            "request_time_per_output_token_seconds",
            "Mean time between consecutive tokens of a finished sample",
            _TOKEN_S,
        )
        self.end_to_end = self._histogram(
            "e2e_request_latency_seconds",
            "Time from a request's arrival to its last token",
            _REQUEST_S,
        )
        self.prompt_tokens = self._histogram(
            "request_prompt_tokens", "Prompt tokens of a finished request", _TOKENS
        )
        self.generation_tokens = self._histogram(
            "request_generation_tokens", "Output tokens of a finished request", _TOKENS
        )
        self._finished = Counter(
            PREFIX + "request_success",
            "Samples finished, by finish reason",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self._refused = Counter(
            PREFIX + "requests_refused",
            "HTTP calls refused by the queue, by reason",
            ["model_name", "reason"],
            registry=self._registry,
        )
        self._not_read = Counter(
            PREFIX + "streams_not_read",
            "Streams ended because their client did not read them",
            ["model_name"],
            registry=self._registry,
        ).labels(model)
        for reason in ("stop", "length", "error", "abort"):
            self._finished.labels(model, reason)
        for reason in REASONS:
            self._refused.labels(model, reason)

    def observe(self, request: Request) -> Observation:
        """Start measuring a request that was submitted just now."""
        return Observation(self, request)

    def finished(self, reason: str, samples: int = 1) -> None:
        """Count finished samples."""
        self._finished.labels(self._model, reason).inc(samples)

    def refused(self, error: QueueFull | Unavailable) -> None:
        """Count a call that the queue refused."""
        self._refused.labels(self._model, error.reason).inc()

    def not_read(self) -> None:
        """Count a stream that was ended because its client did not read it."""
        self._not_read.inc()

    def exposition(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, text: str, bins: Sequence[float]) -> Histogram:
        family = Histogram(
            PREFIX + name, text, ["model_name"], buckets=bins, registry=self._registry
        )
        return family.labels(self._model)


class Observation:
    """Measures one request as its deltas arrive.

    Args:
        metrics: receives the measurements.
        request: a request submitted just now.
    """

    def __init__(self, metrics: Metrics, request: Request) -> None:
        self._metrics = metrics
        self._prompt_tokens = len(request.prompt_token_ids)
        # Convert the arrival from unix time to the monotonic clock, which is never adjusted.
        self._arrival = time.monotonic() - max(0.0, time.time() - request.arrival_time)
        self._running = request.params.n
        self._tokens = 0
        #: Sample -> times of its first and latest token, and its number of tokens.
        self._samples: dict[int, tuple[float, float, int]] = {}

    @property
    def finished(self) -> bool:
        """All samples have ended."""
        return self._running == 0

    def add(self, delta: OutputDelta) -> None:
        """Record a delta that arrived just now."""
        now = time.monotonic()
        if not self._samples and delta.metrics and delta.metrics.first_scheduled_time:
            waited_s = delta.metrics.first_scheduled_time - delta.metrics.arrival_time
            self._metrics.queue_time.observe(max(0.0, waited_s))
        if delta.token_ids:
            self._add_tokens(delta.index, len(delta.token_ids), now)
        if delta.finish_reason is not None:
            self._end_sample(delta.index, delta.finish_reason)
        if delta.finish_reason in ("stop", "length") and self.finished:
            self._metrics.end_to_end.observe(now - self._arrival)
            self._metrics.prompt_tokens.observe(self._prompt_tokens)
            self._metrics.generation_tokens.observe(self._tokens)

    def close(self) -> None:
        """Stop measuring; samples that have not ended count as aborted."""
        if self._running:
            self._metrics.finished("abort", self._running)
        self._running = 0

    def _add_tokens(self, sample: int, count: int, now: float) -> None:
        if not self._samples:
            self._metrics.first_token.observe(now - self._arrival)
            self._metrics.latest.ttft.append(now - self._arrival)
        self._tokens += count
        if sample not in self._samples:
            self._samples[sample] = (now, now, count)
            return
        first, latest, before = self._samples[sample]
        self._metrics.inter_token.observe(now - latest)
        self._metrics.latest.itl.append(now - latest)
        self._samples[sample] = (first, now, before + count)

    def _end_sample(self, sample: int, reason: str) -> None:
        self._running -= 1
        self._metrics.finished(reason)
        first, latest, count = self._samples.get(sample, (0.0, 0.0, 0))
        if count > 1:
            self._metrics.per_token.observe((latest - first) / (count - 1))


class _EngineMetrics(Collector):
    """The engine's latest report, the launcher's placement data and HTTP connections as metrics.

    The report's counters restart at 0 when the engine restarts.
    """

    def __init__(
        self,
        queue: RequestQueue,
        experts: PlacementState,
        connections: HttpConnections,
        model: str,
        servers: Sequence[str],
        rank: int,
    ) -> None:
        self._queue = queue
        self._experts = experts
        self._connections = connections
        self._model = model
        self._servers = servers
        self._rank = rank

    def collect(self) -> Iterable[Metric]:
        yield self._gauge(
            "requests_in_flight", "Requests submitted and not finished", self._queue.in_flight
        )
        yield self._counter("engine_restarts", "Engine restarts", {(): self._queue.restarts})
        yield from self._http()
        yield from self._placement()
        if (report := self._queue.report) is not None:
            yield from self._gauges(report)
            yield from self._counters(report)
            if report.peers:
                yield from self._calls(report)

    def _http(self) -> Iterable[Metric]:
        counts = self._connections
        yield self._gauge("http_connections", "HTTP connections open", counts.open)
        yield self._counter(
            "http_connections_refused",
            "HTTP connections closed without an answer of the API, by reason",
            {("too_many",): counts.refused, ("late",): counts.late},
            ["reason"],
        )

    def _placement(self) -> Iterable[Metric]:
        placement = self._experts
        yield self._gauge(
            "placement_version",
            "Version of the placement of experts; grows with each migration",
            placement.version,
        )
        for name, text, value in (
            ("placement_decisions", "Placement decisions made", placement.decisions),
            ("migrations", "Expert migrations completed", placement.migrations),
            ("migration_failures", "Migrations that failed to load experts", placement.failures),
            ("experts_migrated", "Experts loaded by migrations", placement.experts_migrated),
        ):
            yield self._counter(name, text + ", on all servers", {(): value})
        if (decision := placement.last_decision) is not None:
            for name, text, value in (
                (
                    "present_seconds",
                    "Predicted seconds of expert calls until the next decision if no expert moves",
                    decision.present_seconds,
                ),
                (
                    "expected_seconds",
                    "Predicted seconds of expert calls until the next decision after the move",
                    decision.expected_seconds,
                ),
                (
                    "migration_seconds",
                    "Predicted seconds to load the moved experts",
                    decision.migration_seconds,
                ),
                ("gain", "Share of present_seconds that the move saves", decision.gain),
                ("experts_moved", "Experts that servers must load", decision.experts_moved),
            ):
                if value is not None:
                    yield self._gauge(f"placement_{name}", f"{text} (last decision)", value)

    def _gauges(self, report: EngineReport) -> Iterable[Metric]:
        calls = report.calls_local + report.calls_remote
        used = report.kv_blocks_used / report.kv_blocks if report.kv_blocks else 0.0
        share = report.calls_local / calls if calls else float("nan")
        yield self._gauge("num_requests_running", "Sequences running", report.running)
        yield self._gauge("num_requests_waiting", "Sequences waiting to run", report.waiting)
        yield self._gauge("kv_cache_usage_perc", "Fraction of KV blocks in use (0 to 1)", used)
        yield self._gauge(
            "prefix_cache_enabled",
            "1 if requests share the computation of equal prefixes; 0 for recurrent states",
            float(report.shares_prefixes),
        )
        yield self._gauge(
            "state_bytes",
            "Bytes of recurrent states of running sequences",
            report.state_bytes_used,
        )
        yield self._gauge("local_share", "Fraction of expert calls served locally", share)
        yield self._gauge(
            "experts_resident", "Experts resident on this server", report.experts_resident
        )
        yield self._gauge("spare_slots", "Expert slots that are empty", report.spare_slots)
        yield self._gauge(
            "longest_step_seconds",
            "Longest step of the last ten seconds",
            report.longest_step_s,
        )

    def _counters(self, report: EngineReport) -> Iterable[Metric]:
        for name, text, value in (
            ("num_preemptions", "Sequences preempted for lack of KV blocks", report.preemptions),
            (
                "prefix_cache_queries",
                "Tokens looked up in the prefix cache",
                report.prefix_queries,
            ),
            ("prefix_cache_hits", "Tokens found in the prefix cache", report.prefix_hits),
            ("prompt_tokens", "Prompt tokens computed", report.prompt_tokens),
            ("generation_tokens", "Tokens sampled", report.generation_tokens),
            ("attended_positions", "Positions attended to, over all tokens", report.positions),
            ("transfers", "Hidden states sent to other servers", report.transfers),
            (
                "busiest_transfers",
                "Hidden states over the busiest link of each layer, as far as this server knows",
                report.busiest_rows,
            ),
            (
                "layers_waited",
                "MoE layers, summed over steps, that waited for another server",
                report.sums.layers_waited,
            ),
            (
                "token_layers_away",
                "Tokens with an expert call to another server, summed over MoE layers",
                report.sums.rows_away,
            ),
            (
                "expert_calls_served",
                "Expert calls computed on this server, including those for other servers",
                report.calls_served,
            ),
            (
                "sampling_masks",
                "Tokens whose choice was restricted, by a structured output for example",
                report.masks,
            ),
            (
                "sampling_mask_seconds",
                "Time spent on the masks of these tokens, while the layers were computed",
                report.mask_seconds,
            ),
            ("steps", "Engine steps", report.steps),
            ("engine_cpu_seconds", "CPU time of the engine process", report.cpu_seconds),
        ):
            yield self._counter(name, text, {(): value})
        calls = {("local",): report.calls_local, ("remote",): report.calls_remote}
        yield self._counter(
            "expert_calls", "Expert calls, by where they were served", calls, ["where"]
        )
        links = {"sent": report.bytes_sent, "received": report.bytes_received}
        yield self._counter(
            "link_bytes",
            "Payload bytes sent to and received from each peer",
            {
                (name, direction): amounts[rank]
                for direction, amounts in links.items()
                for rank, name in enumerate(self._servers)
                if name and rank != self._rank
            },
            ["peer", "direction"],
        )
        yield self._counter(
            "bucket_steps",
            "Steps by bucket: compiled decode rows + prefill rows",
            {(bucket,): steps for bucket, steps in report.bucket_steps.items()},
            ["bucket"],
        )
        yield self._counter(
            "step_seconds",
            "Time spent in each part of the steps",
            {(part,): seconds for part, seconds in report.step_seconds.items()},
            ["part"],
        )

    def _calls(self, report: EngineReport) -> Iterable[Metric]:
        """Metrics of expert calls; servers that step together have none."""
        for name, text, value in _explained(report.sums):
            yield self._counter(f"calls_{name}", text, {(): value})
        others = [rank for rank, name in enumerate(self._servers) if name and rank != self._rank]
        metrics = zip(*(_explained(report.peers[rank]) for rank in others), strict=True)
        for metric in metrics:
            (name, text, _), *_ = metric
            values = {
                (self._servers[rank],): value
                for rank, (_, _, value) in zip(others, metric, strict=True)
            }
            yield self._counter(f"peer_{name}", text, values, ["peer"])
        yield self._counter(
            "failed_sequences",
            "Sequences that failed in a step because an expert was unavailable; repeats count",
            {(): report.failed_sequences},
        )
        yield self._gauge(
            "stalled_sequences", "Sequences waiting for an unavailable expert", report.stalled
        )

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, text, labels=["model_name"])
        family.add_metric([self._model], value)
        return family

    def _counter(
        self,
        name: str,
        text: str,
        values: Mapping[tuple[str, ...], float],
        labels: Sequence[str] = (),
    ) -> Metric:
        """One sample for each combination of labels."""
        family = CounterMetricFamily(PREFIX + name, text, labels=["model_name", *labels])
        for combination, value in values.items():
            family.add_metric([self._model, *combination], value)
        return family


def _explained(counters: PeerCounters | Sums) -> Iterator[tuple[str, str, float]]:
    """Name, help text and value of each field that is a metric; times in seconds."""
    for field in dataclasses.fields(counters):
        if text := field.metadata.get("metric"):
            value = getattr(counters, field.name)
            stem, _, unit = field.name.rpartition("_")
            if unit in _SECONDS:
                yield f"{stem}_seconds", text, value * _SECONDS[unit]
            else:
                yield field.name, text, value

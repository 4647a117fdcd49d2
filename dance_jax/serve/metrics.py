"""What Prometheus reads: the front end's own counts, and the engine's latest report."""

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
from dance_jax.serve.queue import QueueFull, Unavailable

if TYPE_CHECKING:
    from dance_jax.engine.report import EngineReport
    from dance_jax.serve.placement_state import PlacementState
    from dance_jax.serve.queue import RequestQueue

PREFIX = "dance_jax:"
#: Of units at the ends of counters' names.
_SECONDS = {"s": 1.0, "ns": 1e-9}

# Upper ends of the histograms' bins: vLLM's.
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


class Metrics:
    """All metrics of one server.

    Args:
        queue: where requests in flight and the engine's report are looked up.
        experts: where they are.
        model: label `model_name` of every metric.
        servers: names of all servers by rank.
        rank: this server's.
    """

    def __init__(
        self,
        queue: RequestQueue,
        experts: PlacementState,
        model: str,
        servers: Sequence[str],
        rank: int,
    ) -> None:
        self._model = model
        self._registry = CollectorRegistry()
        self._registry.register(_EngineMetrics(queue, experts, model, servers, rank))
        self.queue = self._histogram(
            "request_queue_time_seconds", "From arrival to the first step", _FIRST_TOKEN_S
        )
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "From arrival to the first token", _FIRST_TOKEN_S
        )
        self.inter_token = self._histogram(
            "inter_token_latency_seconds", "From token to token of a sample", _TOKEN_S
        )
        self.per_token = self._histogram(
            "request_time_per_output_token_seconds",
            "Mean of a sample's times from token to token",
            _TOKEN_S,
        )
        self.end_to_end = self._histogram(
            "e2e_request_latency_seconds", "From arrival to the last token", _REQUEST_S
        )
        self.prompt_tokens = self._histogram(
            "request_prompt_tokens", "Prompt tokens of a finished request", _TOKENS
        )
        self.generation_tokens = self._histogram(
            "request_generation_tokens", "Output tokens of a finished request", _TOKENS
        )
        self._finished = Counter(
            PREFIX + "request_success",
            "Samples that ended, by reason",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self._refused = Counter(
            PREFIX + "requests_refused",
            "Calls that the queue did not take, by reason",
            ["model_name", "reason"],
            registry=self._registry,
        )
        for reason in ("stop", "length", "error", "abort"):
            self._finished.labels(model, reason)
        for reason in ("queue_full", "unavailable"):
            self._refused.labels(model, reason)

    def observe(self, request: Request) -> Observation:
        """Of a request that was submitted just now."""
        return Observation(self, request)

    def finished(self, reason: str, samples: int = 1) -> None:
        """Samples ended."""
        self._finished.labels(self._model, reason).inc(samples)

    def refused(self, error: QueueFull | Unavailable) -> None:
        """The queue did not take a call."""
        reason = "queue_full" if isinstance(error, QueueFull) else "unavailable"
        self._refused.labels(self._model, reason).inc()

    def exposition(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, text: str, bins: Sequence[float]) -> Histogram:
        family = Histogram(
            PREFIX + name, text, ["model_name"], buckets=bins, registry=self._registry
        )
        return family.labels(self._model)


class Observation:
    """Measures one request as its deltas come.

    Args:
        metrics: where to.
        request: submitted just now.
    """

    def __init__(self, metrics: Metrics, request: Request) -> None:
        self._metrics = metrics
        self._prompt_tokens = len(request.prompt_token_ids)
        # On the clock that is not set: how long ago it arrived is a difference of seconds.
        waited_s = 0.0 if request.arrival_time is None else time.time() - request.arrival_time
        self._arrival = time.monotonic() - max(0.0, waited_s)
        self._running = request.params.n
        self._tokens = 0
        #: Per sample: when its first and its latest token came, and how many there are.
        self._samples: dict[int, tuple[float, float, int]] = {}

    @property
    def finished(self) -> bool:
        """All samples have ended."""
        return self._running == 0

    def add(self, delta: OutputDelta) -> None:
        """A delta came just now."""
        now = time.monotonic()
        if not self._samples and delta.metrics and delta.metrics.first_scheduled_time:
            waited_s = delta.metrics.first_scheduled_time - delta.metrics.arrival_time
            self._metrics.queue.observe(max(0.0, waited_s))
        if delta.token_ids:
            self._add_tokens(delta.index, len(delta.token_ids), now)
        if delta.finish_reason is not None:
            self._end_sample(delta.index, delta.finish_reason)
        if delta.finish_reason in ("stop", "length") and self.finished:
            self._metrics.end_to_end.observe(now - self._arrival)
            self._metrics.prompt_tokens.observe(self._prompt_tokens)
            self._metrics.generation_tokens.observe(self._tokens)

    def close(self) -> None:
        """No more deltas come; samples that have not ended count as aborted."""
        if self._running:
            self._metrics.finished("abort", self._running)
        self._running = 0

    def _add_tokens(self, sample: int, count: int, now: float) -> None:
        if not self._samples:
            self._metrics.first_token.observe(now - self._arrival)
        self._tokens += count
        if sample not in self._samples:
            self._samples[sample] = (now, now, count)
            return
        first, latest, before = self._samples[sample]
        self._metrics.inter_token.observe(now - latest)
        self._samples[sample] = (first, now, before + count)

    def _end_sample(self, sample: int, reason: str) -> None:
        self._running -= 1
        self._metrics.finished(reason)
        first, latest, count = self._samples.get(sample, (0.0, 0.0, 0))
        if count > 1:
            self._metrics.per_token.observe((latest - first) / (count - 1))


class _EngineMetrics(Collector):
    """The engine's latest report as metrics, whose counters begin anew with a new engine; and what
    the launcher says."""

    def __init__(
        self,
        queue: RequestQueue,
        experts: PlacementState,
        model: str,
        servers: Sequence[str],
        rank: int,
    ) -> None:
        self._queue = queue
        self._experts = experts
        self._model = model
        self._servers = servers
        self._rank = rank

    def collect(self) -> Iterable[Metric]:
        yield self._gauge(
            "requests_in_flight", "Requests submitted and not finished", self._queue.in_flight
        )
        yield self._counter("engine_restarts", "Engines started anew", {(): self._queue.restarts})
        yield from self._placement()
        if (report := self._queue.report) is not None:
            yield from self._gauges(report)
            yield from self._counters(report)
            if report.peers:
                yield from self._calls(report)

    def _placement(self) -> Iterable[Metric]:
        placement = self._experts
        yield self._gauge("placement_version", "Grows with each migration", placement.version)
        for name, text, value in (
            ("placement_decisions", "Decisions about placements", placement.decisions),
            ("migrations", "Migrations of experts completed", placement.migrations),
            ("migration_failures", "Migrations that failed to load experts", placement.failures),
            ("experts_migrated", "Experts loaded by migrations", placement.experts_migrated),
        ):
            yield self._counter(name, text + ", on all servers", {(): value})
        if (decision := placement.last_decision) is not None:
            for name, text, value in (
                ("present_seconds", "Seconds to the next one as it is", decision.present_seconds),
                ("expected_seconds", "Seconds as it would be", decision.expected_seconds),
                ("migration_seconds", "Seconds of loading", decision.migration_seconds),
                ("gain", "Share of the present seconds that is saved", decision.gain),
                ("experts_moved", "Experts to load", decision.experts_moved),
            ):
                if value is not None:
                    yield self._gauge(f"placement_{name}", f"{text}, of the last decision", value)

    def _gauges(self, report: EngineReport) -> Iterable[Metric]:
        calls = report.calls_local + report.calls_remote
        used = report.kv_blocks_used / report.kv_blocks if report.kv_blocks else 0.0
        share = report.calls_local / calls if calls else float("nan")
        yield self._gauge("num_requests_running", "Sequences that run", report.running)
        yield self._gauge("num_requests_waiting", "Sequences that wait", report.waiting)
        yield self._gauge("kv_cache_usage_perc", "KV blocks in use, 1 is all", used)
        yield self._gauge(
            "prefix_cache_enabled",
            "1 if requests with the same prefix share its computation, 0 with recurrent states",
            float(report.shares_prefixes),
        )
        yield self._gauge(
            "state_bytes", "Recurrent states of running sequences", report.state_bytes_used
        )
        yield self._gauge("local_share", "Share of expert calls that stay here", share)
        yield self._gauge("experts_resident", "Experts that live here", report.experts_resident)
        yield self._gauge("spare_slots", "Slots that hold no expert", report.spare_slots)
        yield self._gauge("longest_step_seconds", "Of the last ten seconds", report.longest_step_s)

    def _counters(self, report: EngineReport) -> Iterable[Metric]:
        for name, text, value in (
            ("num_preemptions", "Sequences put back for want of KV blocks", report.preemptions),
            ("prefix_cache_queries", "Prompt tokens looked up", report.prefix_queries),
            ("prefix_cache_hits", "Prompt tokens found in the cache", report.prefix_hits),
            ("prompt_tokens", "Prompt tokens computed", report.prompt_tokens),
            ("generation_tokens", "Tokens sampled", report.generation_tokens),
            ("attended_positions", "Positions that tokens attended to", report.positions),
            ("transfers", "Hidden states sent to other servers", report.transfers),
            (
                "busiest_transfers",
                "Hidden states through the busiest link of each layer, as far as known here",
                report.busiest_rows,
            ),
            (
                "layers_waited",
                "MoE layers of steps that waited for another server",
                report.sums.layers_waited,
            ),
            (
                "token_layers_away",
                "Pairs of token and MoE layer with an expert call to another server",
                report.sums.rows_away,
            ),
            (
                "expert_calls_served",
                "Expert calls computed here, also for other servers",
                report.calls_served,
            ),
            ("steps", "Steps", report.steps),
            ("engine_cpu_seconds", "Processor time of the engine", report.cpu_seconds),
        ):
            yield self._counter(name, text, {(): value})
        calls = {("local",): report.calls_local, ("remote",): report.calls_remote}
        yield self._counter("expert_calls", "Expert calls by where they went", calls, ["where"])
        links = {"sent": report.bytes_sent, "received": report.bytes_received}
        yield self._counter(
            "link_bytes",
            "Payload to and from each other server",
            {
                (name, direction): amounts[rank]
                for direction, amounts in links.items()
                for rank, name in enumerate(self._servers)
                if rank != self._rank
            },
            ["peer", "direction"],
        )
        yield self._counter(
            "bucket_steps",
            "Steps by rows of decodes and of prompts that were compiled for them",
            {(bucket,): steps for bucket, steps in report.bucket_steps.items()},
            ["bucket"],
        )
        yield self._counter(
            "step_seconds",
            "Time in each part of the steps",
            {(part,): seconds for part, seconds in report.step_seconds.items()},
            ["part"],
        )

    def _calls(self, report: EngineReport) -> Iterable[Metric]:
        """Of expert calls: none of these exist where servers step together."""
        for name, text, value in _explained(report.sums):
            yield self._counter(f"calls_{name}", text, {(): value})
        others = [rank for rank in range(len(self._servers)) if rank != self._rank]
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
            "Sequences that failed in a step for want of an expert, each time anew",
            {(): report.failed_sequences},
        )
        yield self._gauge(
            "stalled_sequences", "Sequences that wait for a missing expert", report.stalled
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
    """Name, text and value of the fields that are metrics; times in seconds."""
    for field in dataclasses.fields(counters):
        if text := field.metadata.get("metric"):
            value = getattr(counters, field.name)
            stem, _, unit = field.name.rpartition("_")
            if unit in _SECONDS:
                yield f"{stem}_seconds", text, value * _SECONDS[unit]
            else:
                yield field.name, text, value

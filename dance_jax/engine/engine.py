"""The engine of one server: requests in, tokens out, one step at a time with all other servers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
import numpy as np

from dance_jax.config import ClusterSpec, EngineConfig
from dance_jax.engine.compile_cache import CompileCache
from dance_jax.engine.detokenizer import Decoder
from dance_jax.engine.output import RequestTracker, SampledToken
from dance_jax.engine.route_sample import RouteSample
from dance_jax.engine.runner import Runner
from dance_jax.engine.scheduler import Row, Scheduler, StepPlan
from dance_jax.engine.sequence import OutputDelta, Request
from dance_jax.engine.step import Extras, Outcome
from dance_jax.models.checkpoint import Checkpoint
from dance_jax.models.messages import Transport
from dance_jax.placement.core import Layout, Placement, spread

#: Called with (stage, parts done, parts in all).
Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What one step brought."""

    outputs: list[OutputDelta]
    #: Some server had work in this step; when none had, all servers may rest.
    active: bool


class EngineStats(msgspec.Struct):
    """What one server counted since its start; plain types, to cross processes."""

    #: [l][e] expert calls of this server's tokens.
    counts: list[list[int]]
    #: [l][n] hidden states sent to each server.
    transfers: list[list[int]]
    #: [n] payload bytes sent to each server.
    bytes_sent: list[int]
    #: Tokens computed, prompt and output.
    tokens: int
    steps: int
    #: [tokens][l][k] experts chosen by a random sample of the tokens.
    routes: list[list[list[int]]]
    #: Bytes of the live expert pool of each device.
    pool_bytes: list[int]


def whole_model(checkpoint: Checkpoint) -> Layout:
    """One server with one device that holds every expert."""
    config = checkpoint.config
    shape = (1, len(config.moe_layers), config.num_experts)
    return spread(Placement(np.ones(shape, bool)), [1], [shape[1] * shape[2]])


class Engine:
    """Schedules, runs and finishes the requests of one server.

    Args:
        checkpoint: the converted model.
        tokenizer: its tokenizer.
        cluster: all servers, or None for this process alone.
        rank: this server's position among them.
        layout: where every expert is; None (alone): all of them here.
        config: equal on all servers.
        compile_cache: keeps compiled steps between starts.
        transport: carries rows between servers, e.g. from links_cpu.connect; None: collectives.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        tokenizer: Decoder,
        cluster: ClusterSpec | None,
        rank: int,
        layout: Layout | None,
        config: EngineConfig,
        compile_cache: CompileCache | None = None,
        transport: Transport | None = None,
    ):
        model = checkpoint.config
        self.layout = layout or whole_model(checkpoint)
        devices = (1,) if cluster is None else cluster.devices
        if self.layout.devices != devices:
            raise ValueError(f"layout for devices {self.layout.devices}, cluster has {devices}")
        self.rank, self.config = rank, config
        self.runner = Runner(
            model,
            checkpoint.trunk(config.dtype),
            lambda pairs: checkpoint.experts(pairs, config.dtype),
            self.layout,
            rank,
            config,
            compile_cache or CompileCache(None),
            transport,
        )
        self.scheduler = Scheduler(config, devices[rank])
        self.tracker = RequestTracker(
            tokenizer,
            config.max_model_len,
            model.vocab_size,
            model.eos_token_ids,
            config.seed,
            rank,
        )
        layers, servers = len(model.moe_layers), len(devices)
        self.steps = self.tokens = 0
        self._transfers = np.zeros((layers, servers), np.int64)
        self._bytes_sent = np.zeros(servers, np.int64)
        self._routes = RouteSample(config.route_sample, (layers, model.top_k), seed=rank)
        self._refused: list[OutputDelta] = []

    def warmup(self, progress: Progress = lambda stage, done, total: None) -> None:
        """Compiles every bucket and runs each once, together with all other servers."""
        buckets = self.runner.buckets
        for done, bucket in enumerate(buckets):
            progress("compiling", done, len(buckets))
            self.runner.compile(bucket)
        progress("compiling", len(buckets), len(buckets))
        empty = ((),) * self.scheduler.devices
        for bucket in buckets:
            self.runner.run(StepPlan(*bucket, empty), active=False)

    def add(self, request: Request) -> None:
        """Queue a request; one that cannot run ends with finish_reason "error" in the next step."""
        sequences, refused = self.tracker.open(request)
        self._refused += refused
        for sequence in sequences:
            self.scheduler.add(sequence)

    def step(self) -> StepResult:
        """Schedule, run with all servers, and hand out what was sampled.

        Every server must call it equally often; one without work takes part with padding.
        """
        plan = self.scheduler.schedule()
        outcomes, extras = self.runner.run(plan, active=not plan.empty)
        self.scheduler.commit(plan)
        outputs, self._refused = self._refused, []
        for sampled in self._sampled(plan, outcomes, extras):
            outputs += self._append(*sampled)
        self._record(plan, outcomes[0], extras)
        return StepResult(outputs, bool(outcomes[0].active))

    def abort_all(self) -> None:
        """Ends all requests; steps go on until no server has work."""
        for sequence in self.scheduler.abort():
            self._refused.append(self.tracker.end(sequence, "abort"))

    def stats(self) -> EngineStats:
        return EngineStats(
            counts=self.runner.counts().tolist(),
            transfers=self._transfers.tolist(),
            bytes_sent=self._bytes_sent.tolist(),
            tokens=self.tokens,
            steps=self.steps,
            routes=self._routes.kept.tolist(),
            pool_bytes=self.runner.pool_bytes(),
        )

    def _sampled(
        self, plan: StepPlan, outcomes: list[Outcome], extras: Extras
    ) -> Iterable[tuple[Row, SampledToken]]:
        rows = [row for device in plan.entries for row in device if row.sample]
        top: list[Any] = [None] * len(outcomes)
        if any(row.sequence.params.logprobs is not None for row in rows):
            tokens = self.runner.read(extras.top_token)
            top = list(zip(tokens, self.runner.read(extras.top_logprob), strict=True))
        for device, outcome, most_likely in zip(plan.entries, outcomes, top, strict=True):
            for row in device:
                if not row.sample:
                    continue
                sampled = SampledToken(
                    int(outcome.token[row.index]),
                    float(outcome.logprob[row.index]),
                    int(outcome.rank[row.index]),
                )
                if most_likely is not None and row.sequence.params.logprobs is not None:
                    tokens, logprobs = (part[row.index].tolist() for part in most_likely)
                    sampled = dataclasses.replace(sampled, top_tokens=tokens, top_logprobs=logprobs)
                yield row, sampled

    def _append(self, row: Row, sampled: SampledToken) -> list[OutputDelta]:
        delta = self.tracker.append(row.sequence, sampled)
        if delta.finish_reason is not None:
            self.scheduler.finish(row.sequence)
        return [delta]

    def _record(self, plan: StepPlan, outcome: Outcome, extras: Extras) -> None:
        self.steps += 1
        self.tokens += plan.num_tokens
        self._transfers += outcome.rows[:, self.rank]
        self._bytes_sent += outcome.sent.sum(0)
        if self._routes.wanted and not plan.empty:
            for device, routes_rclk in zip(
                plan.entries, self.runner.read(extras.routes), strict=True
            ):
                for row in device:
                    self._routes.add(routes_rclk[row.index, : len(row.tokens)])

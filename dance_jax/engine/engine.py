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
from dance_jax.engine.kv_cache import num_blocks
from dance_jax.engine.output import RequestTracker, SampledToken
from dance_jax.engine.route_sample import RouteSample
from dance_jax.engine.runner import Runner
from dance_jax.engine.scheduler import Row, Scheduler, StepPlan
from dance_jax.engine.sequence import OutputDelta, Request
from dance_jax.engine.step import DECODING, IDLE, Extras, Outcome, token_slice
from dance_jax.engine.step_clock import StepClock
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


class EngineReport(msgspec.Struct):
    """What one server does, in a few numbers; counters are since its start."""

    steps: int
    #: Sequences.
    running: int
    waiting: int
    #: KV blocks of all devices, and those that running sequences hold.
    kv_blocks: int
    kv_blocks_used: int
    preemptions: int
    #: Tokens looked up in the prefix cache, and found there.
    prefix_queries: int
    prefix_hits: int
    #: Tokens of prompts computed, and tokens sampled.
    prompt_tokens: int
    generation_tokens: int
    #: Expert calls of this server's tokens, by where they were served.
    calls_local: int
    calls_remote: int
    #: Hidden states sent to other servers.
    transfers: int
    #: Payload bytes to and from each server, by rank.
    bytes_sent: list[int]
    bytes_received: list[int]
    experts_resident: int
    #: Seconds in each part of the steps; see `step_clock.StepClock`.
    step_seconds: dict[str, float]


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
        free_memory: bytes of each device's memory that nothing uses, before anything is loaded
            there; None: enough.
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
        free_memory: int | None = None,
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
            num_blocks(model, config, free_memory),
            compile_cache or CompileCache(None),
            transport,
        )
        self.scheduler = Scheduler(config, devices[rank], self.runner.blocks)
        self.tracker = RequestTracker(
            tokenizer,
            config.max_model_len,
            model.vocab_size,
            model.eos_token_ids,
            config.seed,
            rank,
        )
        layers, servers = len(model.moe_layers), len(devices)
        self.steps = self.tokens = self.prompt_tokens = self.generation_tokens = 0
        self.clock = StepClock(servers)
        self._work = IDLE
        self._transfers = np.zeros((layers, servers), np.int64)
        self._bytes = np.zeros((servers, servers), np.int64)
        self._routes = RouteSample(config.route_sample, (layers, model.top_k), seed=rank)
        #: Deltas that the next step hands out beside its own.
        self._pending: list[OutputDelta] = []

    @property
    def has_work(self) -> bool:
        """Requests wait or run here, or something is to be handed out."""
        return self.scheduler.active or bool(self._pending)

    def warmup(self, progress: Progress = lambda stage, done, total: None) -> None:
        """Compiles every bucket and runs each once, together with all other servers."""
        buckets = self.config.buckets
        for done, bucket in enumerate(buckets):
            progress("compiling", done, len(buckets))
            self.runner.compile(bucket)
        progress("compiling", len(buckets), len(buckets))
        empty = ((),) * self.scheduler.devices
        for bucket in buckets:
            self.runner.run(StepPlan(*bucket, empty), work=IDLE)
        self.clock = StepClock(self.runner.topology.num_servers)

    def add(self, request: Request) -> None:
        """Queue a request; one that cannot run ends with finish_reason "error" in the next step."""
        sequences, refused = self.tracker.open(request)
        self._pending += refused
        for sequence in sequences:
            self.scheduler.add(sequence)

    def abort(self, request_id: str | None = None) -> None:
        """Ends a request, or all; the next step says so. An unknown one has ended already."""
        for sequence in self.scheduler.abort(request_id):
            self._pending.append(self.tracker.end(sequence, "abort"))

    def step(self) -> StepResult:
        """Schedule, run with all servers, and hand out what was sampled.

        Every server must call it equally often; one without work takes part with padding.
        """
        with self.clock.part("schedule"):
            plan = self.scheduler.schedule(others_decode=self._work == DECODING)
            for row in (row for rows in plan.entries for row in rows if row.index >= plan.decode):
                self.tracker.scheduled(row.sequence)
        with self.clock.computing():
            outcomes, extras = self.runner.run(plan)
        with self.clock.part("output"):
            self.scheduler.commit(plan)
            outputs, self._pending = self._pending, []
            for sampled in self._sampled(plan, outcomes, extras):
                outputs.append(self._append(*sampled))
            self._record(plan, outcomes[0], extras)
        return StepResult(outputs, self._work != IDLE)

    def stats(self) -> EngineStats:
        return EngineStats(
            counts=self.runner.counts().tolist(),
            transfers=self._transfers.tolist(),
            bytes_sent=self._bytes[self.rank].tolist(),
            tokens=self.tokens,
            steps=self.steps,
            routes=self._routes.kept.tolist(),
            pool_bytes=self.runner.pool_bytes(),
        )

    def report(self) -> EngineReport:
        counts_le = self.runner.counts()
        resident_le = self.layout.slot_of[self.rank] >= 0
        scheduler = self.scheduler
        return EngineReport(
            steps=self.steps,
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            kv_blocks=scheduler.num_blocks,
            kv_blocks_used=scheduler.blocks_used,
            preemptions=scheduler.preemptions,
            prefix_queries=scheduler.prefix_queries,
            prefix_hits=scheduler.prefix_hits,
            prompt_tokens=self.prompt_tokens,
            generation_tokens=self.generation_tokens,
            calls_local=int(counts_le[resident_le].sum()),
            calls_remote=int(counts_le[~resident_le].sum()),
            transfers=int(self._transfers.sum()),
            bytes_sent=self._bytes[self.rank].tolist(),
            bytes_received=self._bytes[:, self.rank].tolist(),
            experts_resident=int(resident_le.sum()),
            step_seconds=self.clock.seconds(),
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

    def _append(self, row: Row, sampled: SampledToken) -> OutputDelta:
        delta = self.tracker.append(row.sequence, sampled)
        if delta.finish_reason is not None:
            self.scheduler.finish(row.sequence)
        return delta

    def _record(self, plan: StepPlan, outcome: Outcome, extras: Extras) -> None:
        self.steps += 1
        self.tokens += plan.num_tokens
        self._work = int(outcome.work)
        rows = [row for device in plan.entries for row in device]
        decoded = sum(row.index < plan.decode for row in rows)
        self.prompt_tokens += plan.num_tokens - decoded
        self.generation_tokens += sum(row.sample for row in rows)
        self._transfers += outcome.rows[:, self.rank]
        self._bytes += outcome.bytes.sum(0)
        if self._routes.wanted and not plan.empty:
            for device, routes_tlk in zip(
                plan.entries, self.runner.read(extras.routes), strict=True
            ):
                for row in device:
                    self._routes.add(routes_tlk[token_slice(plan.bucket, self.config, row)])

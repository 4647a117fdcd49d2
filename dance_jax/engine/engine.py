"""The engine of one server: turns requests into tokens, one step at a time."""

from __future__ import annotations

import collections
import dataclasses
import functools
import threading
import time
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from dance_jax.config import ClusterSpec, EngineConfig, ProgressCallback
from dance_jax.engine.compile_cache import CompileCache
from dance_jax.engine.detokenizer import Decoder
from dance_jax.engine.kv_cache import block_bytes, num_blocks, state_copies
from dance_jax.engine.output import RequestTracker
from dance_jax.engine.report import STEP_SIZES, EngineReport, EngineStats
from dance_jax.engine.route_sample import RouteSample
from dance_jax.engine.runner import Runner
from dance_jax.engine.scheduler import Row, Scheduler, StepPlan
from dance_jax.engine.sequence import OutputDelta, Request, Sequence
from dance_jax.engine.staging import Experts, Staging
from dance_jax.engine.stalls import Stalls
from dance_jax.engine.step import (
    DECODING,
    IDLE,
    Bucket,
    Extras,
    Outcome,
    sampling_rows,
    token_slice,
)
from dance_jax.engine.step_clock import StepClock
from dance_jax.engine.trace import Trace
from dance_jax.engine.traffic import CallTraffic, LinkTraffic, LockStepTraffic
from dance_jax.engine.waterfall import Waterfall
from dance_jax.models import kernels_cpu
from dance_jax.models.checkpoint import WeightSource
from dance_jax.models.experts import Weights
from dance_jax.models.lock_step_messages import Transport
from dance_jax.placement.core import Layout
from dance_jax.placement.migration import SlotChange, changed


@dataclasses.dataclass(frozen=True)
class StepResult:
    """The result of one step."""

    outputs: list[OutputDelta]
    #: Whether any server taking part had work in this step; if none had, the servers may rest.
    active: bool
    #: Number of the batch of moved experts that all servers applied after this step; 0 for none.
    applied: int = 0


def whole_model(checkpoint: WeightSource) -> Layout:
    """The layout of a single server with one device that holds every expert."""
    config = checkpoint.config
    shape = (1, len(config.moe_layers), config.num_experts)
    count = shape[1] * shape[2]
    slot_of = np.arange(count, dtype=np.int32).reshape(shape)
    return Layout(np.zeros(shape, np.int32), slot_of, (1,), (count,))


class Engine:
    """Schedules, runs and finishes the requests of one server.

    Args:
        checkpoint: the source of the model's weights, e.g. the converted model.
        tokenizer: the model's tokenizer.
        cluster: all servers; None for this process alone.
        rank: this server's rank in the cluster.
        layout: the placement of every expert; None (single server) to place all experts here.
        config: the configuration, equal on all servers.
        compile_cache: keeps compiled steps between starts.
        transport: carries rows between servers that step together; None if each server steps on its
            own and servers call each other's experts.
        free_memory: unused bytes of each device's memory before anything is loaded; None if memory
            is plentiful.
        order: ranks of all servers in the order in which this server prefers to call them
            (`visit.preferences`); None for ascending ranks.
    """

    def __init__(
        self,
        checkpoint: WeightSource,
        tokenizer: Decoder,
        cluster: ClusterSpec | None,
        rank: int,
        layout: Layout | None,
        config: EngineConfig,
        compile_cache: CompileCache | None = None,
        transport: Transport | None = None,
        free_memory: int | None = None,
        order: Iterable[int] | None = None,
    ):
        model = checkpoint.config
        layout = layout or whole_model(checkpoint)
        devices = (1,) if cluster is None else cluster.devices
        if layout.devices != devices:
            raise ValueError(
                f"the layout is for devices {layout.devices}, the cluster has {devices}"
            )
        self.rank, self.config, self._top_k = rank, config, model.top_k
        self.form = form = checkpoint.form(config.dtype)
        copies = state_copies(len(devices), calls=transport is None)
        self.runner = Runner(
            model,
            checkpoint.trunk(config.dtype),
            form,
            lambda pairs: checkpoint.experts(pairs, form),
            layout,
            rank,
            config,
            num_blocks(model, config, free_memory, copies),
            compile_cache or CompileCache(None),
            transport,
            copies,
            order,
        )
        self.scheduler = Scheduler(
            config, devices[rank], self.runner.blocks, not model.state_bytes, copies
        )
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
        self._positions = 0
        self._traffic = self._new_traffic(layers, servers)
        self.clock = StepClock(self._traffic.inside)
        #: Records a trace of the steps; None if tracing is off.
        self.trace: Trace | None = None
        #: Records the next steps; None if nobody asks for them.
        self.waterfall: Waterfall | None = None
        self._stalls = Stalls(("",) if cluster is None else cluster.names)
        self._staging = Staging(layout, rank, form)
        #: Held while pool and layout change, and while an expert is read.
        self._placement_lock = threading.Lock()
        #: Expert calls served here and elsewhere until the last change of the layout; and int64
        #: [l, e], all calls until then.
        self._calls_local = self._calls_remote = 0
        self._counted = np.zeros((layers, model.num_experts), np.int64)
        self._cost_base = self._costs()
        self._work = IDLE
        self._bucket_steps: collections.Counter[Bucket] = collections.Counter()
        #: See `EngineStats.step_rows`.
        self._step_rows = [(0, 0)] * STEP_SIZES
        self._routes = RouteSample(
            config.route_sample, (layers, model.top_k), seed=rank, half_life=config.half_life
        )
        #: Deltas that the next step returns in addition to its own.
        self._pending: list[OutputDelta] = []

    def _new_traffic(self, layers: int, servers: int) -> LinkTraffic:
        if self.runner.calls is not None:
            return CallTraffic(self.runner.calls)
        return LockStepTraffic(self.rank, layers, servers)

    @property
    def alone(self) -> bool:
        """Whether this server steps on its own; otherwise all servers run each step together."""
        return self.runner.calls is not None

    @property
    def has_work(self) -> bool:
        """Whether requests wait or run, deltas are pending, or other servers must be told news."""
        return self.scheduler.active or bool(self._pending) or self._staging.news

    @property
    def layout(self) -> Layout:
        """The current placement of every expert."""
        return self._staging.layout

    @property
    def staged(self) -> int:
        """Number of the first batch that is staged and not applied; 0 for none."""
        return self._staging.ready

    @property
    def last_batch(self) -> int:
        """Number of the last batch that was staged; 0 for none."""
        return self._staging.last

    def warmup(self, progress: ProgressCallback = lambda stage, done, total: None) -> None:
        """Compile every bucket and run each once; servers that step together do so together."""
        buckets = self.config.buckets
        self.runner.pools.warm_up()
        for done, bucket in enumerate(buckets):
            progress("compiling", done, len(buckets))
            self.runner.compile(bucket)
        progress("compiling", len(buckets), len(buckets))
        empty = ((),) * self.scheduler.devices
        for bucket in buckets:
            self.runner.run(StepPlan(*bucket, empty), work=IDLE)
        self._traffic.reset()
        self.clock = StepClock(self._traffic.inside)
        self._cost_base = self._costs()

    def add(self, request: Request) -> None:
        """Queue a request; an invalid request ends with finish_reason "error" in the next step."""
        sequences, refused = self.tracker.open(request)
        self._pending += refused
        for sequence in sequences:
            self.scheduler.add(sequence)
        if self.trace is not None:
            self.trace.begin(sequences)

    def abort(self, request_id: str | None = None) -> None:
        """Abort a request, or all; the next step returns the final deltas.

        An unknown request id is ignored: that request has ended already.
        """
        for sequence in self.scheduler.abort(request_id):
            self._pending.append(self.tracker.end(sequence, "abort"))

    def beats(self) -> int:
        """A number that grows while a step calls other servers and waits for them."""
        return 0 if self.runner.calls is None else self.runner.calls.beats()

    def own_cpu_s(self) -> float:
        """Processor seconds of this process without those spent for other servers' calls."""
        served_s = 0.0 if self.runner.calls is None else self.runner.calls.sums().served_s
        return time.process_time() - served_s

    def cancel(self) -> None:
        """Stop waiting for other servers, because the process is about to exit.

        A step in progress ends at once, and its outstanding calls to other servers fail. Any thread
        may call this.
        """
        if self.runner.calls is not None:
            self.runner.calls.cancel()

    def step(self) -> StepResult:
        """Schedule and run one step, and return the sampled tokens.

        Servers that step together must call this equally often; a server without work takes part
        with padding.
        """
        self.clock.start()
        result = self._step()
        self.clock.end()
        if self.scheduler.failures:
            self._stalls.update(self.scheduler.stalled)
        if self.trace is not None:
            self.trace.end(result.outputs)
        return result

    def _step(self) -> StepResult:
        number = self.steps
        others_decode = not self.alone and self._work == DECODING
        plan = self.scheduler.schedule(others_decode)
        for row in (row for rows in plan.entries for row in rows if row.index >= plan.decode):
            self.tracker.scheduled(row.sequence)
        self.clock.ended("schedule")
        if plan.empty and self.alone:
            outputs, self._pending = self._pending, []
            return StepResult(outputs, False)
        if self.runner.calls is not None:
            self.runner.calls.begin_step(number)
        outcomes, extras = self.runner.run(plan, loaded=self._staging.tell())
        self.clock.computed()
        failed = self._failed(plan, outcomes, extras)
        self.scheduler.commit(plan, failed)
        outputs, self._pending = self._pending, []
        self._score_prompts(plan, extras, failed)
        outputs += self._sampled(plan, outcomes, extras, failed)
        self._record(plan.without(failed), outcomes[0], extras)
        applied = 0 if self.alone else int(outcomes[0].crossed.loaded)
        if applied:
            self._apply(applied)
        self.clock.ended("output")
        if failed:
            self._stalls.failed(self._traffic.totals().peers)
        if self.trace is not None:
            self.trace.step(number, plan, self.clock.spans, len(set(map(id, failed))))
        if self.waterfall is not None:
            self.waterfall.step(number, plan, self.clock.spans)
        return StepResult(outputs, self._work != IDLE, applied)

    def _failed(self, plan: StepPlan, outcomes: list[Outcome], extras: Extras) -> list[Sequence]:
        """The sequences with a failed token, that is, one that needed an unavailable expert."""
        if not any(outcome.any_failed for outcome in outcomes):
            return []
        return [
            row.sequence
            for rows, failed_t in zip(plan.entries, self.runner.read(extras.failed), strict=True)
            for row in rows
            if failed_t[token_slice(plan.bucket, self.config, row)].any()
        ]

    def stage(self, number: int, changes: Iterable[SlotChange], experts: Experts) -> None:
        """Hold a batch of loaded experts until `commit`.

        Batches are applied one by one, in the order of their numbers. If the server steps on its
        own, another thread may call this during a step.

        Args:
            number: number of the batch, at least 1, the same on all servers, and greater than all
                earlier numbers.
            changes: changes of all servers' slots, relative to the layout after the previous batch
                or, without one, to the layout in force.
            experts: (local device, slot) -> weights in the format of the pool, for all slots of
                this server that get an expert. They are not copied.

        Raises:
            ValueError: the number is not new, the changes are impossible, or experts are missing
                or do not match them; nothing is held in that case.
        """
        layout = changed(self._staging.latest, changes)
        batch = self._staging.add(number, layout, experts)
        if self.alone:  # other servers may call these experts once any server applied the batch
            self.runner.pools.write(batch.writes)
            self.runner.stage_tables(layout, number)

    def commit(self, number: int) -> bool:
        """Apply a batch that all servers have staged, now or after a later step.

        Returns:
            Whether the batch was applied now; if not, `StepResult.applied` tells when it is, in the
            same step on all servers.
        """
        if not self.alone:
            self._staging.commit(number)
            return False
        if self._staging.ready != number:
            return False
        self._apply(number)
        return True

    def unstage(self, number: int) -> bool:
        """Drop a staged batch and all later ones, which build on it.

        Returns:
            False if the batch was not staged or has been applied already.
        """
        self.runner.drop_tables(number)
        return self._staging.drop(number)

    def reseat(self, number: int, rank: int, devices: int, slots: int) -> None:
        """Put another server, without experts, in the place of one; between steps.

        Args:
            number: as of a batch.
            rank: of the server, which steps on its own as this one does.
            devices, slots: devices of the new server, and expert slots of each.

        Raises:
            ValueError: a batch is staged.
        """
        with self._placement_lock:
            self.runner.use_tables(self._staging.reseat(number, rank, devices, slots), number)

    def expert(self, layer: int, expert: int) -> Weights:
        """The weights of an expert that is resident here, as host arrays as in `stage`.

        Any thread may call this once the engine is warm.

        Raises:
            KeyError: the expert is not resident here.
        """
        with self._placement_lock:
            device = int(self.layout.device_of[self.rank, layer, expert])
            if device < 0:
                raise KeyError(f"expert {expert} of MoE layer {layer} is not on this server")
            slot = int(self.layout.slot_of[self.rank, layer, expert])
            return self.runner.pools.read(device, slot)

    def _apply(self, number: int) -> None:
        """Apply the batch that all servers have staged."""
        counts_le = self.runner.counts()
        self._calls_local, self._calls_remote = self._calls(counts_le)
        self._counted = counts_le
        with self._placement_lock:
            batch = self._staging.take(number)
            if not self.alone:
                self.runner.pools.write(batch.writes)
            self.runner.use_tables(batch.layout, number)
        if self.config.half_life is None:  # without fading, keep only the current layout's routes
            self._routes.clear()

    def _calls(self, counts_le: np.ndarray) -> tuple[int, int]:
        """Expert calls of this server's tokens served here and elsewhere, from all calls so far."""
        since_le = counts_le - self._counted
        resident_le = self.layout.slot_of[self.rank] >= 0
        local = self._calls_local + int(since_le[resident_le].sum())
        return local, self._calls_remote + int(since_le[~resident_le].sum())

    def _costs(self) -> tuple[int, float]:
        """Expert calls that the C++ library computed in this process, and the seconds they took."""
        _, seconds, served = kernels_cpu.routed_seconds()
        return served, seconds

    def _measured(self) -> dict[str, Any]:
        """Measurements that `EngineReport` and `EngineStats` share."""
        (served, seconds), base = self._costs(), self._cost_base
        totals = self._traffic.totals()
        return {
            "rows": totals.rows,
            "busiest_rows": totals.busiest_rows,
            "calls_served": served - base[0],
            "expert_seconds": seconds - base[1],
            "sums": totals.sums,
            "bytes_sent": totals.bytes_sent.tolist(),
        }

    @functools.cached_property
    def _memory(self) -> dict[str, int]:
        """`EngineReport.memory`, which does not change."""
        runner = self.runner
        trunk = sum(leaf.nbytes for leaf in jax.tree.leaves(runner.state))
        blocks = self.scheduler.num_blocks * block_bytes(runner.model_config, self.config)
        return {"trunk": trunk, "kv": blocks, "experts": sum(runner.pools.bytes)}

    def stats(self) -> EngineStats:
        return EngineStats(
            counts=self.runner.counts().tolist(),
            transfers=self._traffic.totals().transfers.tolist(),
            tokens=self.tokens,
            steps=self.steps,
            routes=self._routes.kept.tobytes(),
            top_k=self._top_k,
            pool_bytes=self.runner.pools.bytes,
            step_rows=list(self._step_rows),
            **self._measured(),
        )

    def report(self, with_counts: bool = False) -> EngineReport:
        counts_le = self.runner.counts()
        calls_local, calls_remote = self._calls(counts_le)
        scheduler, totals = self.scheduler, self._traffic.totals()
        resident = int((self.layout.slot_of[self.rank] >= 0).sum())
        slots = self.layout.slots_per_device[self.rank]
        return EngineReport(
            steps=self.steps,
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            kv_blocks=scheduler.num_blocks,
            kv_blocks_used=scheduler.blocks_used,
            preemptions=scheduler.preemptions,
            prefix_queries=scheduler.prefix_queries,
            prefix_hits=scheduler.prefix_hits,
            shares_prefixes=scheduler.share_prefixes,
            state_bytes_used=scheduler.num_running
            * scheduler.state_copies
            * self.runner.model_config.state_bytes,
            prompt_tokens=self.prompt_tokens,
            generation_tokens=self.generation_tokens,
            positions=self._positions,
            calls_local=calls_local,
            calls_remote=calls_remote,
            transfers=int(totals.transfers.sum()),
            bytes_received=totals.bytes_received.tolist(),
            peers=list(totals.peers),
            failed_sequences=scheduler.failures,
            stalled=scheduler.stalled,
            memory=self._memory,
            counts=counts_le.astype(np.uint32).tobytes() if with_counts else b"",
            masks=self.runner.masks.count,
            mask_seconds=self.runner.masks.seconds,
            experts_resident=resident,
            spare_slots=len(self.runner.devices) * slots - resident,
            step_seconds=self.clock.seconds(),
            cpu_seconds=time.process_time(),
            longest_step_s=self.clock.longest,
            bucket_steps={f"{rows}+{more}": n for (rows, more), n in self._bucket_steps.items()},
            **self._measured(),
        )

    def _score_prompts(self, plan: StepPlan, extras: Extras, failed: list[Sequence]) -> None:
        """Keep the logprobs of the step's prompt tokens that are wanted."""
        if extras.scores is None:
            return
        devices = zip(*(self.runner.read(leaf) for leaf in extras.scores), strict=True)
        for rows, scores in zip(plan.without(failed).entries, devices, strict=True):
            for row in rows:
                self._score_row(row, token_slice(plan.bucket, self.config, row).start, scores)

    def _score_row(self, row: Row, begin: int, scores: tuple[np.ndarray, ...]) -> None:
        """Keep the logprobs of the prompt tokens after those of a row, which begins at `begin`."""
        sequence, most = row.sequence, row.sequence.params.prompt_logprobs
        if sequence.prompt_logprobs is None or most is None:
            return
        last = len(sequence.prompt_token_ids) - 1
        for n, position in enumerate(range(row.start, min(row.start + len(row.tokens), last))):
            token, logprob, rank, *top = (leaf[begin + n].tolist() for leaf in scores)
            sequence.prompt_logprobs[position + 1] = self.tracker.logprobs(
                token, logprob, rank, zip(*top, strict=True), most
            )

    def _sampled(
        self, plan: StepPlan, outcomes: list[Outcome], extras: Extras, failed: list[Sequence]
    ) -> Iterable[OutputDelta]:
        """Append the sampled tokens to their sequences, and finish those that are done."""
        rows = [sampling_rows(device) for device in plan.entries]
        top: list[Any] = [None] * len(outcomes)
        if any(row.sequence.params.logprobs is not None for device in rows for row in device):
            tokens = self.runner.read(extras.top_token)
            top = list(zip(tokens, self.runner.read(extras.top_logprob), strict=True))
        for device, outcome, most_likely in zip(rows, outcomes, top, strict=True):
            for place, row in enumerate(device):
                if any(row.sequence is each for each in failed):
                    continue
                alternatives = ()
                if most_likely is not None and row.sequence.params.logprobs is not None:
                    alternatives = zip(*(part[place].tolist() for part in most_likely), strict=True)
                error = row.sequence.error
                if error is not None:
                    delta = self.tracker.end(row.sequence, "error", error)
                else:
                    delta = self.tracker.append(
                        row.sequence,
                        int(outcome.token[place]),
                        float(outcome.logprob[place]),
                        int(outcome.rank[place]),
                        alternatives,
                    )
                if delta.finish_reason is not None:
                    self.scheduler.finish(row.sequence)
                yield delta

    def _record(self, plan: StepPlan, outcome: Outcome, extras: Extras) -> None:
        self.steps += 1
        self._bucket_steps[self.config.buckets[0] if plan.empty else plan.bucket] += 1
        self.tokens += plan.num_tokens
        if plan.num_tokens:
            size = min((plan.num_tokens - 1).bit_length(), STEP_SIZES - 1)
            steps, rows = self._step_rows[size]
            self._step_rows[size] = steps + 1, rows + plan.num_tokens
        crossed = outcome.crossed
        self._work = int(crossed.work)
        rows = [row for device in plan.entries for row in device]
        decoded = sum(row.index < plan.decode for row in rows)
        self.prompt_tokens += plan.num_tokens - decoded
        self.generation_tokens += sum(row.sample for row in rows)
        self._positions += sum(row.positions for row in rows)
        self._traffic.add(crossed)
        if self._routes.wanted and not plan.empty:
            self._sample_routes(plan, extras)

    def _sample_routes(self, plan: StepPlan, extras: Extras) -> None:
        chosen = self._routes.choose(plan.num_tokens, time.monotonic())
        if not len(chosen.tokens):
            return
        routes_tlk = [
            routes_tlk[token_slice(plan.bucket, self.config, row)]
            for device, routes_tlk in zip(
                plan.entries, self.runner.read(extras.routes), strict=True
            )
            for row in device
        ]
        rows = [row for device in plan.entries for row in device]
        tokens_r = [len(row.tokens) for row in rows]
        self._routes.put(
            chosen,
            np.concatenate(routes_tlk)[chosen.tokens],
            np.repeat([row.sequence.arrival for row in rows], tokens_r)[chosen.tokens],
        )

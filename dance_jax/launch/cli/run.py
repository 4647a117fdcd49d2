"""Run prompts on a started cluster and keep what the summary needs."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from dance_jax.engine.sequence import OutputDelta, Request, RequestOutput, SamplingParams
from dance_jax.launch.cli.prompts import Prompt
from dance_jax.launch.cluster.batch import Cluster
from dance_jax.launch.planning.plan import Plan
from dance_jax.models.tokenizer import Tokenizer
from dance_jax.placement.activations import Activations

if TYPE_CHECKING:
    from dance_jax.engine.report import EngineStats

#: Called with (prompt, delta) as outputs arrive.
DeltaCallback = Callable[[Prompt, OutputDelta], None]
#: Called with (prompt, output) when an output is complete.
EndCallback = Callable[[Prompt, RequestOutput], None]


@dataclasses.dataclass(frozen=True, eq=False)
class RunTraffic:
    """What the servers counted in one run."""

    #: int64 [servers, layers, experts], expert calls of each server's tokens.
    counts: np.ndarray
    #: int64 [layers, servers, servers], hidden states sent from server to server.
    transfers: np.ndarray
    #: int64 [servers, servers], payload bytes sent from server to server.
    bytes_sent: np.ndarray
    #: int64 [servers], tokens each server computed.
    tokens: np.ndarray
    #: int64 [servers], pairs of token and MoE layer with an expert call to another server.
    away: np.ndarray
    #: Per server int16 [tokens, layers, k], a bounded sample of routes.
    routes: tuple[np.ndarray, ...]
    #: Per server, bytes of the expert pool on each device.
    pool_bytes: tuple[tuple[int, ...], ...]

    @property
    def transfers_per_token(self) -> float:
        """Remote servers a token visits per layer, mean over layers and all tokens."""
        return self._per_token_and_layer(self.transfers)

    @property
    def any_miss(self) -> float:
        """Share of pairs of token and MoE layer with an expert call to another server."""
        return self._per_token_and_layer(self.away)

    @property
    def layers_waited(self) -> float:
        """MoE layers in which a token waited for another server, mean over all tokens."""
        return self.any_miss * self.transfers.shape[0]

    def _per_token_and_layer(self, counted: np.ndarray) -> float:
        pairs = int(self.tokens.sum()) * self.transfers.shape[0]
        return float(counted.sum() / pairs) if pairs else 0.0


@dataclasses.dataclass(frozen=True, eq=False)
class RunResult:
    """Outputs and measurements of one run."""

    plan: Plan
    prompts: tuple[Prompt, ...]
    #: In the order of the prompts.
    outputs: tuple[RequestOutput, ...]
    traffic: RunTraffic
    #: Seconds from the first request to the last output.
    seconds: float
    #: time.monotonic() of the very first token; None if no token was generated.
    first_token: float | None

    @property
    def local_share(self) -> float:
        """Share of expert calls served without leaving the server, as counted in the run."""
        return self.plan.placement.local_share(self.traffic.counts)

    def activations(self, model: str) -> Activations:
        """Statistics of this run's tokens, for later placements.

        Args:
            model: the checkpoint's `source`.
        """
        names, traffic = self.plan.spec.names, self.traffic
        return Activations(names, traffic.counts, model, traffic.routes)


def run_prompts(
    cluster: Cluster,
    plan: Plan,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    on_delta: DeltaCallback = lambda prompt, delta: None,
    on_end: EndCallback = lambda prompt, output: None,
) -> RunResult:
    """Run prompts on their servers.

    A prompt that cannot run (it is empty, or longer than the context) ends with finish_reason
    "error" and the reason in stop_reason; the others run.

    Args:
        cluster: a started cluster.
        plan: the plan that the cluster was started with.
        tokenizer: of the model.
        prompts: all of them run at the same time.
        on_delta: called with every delta as it arrives.
        on_end: called with every output as it ends.

    Raises:
        ClusterError: a server failed.
    """
    started = time.monotonic()
    requests = [
        Request(
            request_id=str(number),
            prompt=prompt.text,
            prompt_token_ids=tokenizer.encode(prompt.text),
            params=SamplingParams(
                temperature=prompt.temperature,
                max_tokens=prompt.max_tokens,
            ),
        )
        for number, prompt in enumerate(prompts)
    ]
    outputs = tuple(map(RequestOutput.of, requests))
    first_token = None
    ranks = [prompt.rank for prompt in prompts]
    for delta in cluster.generate(zip(ranks, requests, strict=True)):
        if delta.token_ids and first_token is None:
            first_token = time.monotonic()
        number = int(delta.request_id)
        outputs[number].add(delta)
        on_delta(prompts[number], delta)
        if delta.finish_reason is not None:
            on_end(prompts[number], outputs[number])
    return RunResult(
        plan=plan,
        prompts=tuple(prompts),
        outputs=outputs,
        traffic=gather(cluster.stats()),
        seconds=time.monotonic() - started,
        first_token=first_token,
    )


def gather(stats: Sequence[EngineStats]) -> RunTraffic:
    """The servers' statistics, in rank order, as arrays."""
    return RunTraffic(
        counts=np.array([each.counts for each in stats], np.int64),
        transfers=np.stack([np.asarray(each.transfers, np.int64) for each in stats], axis=1),
        bytes_sent=np.array([each.bytes_sent for each in stats], np.int64),
        tokens=np.array([each.tokens for each in stats], np.int64),
        away=np.array([each.sums.rows_away for each in stats], np.int64),
        routes=tuple(each.routes_tlk for each in stats),
        pool_bytes=tuple(tuple(each.pool_bytes) for each in stats),
    )

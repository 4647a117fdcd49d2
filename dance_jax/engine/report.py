"""What an engine tells of itself; plain types, to cross processes."""

from __future__ import annotations

import msgspec
import numpy as np

from dance_jax.models.counters import PeerCounters, Sums

#: Length of `EngineStats.step_rows`; the last entry takes all larger steps.
STEP_SIZES = 16


class EngineStats(msgspec.Struct):
    """What one server counted since its start: much, told on request."""

    #: [l][e] expert calls of this server's tokens.
    counts: list[list[int]]
    #: [l][n] hidden states sent to each server.
    transfers: list[list[int]]
    #: [n] payload bytes sent to each server.
    bytes_sent: list[int]
    #: Tokens computed, prompt and output.
    tokens: int
    steps: int
    #: int16 [tokens, l, k]: experts chosen by a random sample of the tokens, and their k.
    routes: bytes
    top_k: int
    #: Bytes of the live expert pool of each device.
    pool_bytes: list[int]
    #: Entry i: the number of steps with more than 2^(i - 1) and up to 2^i rows, and their rows.
    step_rows: list[tuple[int, int]] = []
    #: As in `EngineReport`.
    rows: int = 0
    busiest_rows: int = 0
    calls_served: int = 0
    expert_seconds: float = 0.0
    sums: Sums = msgspec.field(default_factory=Sums)

    @property
    def routes_tlk(self) -> np.ndarray:
        """`routes` as an array."""
        found = np.frombuffer(self.routes, np.int16)
        return found.reshape(-1, len(self.counts), self.top_k)


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
    #: Requests with the same prefix share its computation; not with recurrent states.
    shares_prefixes: bool = True
    #: Bytes of recurrent states that running sequences use, on all devices.
    state_bytes_used: int = 0
    #: Processor seconds of this process, of all its threads.
    cpu_seconds: float = 0.0
    #: The longest step of the last seconds; see `step_clock.StepClock.longest`.
    longest_step_s: float = 0.0
    #: Hidden states that this server knows of, and those through the busiest link direction of each
    #: layer and step; see `traffic.Totals`.
    rows: int = 0
    busiest_rows: int = 0
    #: Positions that tokens attended to: each token's own and all before it.
    positions: int = 0
    #: Steps by what was compiled for them, "decode rows+slice rows".
    bucket_steps: dict[str, int] = {}
    #: Expert calls that this server's devices computed, for its own tokens and others', and the
    #: devices' seconds in them, together; 0 where it is not counted: without the C++ library.
    calls_served: int = 0
    expert_seconds: float = 0.0
    #: Sums over expert calls and layers; counters of each server by rank, empty if servers step
    #: together.
    sums: Sums = msgspec.field(default_factory=Sums)
    peers: list[PeerCounters] = []
    #: Sequences that failed in a step for want of an expert, each time anew; and those that wait
    #: for one now.
    failed_sequences: int = 0
    stalled: int = 0
    #: Slots of the pools without an expert.
    spare_slots: int = 0

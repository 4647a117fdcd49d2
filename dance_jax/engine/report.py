"""An engine's statistics and report, in plain types that can cross processes."""

from __future__ import annotations

import msgspec
import numpy as np

from dance_jax.models.counters import PeerCounters, Sums

#: Length of `EngineStats.step_rows`; the last entry also counts all larger steps.
STEP_SIZES = 16


class EngineStats(msgspec.Struct):
    """Detailed statistics of one server since its start, sent on request."""

    #: [l][e] expert calls of this server's tokens.
    counts: list[list[int]]
    #: [l][n] hidden states sent to each server.
    transfers: list[list[int]]
    #: [n] payload bytes sent to each server.
    bytes_sent: list[int]
    #: Tokens computed, prompt and output.
    tokens: int
    steps: int
    #: int16 [tokens, l, k], as bytes: experts chosen for a random sample of the tokens; and k.
    routes: bytes
    top_k: int
    #: Bytes of the live expert pool of each device.
    pool_bytes: list[int]
    #: Entry i: number of steps with more than 2^(i - 1) and up to 2^i rows, and the sum of their
    #: rows.
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
    """A summary of one server; counters are since its start."""

    steps: int
    #: Sequences running and waiting.
    running: int
    waiting: int
    #: KV blocks of all devices, and those held by running sequences.
    kv_blocks: int
    kv_blocks_used: int
    preemptions: int
    #: Tokens looked up in the prefix cache, and found there.
    prefix_queries: int
    prefix_hits: int
    #: Prompt tokens computed, and tokens sampled.
    prompt_tokens: int
    generation_tokens: int
    #: Expert calls of this server's tokens, by where they were served.
    calls_local: int
    calls_remote: int
    #: Hidden states sent to other servers.
    transfers: int
    #: Payload bytes sent to and received from each server, by rank.
    bytes_sent: list[int]
    bytes_received: list[int]
    experts_resident: int
    #: Seconds in each part of the steps; see `step_clock.StepClock`.
    step_seconds: dict[str, float]
    #: Whether requests share the computation of equal prefixes; False for recurrent states.
    shares_prefixes: bool = True
    #: Bytes of recurrent states that running sequences use, on all devices.
    state_bytes_used: int = 0
    #: CPU seconds of this process, over all threads.
    cpu_seconds: float = 0.0
    #: Seconds of the longest recent step; see `step_clock.StepClock.longest`.
    longest_step_s: float = 0.0
    #: Hidden states sent between servers, as far as this server knows, and those over the busiest
    #: link direction of each layer and step; see `traffic.Totals`.
    rows: int = 0
    busiest_rows: int = 0
    #: Positions attended to, over all tokens; each token attends to its own and all before it.
    positions: int = 0
    #: Steps by compiled bucket, "decode rows+slice rows".
    bucket_steps: dict[str, int] = {}
    #: Expert calls computed by this server's devices, for its own and others' tokens, and the
    #: devices' seconds in them, summed; 0 without the C++ library, which counts them.
    calls_served: int = 0
    expert_seconds: float = 0.0
    #: Counters of expert calls and layers; and counters per server, by rank, empty if servers step
    #: together.
    sums: Sums = msgspec.field(default_factory=Sums)
    peers: list[PeerCounters] = []
    #: Masks made for tokens whose choice is restricted, for example by a structure; and the seconds
    #: that this took while the devices computed.
    masks: int = 0
    mask_seconds: float = 0.0
    #: Sequences that failed in a step because an expert was unavailable, counting repeats; and
    #: sequences that wait for an unavailable expert now.
    failed_sequences: int = 0
    stalled: int = 0
    #: Empty slots of the expert pools.
    spare_slots: int = 0
    #: Bytes of the devices' memory by use: "trunk", "kv" and "experts".
    memory: dict[str, int] = {}
    #: uint32 [l, e], as bytes: expert calls of this server's tokens. Empty unless somebody watches.
    counts: bytes = b""

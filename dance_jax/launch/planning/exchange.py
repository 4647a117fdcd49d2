"""Choose how the servers of a launch exchange rows: expert calls, or collectives of one job."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from dance_jax.config import (
    MOST_TOGETHER,
    ClusterSpec,
    EngineConfig,
    UserError,
    check_together,
)
from dance_jax.launch.planning.costs import DEFAULT_RATE, exchanged_bytes
from dance_jax.models.config import ModelConfig

#: Host time in seconds of a layer whose parts the host drives, and of each call (caller and callee
#: together), both in Python. Measured on a CPU (models/host_calls.py, one row, AMD EPYC).
HOST_S, CALL_S = 3e-4, 4e-4
#: Seconds of a layer's collectives without their bytes. An estimate: no accelerators were measured.
COLLECTIVES_S = 2e-4
#: Round trip in seconds of links with a known rate only. An estimate.
ROUND_TRIP_S = 1e-4


@dataclasses.dataclass(frozen=True)
class ExchangeChoice:
    """The value of `EngineConfig.exchange` for a launch, and its reason."""

    #: "calls" or "collectives".
    name: str
    #: The reason, as part of a sentence.
    why: str


def exchange_notes(exchange: ExchangeChoice, servers: int) -> Iterator[str]:
    """Notes about the risks of an exchange."""
    if exchange.name == "collectives" and servers > 1:
        yield (
            "With collectives all engines end together. So they do if any program reaches the port "
            "of jax.distributed on the first server, which asks for no key: let only the servers "
            "reach it (--coordinator-port), or use --exchange calls."
        )


def choose_exchange(
    spec: ClusterSpec,
    model: ModelConfig,
    config: EngineConfig,
    local_share: float,
    survive: int = 0,
) -> ExchangeChoice:
    """Return the exchange that was asked for, or the one that is predicted to be faster.

    Args:
        local_share: local share of expert calls under the placement.
        survive: servers that may be lost at once, with nothing to load.

    Raises:
        UserError: the servers cannot use the exchange that was asked for.
    """
    if config.exchange == "collectives" and survive:
        raise UserError(
            f"--survive {survive}: with exchange=collectives all engines end when a server is "
            "lost; use exchange=calls or auto, or leave out --survive"
        )
    if config.exchange == "collectives" and spec.platform == "mixed":
        raise UserError(
            "exchange=collectives: servers of different platforms cannot form one job; "
            "use exchange=calls or auto"
        )
    if config.exchange == "collectives":
        check_together(len(spec.servers))
    if config.exchange != "auto":
        return ExchangeChoice(config.exchange, "as requested")
    if survive:
        return ExchangeChoice("calls", "with collectives no server survives the loss of another")
    if spec.platform == "mixed":
        return ExchangeChoice("calls", "servers of different platforms cannot form one job")
    if len(spec.servers) > MOST_TOGETHER:
        return ExchangeChoice("calls", f"at most {MOST_TOGETHER} servers can step together")
    if spec.platform == "cpu":
        return ExchangeChoice("calls", "on CPUs no server waits for other servers' steps")
    calls_s, collectives_s = predicted_step_s(spec, model, config, local_share)
    name = "collectives" if collectives_s <= calls_s else "calls"
    return ExchangeChoice(
        name,
        f"a step of one token on each server is predicted to take {1e3 * calls_s:.2f} ms with "
        f"calls, {1e3 * collectives_s:.2f} ms with collectives",
    )


def predicted_step_s(
    spec: ClusterSpec, model: ModelConfig, config: EngineConfig, local_share: float
) -> tuple[float, float]:
    """Predict the seconds that a step waits for the exchange, by calls and by collectives.

    For accelerators, with every server decoding one token. A layer waits for its call if any of its
    k experts is missing, each missing independently. Collectives wait for the busiest link, which
    may carry the rows of all other servers. A link of unknown rate counts as DEFAULT_RATE.
    """
    rate = min(server.bandwidth or DEFAULT_RATE for server in spec.servers)
    row_s = 8 * exchanged_bytes(model.hidden_size, config) / rate
    misses = 1 - local_share**model.top_k
    others = len(spec.servers) - 1
    calls_s = HOST_S + misses * (CALL_S + ROUND_TRIP_S + row_s)
    collectives_s = COLLECTIVES_S + (ROUND_TRIP_S + misses * others * row_s if others else 0)
    return len(model.moe_layers) * calls_s, len(model.moe_layers) * collectives_s

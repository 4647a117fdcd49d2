"""One decision of the global scheduler: where experts would be best by now, whether moving pays.

Everything here is a function of `DecisionInputs`, computed in a process of its own (`solver`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from dance_jax.config import option
from dance_jax.placement import migration
from dance_jax.placement.core import Layout, Placement, Routes, spread
from dance_jax.placement.cost import Cost, LockStepCost, staggered_share
from dance_jax.placement.migration import ERRORS, HYSTERESIS, MoveBatch
from dance_jax.placement.policies import DEFAULT_POLICY, POLICIES, place, usable

#: Bytes that a device writes between two steps, and experts at most.
BATCH_BYTES, BATCH_EXPERTS = 16 << 20, 4
#: Seconds for which a placement is weighed that is only made on request.
HORIZON_S = 300.0


@dataclasses.dataclass(frozen=True)
class RebalanceOptions:
    """When experts move while a service runs, and on what grounds."""

    interval_s: float = option(
        300.0,
        "from one decision to the next; 0: only on POST /placement/rebalance (default: {default})",
        flag="--rebalance-interval",
        kind="seconds",
        metavar="S",
    )
    policy: str = option(
        DEFAULT_POLICY,
        "as --policy, for experts that move (default: {default})",
        flag="--rebalance-policy",
        choices=tuple(POLICIES),
        metavar="NAME",
    )
    # A fifth of the interval: at the second decision after a shift hardly anything is left of
    # before.
    half_life_s: float | None = option(
        60.0,
        "after which what users asked for counts half; 0: it never fades (default: {default})",
        flag="--half-life",
        kind="seconds",
        metavar="S",
    )
    state_dir: str | None = option(
        None,
        "keep placement and statistics here, and go on with them at the next start",
        kind="path",
        metavar="DIR",
    )
    dry_run: bool = option(
        False, "say what would move, and move nothing", flag="--rebalance-dry-run"
    )

    @property
    def horizon_s(self) -> float:
        """Seconds over which costs are compared."""
        return self.interval_s or HORIZON_S


@dataclasses.dataclass(frozen=True, eq=False)
class DecisionInputs:
    """What a decision depends on."""

    policy: str
    #: In force.
    layout: Layout
    #: Of the servers.
    names: tuple[str, ...]
    #: float64 [servers, layers, experts], expert calls of each server's requests.
    counts: np.ndarray
    #: Per server int [tokens, layers, k].
    routes: tuple[np.ndarray, ...]
    cost: Cost
    #: Of hidden states, those through the busiest link of each layer, as measured; None: unknown.
    busiest: float | None
    #: float [servers]: tokens that each server is expected to compute until the next decision.
    tokens: np.ndarray
    expert_bytes: int
    #: float [servers]: bytes a second that each loads.
    read_rates: np.ndarray
    #: Move whatever it costs.
    force: bool = False
    #: Where experts are to be, whatever it costs; None: as the policy finds.
    wanted: Placement | None = None
    #: Move only if that is not soon to be done again: where the decision before would have gone,
    #: must be about as good by now. None there: there was none, so wait for the next.
    patient: bool = False
    candidate: Placement | None = None
    seed: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Answer:
    """What follows."""

    #: The one that placed.
    policy: str
    #: None: nothing is known to decide on.
    verdict: migration.Verdict | None
    #: Where experts would move if it still pays later; None: nothing is to be waited for.
    candidate: Placement | None
    #: What moves if it is decided, in this order.
    batches: list[MoveBatch]


def answer(question: DecisionInputs) -> Answer:
    """Solves the placement anew and weighs it against the one in force.

    Raises:
        UserError: the policy cannot place on these servers.
    """
    used = usable(question.policy, question.routes)
    if question.wanted is None and not any(map(len, question.routes)):
        return Answer(used, None, None, [])
    present = resident(question.layout)
    fit, judge = migration.halves(question.routes)
    cost = _measured_cost(question, present)
    if question.wanted is not None:
        used, found = "request", question.wanted
    else:
        found = _place(question, used, fit, cost)
    judged = (judge, cost, _weights(question.tokens))
    steps, blocked = _steps(question, found)
    verdict = migration.decide(
        migration.seconds_per_token(present, *judged),
        migration.seconds_per_token(found, *judged),
        tokens_expected=float(question.tokens.mean()),
        migration_seconds=_loading_seconds(question, steps),
        experts_moved=found.moved(present),
        force=question.force,
        hysteresis=HYSTERESIS + ERRORS * migration.gain_error(present, found, *judged),
    )
    candidate = None
    if blocked:
        verdict = dataclasses.replace(verdict, migrate=False, reason=blocked)
    elif question.wanted is not None:
        reason = "it is wanted there" if steps else "it is there already"
        verdict = dataclasses.replace(verdict, migrate=bool(steps), reason=reason)
    elif question.patient and verdict.migrate and not _settled(question.candidate, found, *judged):
        candidate = found
        reason = "it pays, but the workload may still be changing"
        verdict = dataclasses.replace(verdict, migrate=False, reason=reason)
    elif verdict.migrate:
        # That it pays is judged by tokens it was not fitted to; where to go, all tokens say better.
        found = _place(question, used, question.routes, cost)
        steps, blocked = _steps(question, found)
        verdict = dataclasses.replace(
            verdict,
            migrate=not blocked,
            reason=blocked or verdict.reason,
            migration_seconds=_loading_seconds(question, steps),
            experts_moved=found.moved(present),
        )
    return Answer(used, verdict, candidate, steps)


def _place(question: DecisionInputs, policy: str, routes: Routes, cost: Cost) -> Placement:
    """Where experts are best, of these tokens."""
    old = question.layout
    return place(
        policy,
        question.counts,
        old.capacities,
        routes=routes,
        devices=old.devices,
        cost=cost,
        previous=resident(old),
        seed=question.seed,
    )


def _steps(question: DecisionInputs, found: Placement) -> tuple[list[MoveBatch], str]:
    """How experts get there; if they cannot, why."""
    old = question.layout
    new = spread(found, old.devices, old.slots_per_device, question.counts, old, old.spare)
    try:
        steps = migration.batches(old, new, most_loads(question.expert_bytes))
        return [batch for batch, _ in steps], ""
    except migration.NoEmptySlot as error:
        name = question.names[error.server]
        return [], f"device {error.device} of {name} has no empty slot to load an expert into"


def _loading_seconds(question: DecisionInputs, steps: list[MoveBatch]) -> float:
    return migration.migration_seconds(steps, question.expert_bytes, question.read_rates)


def _measured_cost(question: DecisionInputs, present: Placement) -> Cost:
    """The cost of a layer. In lock step it depends on how often servers were measured to have
    tokens at the same time; servers on their own do not wait for the tokens of others."""
    if not isinstance(question.cost, LockStepCost) or question.busiest is None:
        return question.cost
    if not any(map(len, question.routes)):
        return question.cost
    together = present.traffic(question.routes).concentration(_weights(question.tokens))
    active = sum(len(route) > 0 for route in question.routes)
    return question.cost.staggered(staggered_share(question.busiest, together), active)


def _settled(
    before: Placement | None,
    found: Placement,
    judge: Sequence[np.ndarray],
    cost: Cost,
    weights: np.ndarray | None,
) -> bool:
    """Where experts would have moved before, they would not be moved again now."""
    if before is None:
        return False
    seconds = [migration.seconds_per_token(each, judge, cost, weights) for each in (before, found)]
    error = migration.gain_error(before, found, judge, cost, weights)
    return seconds[0] - seconds[1] <= (HYSTERESIS + ERRORS * error) * seconds[0]


def resident(layout: Layout) -> Placement:
    """Which server holds what."""
    return Placement(layout.resident)


def most_loads(expert_bytes: int) -> int:
    """Experts of a batch on one device, so that writing them takes no longer than a step may.

    Spare slots alone do not bound that: a device may have many more empty slots.
    """
    return max(1, min(BATCH_EXPERTS, BATCH_BYTES // expert_bytes))


def _weights(tokens_n: np.ndarray) -> np.ndarray | None:
    """What each server's tokens count; None: all the same, where none has any."""
    mean = tokens_n.mean()
    return tokens_n / mean if mean > 0 else None

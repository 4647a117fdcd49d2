"""One decision of the rebalancer: the best placement now, and whether moving pays off.

Everything here is a function of `DecisionInputs`, computed in a separate process (`solver`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from dance_jax.placement import migration
from dance_jax.placement.core import Layout, Placement, Routes
from dance_jax.placement.cost import Cost, LockStepCost, staggered_share
from dance_jax.placement.devices import spread
from dance_jax.placement.migration import ERRORS, HYSTERESIS, MoveBatch
from dance_jax.placement.policies import place, usable

#: Most bytes, and most experts, that a device writes between two steps.
BATCH_BYTES, BATCH_EXPERTS = 16 << 20, 4


@dataclasses.dataclass(frozen=True, eq=False)
class DecisionInputs:
    """All inputs of a decision."""

    policy: str
    #: The current layout.
    layout: Layout
    #: Names of the servers.
    names: tuple[str, ...]
    #: float64 [servers, layers, experts], expert calls of each server's requests.
    counts: np.ndarray
    #: Per server int [tokens, layers, k].
    routes: tuple[np.ndarray, ...]
    cost: Cost
    #: Measured fraction of the hidden states that went through the busiest link of their layer;
    #: None: unknown.
    busiest: float | None
    #: float [servers]: tokens that each server will probably compute until the next decision.
    tokens: np.ndarray
    expert_bytes: int
    #: float [servers]: bytes per second that each server loads.
    read_rates: np.ndarray
    #: Move even if it does not pay off.
    force: bool = False
    #: Requested placement, to be reached at any cost; None: the policy decides.
    wanted: Placement | None = None
    #: Move only if the previous candidate placement is still about as good, so that the same
    #: experts do not move twice. With patience and without a candidate, wait for the next decision.
    patient: bool = False
    candidate: Placement | None = None
    seed: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Answer:
    """The result of a decision."""

    #: The policy that was used.
    policy: str
    #: None: no data to decide on.
    verdict: migration.Verdict | None
    #: Placement to move to if the next decision confirms it; None: nothing to confirm.
    candidate: Placement | None
    #: Moves in this order, if experts move.
    batches: list[MoveBatch]


def answer(question: DecisionInputs) -> Answer:
    """Compute a placement and compare it with the current one.

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
        reason = "the placement was requested" if steps else "experts are placed as requested"
        verdict = dataclasses.replace(verdict, migrate=bool(steps), reason=reason)
    elif question.patient and verdict.migrate and not _settled(question.candidate, found, *judged):
        candidate = found
        reason = "moving pays off, but the workload may still be changing"
        verdict = dataclasses.replace(verdict, migrate=False, reason=reason)
    elif verdict.migrate:
        # The judgement uses tokens that the placement was not fitted to; the final placement uses
        # all tokens.
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
    """The best placement for these tokens."""
    old = question.layout
    return place(
        policy,
        question.counts,
        old.capacities,
        holders=old.holders,
        routes=routes,
        devices=old.devices,
        cost=cost,
        previous=resident(old),
        seed=question.seed,
    )


def _steps(question: DecisionInputs, found: Placement) -> tuple[list[MoveBatch], str]:
    """The batches that lead to a placement; or the reason if it cannot be reached."""
    old = question.layout
    if short := int(found.short(old.holders).sum()):
        return [], (
            f"{short} experts would have fewer than the {old.holders} holders of "
            f"--survive {old.holders - 1}"
        )
    slots = old.slots_per_device
    new = spread(found, old.devices, slots, question.counts, old, old.spare, old.holders)
    try:
        steps = migration.batches(old, new, most_loads(question.expert_bytes))
        return [batch for batch, _ in steps], ""
    except migration.NoEmptySlot as error:
        name = question.names[error.server]
        return [], f"device {error.device} of {name} has no empty slot to load an expert into"


def _loading_seconds(question: DecisionInputs, steps: list[MoveBatch]) -> float:
    return migration.migration_seconds(steps, question.expert_bytes, question.read_rates)


def _measured_cost(question: DecisionInputs, present: Placement) -> Cost:
    """The cost of a layer, adjusted to how often servers in lock step had tokens together.

    Servers that step on their own do not wait for other servers' tokens.
    """
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
    """Whether experts moved to the previous candidate would not have to move again now."""
    if before is None:
        return False
    seconds = [migration.seconds_per_token(each, judge, cost, weights) for each in (before, found)]
    error = migration.gain_error(before, found, judge, cost, weights)
    return seconds[0] - seconds[1] <= (HYSTERESIS + ERRORS * error) * seconds[0]


def resident(layout: Layout) -> Placement:
    """The placement of a layout."""
    return Placement(layout.resident)


def most_loads(expert_bytes: int) -> int:
    """Most experts that one device loads per batch, so that writing them does not delay a step.

    Spare slots do not bound this number: a device may have many more empty slots.
    """
    return max(1, min(BATCH_EXPERTS, BATCH_BYTES // expert_bytes))


def _weights(tokens_n: np.ndarray) -> np.ndarray | None:
    """Relative weight of each server's tokens; None (all equal) if there are no tokens."""
    mean = tokens_n.mean()
    return tokens_n / mean if mean > 0 else None

"""Placement problems of every kind, for hypothesis."""

import numpy as np
from hypothesis import strategies as st

SHAPES = [(3, 4, 8), (2, 1, 5), (1, 3, 4), (4, 2, 6)]


def draw_capacities(draw, rng, servers, total):
    """Slots of unequal servers, from just enough for all experts to more than everything."""
    spare = draw(st.sampled_from([0, 1, total // 3, total * servers]))
    weights = rng.gamma(draw(st.sampled_from([0.1, 5.0])), size=servers) + 1e-9
    capacities = rng.multinomial(total + spare, weights / weights.sum())
    # Slots above a whole copy of the model are of no use; the model must still fit.
    capacities[0] += max(0, total - int(np.minimum(capacities, total).sum()))
    return capacities


@st.composite
def problems(draw):
    """Counts of every kind, and capacities from just enough to more than everything."""
    servers, layers, experts = draw(st.sampled_from(SHAPES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (servers, layers, experts)
    counts = {
        "skewed": lambda: rng.gamma(0.2, size=shape),
        "few": lambda: rng.integers(0, 3, shape),
        "large": lambda: rng.integers(0, 2**40, shape),
        "flat": lambda: np.full(shape, 7),
        "zero": lambda: np.zeros(shape),
        "one expert": lambda: np.broadcast_to(np.arange(experts) == 1, shape) * 5,
        "layers differ": lambda: rng.gamma(rng.choice([0.02, 5.0], (1, layers, 1)), size=shape),
    }[
        draw(
            st.sampled_from(
                ["skewed", "few", "large", "flat", "zero", "one expert", "layers differ"]
            )
        )
    ]()
    return counts, draw_capacities(draw, rng, servers, layers * experts)

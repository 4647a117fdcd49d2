"""The compiled step updates its memory in place and reads the experts where they lie."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator

import jax
import numpy as np
import pytest

from dance_jax.engine.compile_cache import CompileCache
from dance_jax.engine.runner import Runner
from dance_jax.models import native
from dance_jax.placement.core import Placement, spread
from tests.cluster import tiny


@pytest.fixture(scope="module", params=["latent", "latent, experts in JAX", "recurrent"])
def alone(request: pytest.FixtureRequest, expert_library: pathlib.Path | None) -> Iterator[Runner]:
    """Every expert on one device, compiled as for users."""
    model, *in_jax = request.param.split(", ")
    resident = np.ones((1, tiny.LAYERS, tiny.EXPERTS), bool)
    layout = spread(Placement(resident), [1], [tiny.LAYERS * tiny.EXPERTS])
    with pytest.MonkeyPatch.context() as patch:
        if in_jax:
            patch.setattr(native, "usable", lambda: False)
        yield tiny.runner(layout, 0, model=model, compile_cache=CompileCache(None))


def _copies(hlo: str) -> Iterator[str]:
    """Shapes, as "2,3,4", of what is copied, also within fusions."""
    yield from re.findall(r"= \w+\[([\d,]*)\]\S* copy\(", hlo)
    # A start of an asynchronous copy has a tuple of shapes.
    for shapes in re.findall(r"= (\(.*?\)) copy-start\(", hlo):
        yield from re.findall(r"\w+\[([\d,]*)\]", shapes)


def _forbidden(arrays: list[jax.Array]) -> set[str]:
    """The shapes of the arrays on a device, with and without the axis of the devices."""
    shapes = {array.shape for array in arrays} | {array.shape[1:] for array in arrays}
    return {",".join(map(str, shape)) for shape in shapes}


@pytest.mark.parametrize("bucket", tiny.ENGINE.buckets)
def test_pool_and_cache_are_not_copied(alone: Runner, bucket: tuple[int, int]) -> None:
    text = alone.compile(bucket).as_text()
    # What a library must initialise first crashes when the step comes from the compile cache.
    called = set(re.findall(r'custom_call_target="([^"]+)"', text))
    assert all(name.startswith(("dance_jax.", "TopK")) for name in called), called
    copied = set(_copies(text))
    assert copied, "the pattern no longer finds any copy"
    assert not copied & _forbidden(
        [*jax.tree.leaves(alone.pools.argument), *jax.tree.leaves(alone.memory.cache)]
    )


def test_memory_is_updated_in_place(alone: Runner) -> None:
    text = alone.compile(tiny.DECODE).as_text()
    aliased = re.search(r"input_output_alias=\{(.*?)\}, entry", text)
    assert aliased is not None
    # Alone there is no link, and the credit of links is not an input of the compiled step.
    kept = jax.tree.leaves([alone.memory.cache, alone.memory.counts])
    assert aliased[1].count("may-alias") + aliased[1].count("must-alias") >= len(kept)

"""The compiled step updates its memory in place and does not copy the experts."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator

import jax
import numpy as np
import pytest

from dance_jax.engine.runner import Runner
from dance_jax.models import native
from dance_jax.placement.core import Placement
from dance_jax.placement.devices import spread
from tests.cluster import tiny
from tests.quick import OptimisingCache


@pytest.fixture(scope="module", params=["latent", "latent, experts in JAX", "recurrent"])
def alone(request: pytest.FixtureRequest, expert_library: pathlib.Path | None) -> Iterator[Runner]:
    """A runner with every expert on one device, compiled with the options of a server."""
    model, *in_jax = request.param.split(", ")
    resident = np.ones((1, tiny.LAYERS, tiny.EXPERTS), bool)
    layout = spread(Placement(resident), [1], [tiny.LAYERS * tiny.EXPERTS])
    with pytest.MonkeyPatch.context() as patch:
        if in_jax:
            patch.setattr(native, "usable", lambda: False)
        yield tiny.runner(layout, 0, model=model, compile_cache=OptimisingCache(None))


def _copies(hlo: str) -> Iterator[str]:
    """Shapes, such as "2,3,4", of copied arrays, including copies in fusions."""
    yield from re.findall(r"= \w+\[([\d,]*)\]\S* copy\(", hlo)
    # The start of an asynchronous copy has a tuple of shapes.
    for shapes in re.findall(r"= (\(.*?\)) copy-start\(", hlo):
        yield from re.findall(r"\w+\[([\d,]*)\]", shapes)


def _forbidden(arrays: list[jax.Array]) -> set[str]:
    """The arrays' shapes on a device, with and without the device axis."""
    shapes = {array.shape for array in arrays} | {array.shape[1:] for array in arrays}
    return {",".join(map(str, shape)) for shape in shapes}


@pytest.mark.parametrize("bucket", [tiny.DECODE, pytest.param(tiny.SLICE, marks=pytest.mark.slow)])
def test_pool_and_cache_are_not_copied(alone: Runner, bucket: tuple[int, int]) -> None:
    parts = alone.compile(bucket)
    texts = [part.as_text() for part in (parts.begin, *parts.layers, parts.logits, parts.choose)]
    # A call of a library that must be initialised first crashes in a step from the compile cache.
    called = set(re.findall(r'custom_call_target="([^"]+)"', "".join(texts)))
    assert all(name.startswith(("dance_jax.", "TopK")) for name in called), called
    copied = set(_copies("".join(texts)))
    assert copied, "the pattern no longer finds any copy"
    kept = jax.tree.leaves([alone.pools.argument, alone.memory.cache])
    # Scalars may be copied: the number of a pool that is in the C++ library's memory.
    assert not copied & _forbidden([array for array in kept if array.ndim > 1])


def test_memory_is_updated_in_place(alone: Runner) -> None:
    for index, layer in enumerate(alone.compile(tiny.DECODE).layers):
        aliased = re.search(r"input_output_alias=\{(.*?)\}, entry", layer.as_text())
        assert aliased is not None
        # A layer with experts also updates the step's record.
        kept = len(jax.tree.leaves(alone.memory.cache[index])) + ("expert" in layer.as_text())
        assert aliased[1].count("may-alias") + aliased[1].count("must-alias") >= kept


def test_layers_that_are_alike_are_compiled_once(alone: Runner) -> None:
    model = alone.model_config
    layers = alone.compile(tiny.DECODE).layers
    assert len({id(layer) for layer in layers}) == len(set(model.layers))

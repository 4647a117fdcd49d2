"""Every part of a step lowers for GPUs and TPUs in any weight format, without such a device."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

import jax
import numpy as np
import pytest

from dance_jax.engine.compile_cache import CompileCache
from dance_jax.engine.runner import Runner
from dance_jax.models import native
from dance_jax.models.build import fill, matrix_shapes
from dance_jax.models.experts import expert_format
from dance_jax.models.formats import Formats, WeightFormat
from dance_jax.models.random_weights import Held, random_trunk_tensors
from dance_jax.models.rounding import ROUNDED
from dance_jax.models.tensors import arrays_of, parts_of, trunk_rules
from dance_jax.placement.core import Placement
from dance_jax.placement.devices import spread
from tests.cluster import tiny

#: JAX's name of the backend -> JAX's name of the lowering platform.
PLATFORMS = {"gpu": "cuda", "tpu": "tpu"}
EXPERTS = ("w_gate", "w_up", "w_down")
#: dtypes of activations, of the experts' weights and of the trunk's weights, or names in ROUNDED.
KEPT = {
    "float32": ("float32", "float32", "float32"),
    "bfloat16": ("bfloat16", "bfloat16", "bfloat16"),
    "kept bfloat16": ("float32", "bfloat16", "bfloat16"),
    "kept float16": ("bfloat16", "float16", "float16"),
    "codes": ("bfloat16", "int4", "int8"),
    "codes in float32": ("float32", "mxfp4", "int4"),
}


def _form(name: str) -> WeightFormat:
    return ROUNDED[name] if name in ROUNDED else WeightFormat(name)


def make_runner(model: str, kept: str) -> Runner:
    """A runner with all experts on one device."""
    dtype, experts, trunk = KEPT[kept]
    config = tiny.MODELS[model]
    forms = {
        path: _form(trunk) if _form(trunk).fits(d_in) else WeightFormat(dtype)
        for path, (_, d_in, _) in matrix_shapes(config).items()
    }
    formats = Formats(dict.fromkeys(EXPERTS, _form(experts)), forms)
    rules = {rule.source: rule for rule in trunk_rules(config)}
    weights = (
        array
        for name, tensor in random_trunk_tensors(config, seed=0)
        for path, part in parts_of(rules[name], Held(tensor))
        for array in arrays_of(path, part, forms.get(path)).items()
    )
    everything = Placement(np.ones((1, tiny.LAYERS, tiny.EXPERTS), bool))
    return Runner(
        config,
        fill(config, dtype, weights, forms),
        expert_format(config, formats.experts),
        lambda pairs: [],
        spread(everything, [1], [tiny.LAYERS * tiny.EXPERTS]),
        0,
        dataclasses.replace(tiny.ENGINE, dtype=dtype),
        8,
        CompileCache(None),
    )


@pytest.fixture(params=["gpu", pytest.param("tpu", marks=pytest.mark.slow)])
def platform(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Within a test, lowering targets another platform and takes that platform's code paths."""
    name, lower = PLATFORMS[request.param], jax.stages.Traced.lower
    monkeypatch.setattr(jax, "default_backend", lambda: request.param)
    monkeypatch.setattr(
        jax.stages.Traced, "lower", lambda traced: lower(traced, lowering_platforms=(name,))
    )
    assert not native.usable(), "the library is of CPUs alone"
    yield name


@pytest.mark.parametrize(
    ("model", "kept"),
    [("latent", kept) for kept in KEPT]
    + [(model, kept) for model in ("grouped", "recurrent") for kept in ("bfloat16", "codes")],
)
def test_every_part_lowers(platform: str, model: str, kept: str) -> None:
    runner = make_runner(model, kept)
    # The largest bucket has both decode rows and slice rows.
    bucket = runner.config.buckets[-1]
    parts = {
        "begin": runner._lower_begin(bucket),
        "logits": runner._lower_logits(bucket),
        "write": runner.pools.lower_write(),
        "read": runner.pools._lower_read(),
    }
    # The choice of tokens from logits is the same in all formats of weights.
    if kept in ("float32", "bfloat16"):
        parts["choose"] = runner._lower_choose(bucket[0])
    parts |= {index: runner._lower_layer(bucket, index) for index in sorted(set(runner._like))}
    texts = {part: lowered.as_text() for part, lowered in parts.items()}
    assert not any("dance_jax." in text for text in texts.values()), "a call of the CPUs' library"
    # JAX's grouped product is used if it takes the weights as they are, otherwise the loop.
    activations, experts, _ = KEPT[kept]
    with_experts = {runner._like[index] for index in runner._moe}
    grouped = {part for part, text in texts.items() if "ragged_dot" in text}
    assert grouped == (with_experts if activations == experts else set())
    for index in with_experts:
        assert not _converted_pools(texts[index], runner)


def _converted_pools(text: str, runner: Runner) -> list[str]:
    """Operations that convert a whole pool to another dtype."""
    leaves = (leaf.shape[1:] for leaf in runner.pools.argument)
    shapes = {"x".join(map(str, shape)) for shape in leaves if len(shape) == 3}
    found = re.findall(r"stablehlo\.convert .*: \(tensor<([\dx]+)x\w+>\)", text)
    return [shape for shape in found if shape in shapes]

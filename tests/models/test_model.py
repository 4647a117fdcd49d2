"""Whole trunks with random weights: chunks, rows, dtypes, structure."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.families import SHAPES
from dance_jax.models import model_config
from dance_jax.models.build import fill, weight_shapes
from dance_jax.models.experts import expert_format
from dance_jax.models.formats import WeightFormat
from dance_jax.models.random_weights import random_expert_tensors
from dance_jax.models.tensors import trunk_rules
from tests.random_models import init_random, random_expert
from tests.tiny_models import DEEPSEEK, HYBRID, OSS


def random_moe(config, seed, make_runner):
    """`conftest.dense_moe` of random experts."""
    tensors, form = dict(random_expert_tensors(config, seed)), expert_format(config, "float32")
    pools = [
        tuple(
            map(
                np.stack,
                zip(
                    *(
                        random_expert(config, tensors, layer, expert, form)
                        for expert in range(config.num_experts)
                    ),
                    strict=True,
                ),
            )
        )
        for layer in range(len(config.moe_layers))
    ]
    return make_runner.dense_moe(form, pools)


@pytest.mark.parametrize("family", ["deepseek", "mixtral"])
def test_rows_at_different_positions_do_not_disturb_each_other(
    family, deepseek_fields, mixtral_fields, make_runner
):
    fields = deepseek_fields if family == "deepseek" else mixtral_fields | {"sliding_window": 6}
    config = model_config(fields)
    model, moe = init_random(config, 0), random_moe(config, 0, make_runner)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (3, 16))
    whole = make_runner(model, moe, rows=3, length=24)(tokens, [0, 0, 0])

    # The rows lag behind by 0, 4 and 8 tokens, in chunks of 4, so starts differ in every step.
    run = make_runner(model, moe, rows=3, length=24)
    for step in range(6):
        starts = [min(max(0, 4 * step - 4 * row), 12) for row in range(3)]
        chunk = np.stack([tokens[row, first : first + 4] for row, first in enumerate(starts)])
        logits = run(chunk, starts)
        for row, first in enumerate(starts):
            np.testing.assert_allclose(
                logits[row], whole[row, first : first + 4], rtol=0, atol=2e-5
            )


@pytest.mark.parametrize("fields", [DEEPSEEK, HYBRID, OSS], ids=["deepseek", "hybrid", "oss"])
def test_bfloat16_follows_float32(fields, make_runner):
    config = model_config(fields | {"tie_word_embeddings": True})
    moe = random_moe(config, 0, make_runner)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, 16))
    exact = make_runner(init_random(config, 0), moe)(tokens, [0])
    model = init_random(config, 0, "bfloat16")
    run = make_runner(model, moe)
    rough = run(tokens, [0])
    assert rough.dtype == np.float32
    kinds = {leaf.dtype for leaf in jax.tree.leaves(run.cached)}
    assert kinds == {jnp.dtype("bfloat16"), *[jnp.dtype("float32")] * bool(config.state_bytes)}
    assert model.layers[config.moe_layers[-1]].router.weight.form == WeightFormat("float32")
    assert np.corrcoef(exact.ravel(), rough.ravel())[0, 1] > 0.995


def test_shared_experts_are_optional(deepseek_fields):
    paths = weight_shapes(model_config(deepseek_fields | {"n_shared_experts": 0}), "float32")
    assert not [path for path in paths if "shared" in path]


def test_every_rule_fills_a_weight_and_every_weight_has_a_rule():
    for fields in SHAPES.values():
        config = model_config(fields)
        rules = trunk_rules(config)
        targets = [
            f"{target.path}.values" if target.matrix else target.path
            for rule in rules
            for target in rule.targets
        ]
        assert sorted(targets) == sorted(weight_shapes(config, "float32"))


def test_fill_refuses_what_does_not_fit(mixtral_fields):
    config = model_config(mixtral_fields)
    with pytest.raises(ValueError, match="missing"):
        fill(config, "float32", [])
    with pytest.raises(ValueError, match="unknown"):
        fill(config, "float32", [("nothing", np.zeros(1))])
    with pytest.raises(ValueError, match="shape"):
        fill(config, "float32", [("norm.weight", np.zeros(1))])

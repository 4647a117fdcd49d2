"""Logits and greedy tokens equal those of transformers (tests/reference/make_reference.py)."""

import pathlib

import numpy as np
import pytest

from tests.stacks import stacked

REFERENCE = pathlib.Path(__file__).parent.parent / "reference"
#: Tokens per slice of the prompt in each case: whole slices first, then single tokens.
CASES = {
    "deepseek_full": 12,
    "deepseek_lite": 32,
    "deepseek_tied": 12,
    "deepseek_v3": 12,
    "deepseek_yarn_plain": 12,
    "gemma4": 11,
    "glm4_moe": 12,
    "glm4_moe_lite": 12,
    "gpt_oss": 12,
    "kimi_k25": 12,
    "minimax_m2": 12,
    "mixtral": 12,
    "mixtral_llama3": 12,
    "mixtral_longrope_long": 12,
    "mixtral_longrope_short": 12,
    "mixtral_window": 12,
    "olmoe": 12,
    "qwen2_moe": 12,
    "qwen3_5_moe": 16,
    "qwen3_moe": 12,
    "qwen3_moe_sparse": 12,
    "qwen3_next": 32,
}
#: Largest difference of a logit in float32; larger for the delta net, because it divides by
#: lengths that may be small.
TOLERANCE, DELTA_TOLERANCE = 2e-4, 5e-4
#: Tokens of prompts that are also prefilled at once. In shorter ones, slices show the same.
LONG = 64


def test_all_cases_are_there():
    assert sorted(CASES) == sorted(path.parent.name for path in REFERENCE.glob("*/expected.npz"))


@pytest.mark.parametrize("name", CASES)
def test_prefill_and_decode_match_transformers(name, converted_references, make_runner):
    checkpoint = converted_references(name)
    config, form = checkpoint.config, checkpoint.form("float32")
    pools = [
        stacked(checkpoint, [(layer, e) for e in range(config.num_experts)])
        for layer in range(len(config.moe_layers))
    ]
    moe = make_runner.dense_moe(form, pools)
    expected = np.load(REFERENCE / name / "expected.npz")
    prompt = expected["prompt"].tolist()
    # longrope in transformers depends on the current sequence; here on the longest one served.
    context = 256 if name.endswith("_long") else len(prompt) + len(expected["greedy"])
    run = make_runner(checkpoint.trunk("float32"), moe, context=context)
    tolerance = DELTA_TOLERANCE if config.state_bytes else TOLERANCE

    def compare(found, wanted):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance)

    if len(prompt) > LONG:
        compare(run([prompt], [0])[0], expected["prefill"])
    size = CASES[name]
    whole = len(prompt) // size * size
    starts = [*range(0, whole, size), *range(whole, len(prompt))]
    for begin, end in zip(starts, [*starts[1:], len(prompt)], strict=True):
        compare(run([prompt[begin:end]], [begin])[0], expected["prefill"][begin:end])
    for position, token in enumerate(prompt):
        logits = run([[token]], [position])[0, 0]
        compare(logits, expected["prefill"][position])
    greedy = []
    for step in range(len(expected["greedy"])):
        greedy.append(int(logits.argmax()))
        logits = run([greedy[-1:]], [len(prompt) + step])[0, 0]
        compare(logits, expected["decode"][step])
    assert greedy == expected["greedy"].tolist()

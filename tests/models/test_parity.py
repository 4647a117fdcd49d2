"""Logits and greedy tokens equal those of transformers (tests/reference/make_reference.py)."""

import pathlib

import numpy as np
import pytest

REFERENCE = pathlib.Path(__file__).parent.parent / "reference"
CASES = sorted(path.parent.name for path in REFERENCE.glob("*/expected.npz"))
#: Largest difference of a logit in float32.
TOLERANCE = 2e-4


def test_all_cases_are_there():
    assert CASES == [
        "deepseek_full",
        "deepseek_lite",
        "deepseek_tied",
        "deepseek_yarn_plain",
        "mixtral",
        "mixtral_window",
    ]


@pytest.mark.parametrize("name", CASES)
def test_prefill_and_decode_match_transformers(name, converted_references, make_runner):
    checkpoint = converted_references(name)
    config = checkpoint.config
    pools = [
        checkpoint.experts([(layer, e) for e in range(config.num_experts)], "float32")
        for layer in range(len(config.moe_layers))
    ]
    run = make_runner(checkpoint.trunk("float32"), make_runner.dense_moe(pools))
    expected = np.load(REFERENCE / name / "expected.npz")
    prompt = expected["prompt"]

    prefill = run([prompt], [0])[0]
    np.testing.assert_allclose(prefill, expected["prefill"], rtol=0, atol=TOLERANCE)
    logits, greedy = prefill[-1], []
    for step in range(len(expected["greedy"])):
        greedy.append(int(logits.argmax()))
        logits = run([greedy[-1:]], [len(prompt) + step])[0, 0]
        np.testing.assert_allclose(logits, expected["decode"][step], rtol=0, atol=TOLERANCE)
    assert greedy == expected["greedy"].tolist()
    print(f"{name}: {np.abs(prefill - expected['prefill']).max():.2e}")

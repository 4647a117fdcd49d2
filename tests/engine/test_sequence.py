"""SamplingParams: vLLM's defaults, and a UserError that names the invalid field."""

import msgspec
import numpy as np
import pytest

from dance_jax.config import UserError
from dance_jax.engine.sequence import (
    CompletionOutput,
    Logprob,
    Request,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
    Sequence,
    sample_seed,
)


def test_defaults_are_vllms():
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.min_p) == (
        1,
        1,
        1,
        0,
        0,
    )
    assert (params.seed, params.stop, params.stop_token_ids, params.logprobs) == (
        None,
        [],
        [],
        None,
    )
    assert (params.max_tokens, params.min_tokens, params.ignore_eos) == (16, 0, False)
    assert params.repetition_penalty == 1
    assert SamplingParams(stop="x").stop == ["x"]
    assert SamplingParams(seed=-1).seed is None


def test_numbers_of_numpy_cross_processes():
    given = {
        "n": np.int64(2),
        "seed": np.int64(2),
        "top_p": np.float32(0.5),
        "logprobs": np.int8(3),
    }
    params = SamplingParams(**given, stop_token_ids=list(np.arange(3)))
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams)
    assert (
        again
        == params
        == SamplingParams(n=2, seed=2, top_p=0.5, logprobs=3, stop_token_ids=[0, 1, 2])
    )


@pytest.mark.parametrize(
    "field, value",
    [
        ("n", 0),
        ("presence_penalty", 2.1),
        ("presence_penalty", float("nan")),
        ("frequency_penalty", -2.1),
        ("frequency_penalty", "1"),
        ("logit_bias", [1]),
        ("logit_bias", {1: 101}),
        ("logit_bias", {-1: 1}),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {token: 1 for token in range(301)}),
        ("n", 1.5),
        ("n", 10**9),
        ("temperature", 10**400),
        ("max_tokens", 2**31),
        ("stop_token_ids", [2**70]),
        ("n", True),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_k", -2),
        ("top_k", 2.0),
        ("min_p", -0.1),
        ("min_p", 2),
        ("seed", "one"),
        ("seed", 2**64),
        ("stop", ["a", ""]),
        ("stop", [3]),
        ("stop", 3),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", ["a"]),
        ("stop_token_ids", 5),
        ("max_tokens", -1),
        ("min_tokens", -1),
        ("bad_words", [" "]),
        ("bad_words", "no"),
        ("allowed_token_ids", []),
        ("allowed_token_ids", [-1]),
        ("truncate_prompt_tokens", 0),
        ("truncate_prompt_tokens", -2),
        ("prompt_logprobs", 21),
        ("skip_special_tokens", 1),
        ("structured_outputs", {"regex": "a"}),
        ("min_tokens", 17),
        ("ignore_eos", 1),
        ("logprobs", -1),
        ("logprobs", 21),
        ("repetition_penalty", 0),
        ("repetition_penalty", float("inf")),
    ],
)
def test_wrong_values_name_the_field(field, value):
    with pytest.raises(UserError, match=rf"SamplingParams\.{field}\b"):
        SamplingParams(**{field: value})


def test_fields_that_do_not_go_together():
    with pytest.raises(UserError, match=r"SamplingParams\.n\b"):
        SamplingParams(n=2, temperature=0)
    SamplingParams(stop_token_ids=list(range(100)))


def test_limits_and_numpy_numbers_are_fine():
    SamplingParams(
        top_k=-1, top_p=np.float32(0.5), seed=2**64 - 1, max_tokens=None, min_tokens=40, logprobs=20
    )
    SamplingParams(n=np.int64(3), seed=-(2**63))


def test_a_change_is_checked_by_a_copy():
    params = SamplingParams()
    params.top_p = 3
    with pytest.raises(UserError, match="top_p"):
        msgspec.structs.replace(params)


def test_everything_crosses_processes():
    request = Request("1", "hello", [1, 2], SamplingParams(stop="a", seed=4, logprobs=1))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=Request) == request
    sample = CompletionOutput(0, "hi", [5], -1.5, [{5: Logprob(-1.5, 2, "hi")}], "stop", "a")
    output = RequestOutput("1", None, [1, 2], [sample], True, RequestMetrics(1.0, 1.5, 3.0))
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(output), type=RequestOutput)
    assert again == output
    assert (again.metrics.ttft_s, again.metrics.e2e_s) == (0.5, 2.0)


def test_sequence_hands_out_prompt_and_output_as_one():
    sequence = Sequence("1", 0, [1, 2, 3], SamplingParams(), 16, 0)
    sequence.output_token_ids += [4, 5]
    known = [1, 2, 3, 4, 5]
    for start in range(5):
        for count in range(1, 6):
            assert sequence.tokens(start, count) == known[start : start + count]


def test_sample_seeds_differ():
    seeds = {sample_seed(seed, index) for seed in range(-20, 20) for index in range(20)}
    assert len(seeds) == 40 * 20
    assert all(0 <= seed < 2**32 for seed in seeds)

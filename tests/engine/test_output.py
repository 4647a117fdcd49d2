"""The tracker's deltas add up to RequestOutputs; no model is used."""

import re

import pytest

from dance_jax.engine.output import RequestTracker
from dance_jax.engine.sequence import Request, RequestOutput, SamplingParams

EOS = 0


class Letters:
    """A decoder in which token i is the i-th letter and EOS has no text."""

    def decode(self, ids, skip_special_tokens=True):
        end = "" if skip_special_tokens else "</s>"
        return "".join(end if i == EOS else chr(96 + i) for i in ids)

    def encode(self, text, add_special_tokens=True):
        return [ord(letter) - 96 for letter in text.strip()]


def run(params, tokens, prompt=(1, 2), max_model_len=64, eos=(EOS,)):
    """The output of a request whose samples all get these tokens, and sample 0's tokens used."""
    tracker = RequestTracker(Letters(), max_model_len, 27, eos, seed=3)
    request = Request("r", None, list(prompt), params)
    output = RequestOutput.of(request)
    sequences, deltas = tracker.open(request)
    for delta in deltas:
        output.add(delta)
    for sequence in sequences:
        for token in tokens:
            top = [(5, -0.1), (token, -0.5), (9, -3.0)]
            delta = tracker.append(sequence, token, -0.5, 2, top)
            output.add(delta)
            if delta.finish_reason is not None:
                break
    return output


def test_length():
    output = run(SamplingParams(max_tokens=3), [1, 2, 3, 4])
    sample = output.outputs[0]
    assert (sample.text, sample.token_ids) == ("abc", [1, 2, 3])
    assert (sample.finish_reason, sample.stop_reason) == ("length", None)
    assert sample.cumulative_logprob == -1.5 and sample.logprobs is None
    metrics = output.metrics
    assert output.finished and 0 <= metrics.ttft_s <= metrics.e2e_s


@pytest.mark.parametrize(
    "params, text, count, stop_reason",
    [
        (dict(), "ab", 3, None),
        (dict(stop_token_ids=[2]), "a", 2, 2),
        (dict(ignore_eos=True, stop_token_ids=[3]), "abab", 6, 3),
        (dict(ignore_eos=True, stop_token_ids=[0]), "ab", 3, 0),
        (dict(min_tokens=4), "ababc", 7, None),
        (dict(stop="b"), "a", 2, "b"),
        (dict(stop=["abc", "zz"], min_tokens=4), "ab", 6, "abc"),
        (dict(stop="ba", ignore_eos=True), "a", 4, "ba"),
        (dict(include_stop_str_in_output=True, skip_special_tokens=False), "ab</s>", 3, None),
        (dict(include_stop_str_in_output=True), "ab", 3, None),
        (dict(include_stop_str_in_output=True, stop_token_ids=[2]), "ab", 2, 2),
        (dict(include_stop_str_in_output=True, stop=["b"]), "ab", 2, "b"),
        (dict(ignore_eos=True, skip_special_tokens=False, stop="c"), "ab</s>ab", 6, "c"),
    ],
)
def test_stops(params, text, count, stop_reason):
    tokens = [1, 2, EOS, 1, 2, 3, EOS]
    sample = run(SamplingParams(max_tokens=7, **params), tokens).outputs[0]
    assert (sample.text, len(sample.token_ids)) == (text, count)
    assert (sample.finish_reason, sample.stop_reason) == ("stop", stop_reason)


def test_output_is_cut_to_the_context():
    for max_tokens in (None, 50):
        sample = run(SamplingParams(max_tokens=max_tokens), [1] * 99, max_model_len=10).outputs[0]
        assert (len(sample.token_ids), sample.finish_reason) == (8, "length")
    assert run(SamplingParams(), [1], [1] * 9, 10).outputs[0].text == "a"


def test_no_output_at_all():
    sample = run(SamplingParams(max_tokens=0), [1]).outputs[0]
    assert (sample.text, sample.token_ids, sample.finish_reason) == ("", [], "length")


@pytest.mark.parametrize(
    "params, prompt, reason",
    [
        (SamplingParams(n=2), [], "empty"),
        (SamplingParams(), [1] * 64, "64 tokens.*context of 64"),
        (SamplingParams(), [1, 27], "token id 27; valid ids are 0..26"),
        (SamplingParams(), [-1], "token id -1"),
        (SamplingParams(stop_token_ids=[40]), [1], "stop_token_ids has 40"),
    ],
)
def test_what_cannot_run_says_why(params, prompt, reason):
    output = run(params, [1], prompt)
    assert output.finished and len(output.outputs) == params.n
    for sample in output.outputs:
        assert sample.finish_reason == "error"
        assert re.search(reason, sample.stop_reason)
    assert output.metrics.ttft_s is None and output.metrics.e2e_s >= 0


def test_logprobs_hold_the_token_and_the_most_likely():
    sample = run(SamplingParams(max_tokens=2, logprobs=1), [7, 5]).outputs[0]
    first, second = sample.logprobs
    assert {token: (p.logprob, p.rank, p.decoded_token) for token, p in first.items()} == {
        7: (-0.5, 2, "g"),
        5: (-0.1, 1, "e"),
    }
    assert list(second) == [5]
    alone = run(SamplingParams(max_tokens=1, logprobs=0), [7]).outputs[0]
    assert [list(place) for place in alone.logprobs] == [[7]]


def test_samples_and_seeds():
    tracker = RequestTracker(Letters(), 64, 27, (EOS,), seed=3)
    other = RequestTracker(Letters(), 64, 27, (EOS,), seed=3, rank=1)

    def seeds(tracker, name, **fields):
        sequences, _ = tracker.open(Request(name, None, [1], SamplingParams(**fields)))
        return [sequence.seed for sequence in sequences]

    first = seeds(tracker, "a", n=3)
    assert len({*first, *seeds(tracker, "b", n=3), *seeds(other, "a", n=3)}) == 9
    assert seeds(tracker, "c", n=2, seed=5) == seeds(other, "c", n=2, seed=5)
    again = RequestTracker(Letters(), 64, 27, (EOS,), seed=3)
    assert seeds(again, "x", n=3) == first


def test_end_from_outside_gives_out_the_held_text():
    tracker = RequestTracker(Letters(), 64, 27, (EOS,))
    request = Request("r", None, [1], SamplingParams(n=2, stop="ab"))
    output = RequestOutput.of(request)
    sequences, _ = tracker.open(request)
    assert tracker.append(sequences[0], 1, -1.0).text == ""
    output.add(tracker.end(sequences[0], "abort"))
    assert not output.finished
    output.add(tracker.end(sequences[1], "error", "the engine died"))
    first, second = output.outputs
    assert (first.text, first.finish_reason) == ("a", "abort")
    assert (second.finish_reason, second.stop_reason) == ("error", "the engine died")
    assert output.finished
    assert not tracker.open(request)[1], "its id is free again"


def test_an_id_in_use_is_refused():
    tracker = RequestTracker(Letters(), 64, 27, (EOS,))
    request = Request("r", None, [1], SamplingParams())
    tracker.open(request)
    sequences, deltas = tracker.open(request)
    assert not sequences and "in use" in deltas[0].stop_reason


@pytest.mark.parametrize("params", [dict(), dict(stop="ca", n=2), dict(stop="abca", min_tokens=3)])
@pytest.mark.parametrize("border", range(1, 6))
def test_another_engine_goes_on_where_one_ended(params, border):
    """Deltas of both engines add up to those of one, wherever the first engine stops."""
    tokens = [1, 2, 3, 1, 2, 3, 4, 5]
    params = SamplingParams(max_tokens=8, seed=5, **params)
    expected = run(params, tokens)
    request = Request("r", None, [1, 2], params)
    output = RequestOutput.of(request)
    resumed: list = [[] for _ in range(params.n)]
    for steps in (border, len(tokens)):
        tracker = RequestTracker(Letters(), 64, 27, (EOS,), seed=3)
        request.resumed = resumed
        sequences, _ = tracker.open(request)
        assert [s.index for s in sequences] == [i for i, r in enumerate(resumed) if r is not None]
        for sequence in sequences:
            while len(sequence.output_token_ids) < steps:
                token = tokens[len(sequence.output_token_ids)]
                delta = tracker.append(sequence, token, -0.5, 2)
                output.add(delta)
                if delta.finish_reason is not None:
                    break
        resumed = [None if sample.finished else list(sample.token_ids) for sample in output.outputs]
        if all(each is None for each in resumed):
            break
    for ours, wanted in zip(output.outputs, expected.outputs, strict=True):
        assert (ours.text, ours.token_ids) == (wanted.text, wanted.token_ids)
        assert (ours.finish_reason, ours.stop_reason) == (wanted.finish_reason, wanted.stop_reason)


def test_biases_of_unknown_tokens_are_refused():
    output = run(SamplingParams(logit_bias={26: 1.0, 27: 1.0}), [1])
    assert output.outputs[0].finish_reason == "error"
    assert "logit_bias has token id 27" in output.outputs[0].stop_reason

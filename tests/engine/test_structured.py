"""Outputs follow their structure token by token, whatever else restricts them."""

import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dance_jax.config import UserError
from dance_jax.engine import structured
from dance_jax.engine.allowed import Allowed, num_words, words_of
from dance_jax.engine.output import RequestTracker
from dance_jax.engine.sequence import Request, RequestOutput, SamplingParams
from dance_jax.engine.structured import StructuredOutputsParams, Structures
from dance_jax.models.directory import demo_dir
from dance_jax.models.tokenizer import Tokenizer

TOKENIZER = Tokenizer.load(demo_dir())
VOCAB = TOKENIZER.vocab_size
EOS = TOKENIZER.eos_token_ids
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 9},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "ä"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def is_person(text):
    found = json.loads(text)
    return {*found} == {"name", "age", "tags"} and 0 <= found["age"] <= 150


STRUCTURES = [
    (dict(json=PERSON), is_person),
    (dict(json=json.dumps(PERSON)), is_person),
    (dict(regex="[a-f]{2,4}-[0-9]+x"), lambda text: re.fullmatch("[a-f]{2,4}-[0-9]+x", text)),
    (dict(choice=["yes", "no", 'ma"ybe']), lambda text: text in ("yes", "no", 'ma"ybe')),
    # Special tokens are not text: these are written with others.
    (dict(choice=["a<|end|>b", "<|begin|>"]), lambda text: text in ("a<|end|>b", "<|begin|>")),
    (dict(grammar='root ::= "(" root ")" | "x"'), lambda text: re.fullmatch(r"\(*x\)*", text)),
    (dict(grammar='start: "a" B*\nB: /[bc]/'), lambda text: re.fullmatch("a[bc]*", text)),
]


def bits(words):
    return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))


def ready(sequence):
    sequence.structure.error  # noqa: B018, waits for the matcher
    assert sequence.ready
    return sequence


def write(tracker, request, rng, most=400, output=None):
    """Write random tokens that are allowed, until the output ends or has `most` more tokens."""
    output = output or RequestOutput.of(request)
    (sequence,), _ = tracker.open(request)
    ready(sequence)
    for _ in range(most):
        words = np.zeros(num_words(VOCAB), np.int32)
        sequence.allowed.fill(words, sequence.output_token_ids)
        assert sequence.error is None
        # Short tokens: a long string of the vocabulary would often fill the output at once.
        allowed = bits(words)
        token = int(rng.choice(allowed[: max(1, len(allowed) // 2)]))
        output.add(tracker.append(sequence, token, 0.0))
        if output.finished:
            break
    return output


def new_tracker():
    return RequestTracker(TOKENIZER, 1024, VOCAB, EOS)


@given(st.sampled_from(STRUCTURES), st.integers(0, 2**32 - 1), st.integers(0, 6))
def test_random_outputs_follow_their_structure(structure, seed, lost_after):
    """Also if the engine is lost on the way, and another one goes on."""
    fields, follows = structure
    params = SamplingParams(max_tokens=400, structured_outputs=StructuredOutputsParams(**fields))
    rng = np.random.default_rng(seed)
    request = Request("r", None, [5], params)
    output = write(new_tracker(), request, rng, lost_after)
    if not output.finished:
        request.resumed = [[*output.outputs[0].token_ids]]
        output = write(new_tracker(), request, rng, output=output)
    sample = output.outputs[0]
    assert sample.finish_reason == "length" or follows(sample.text), sample.text
    assert sample.finish_reason == "stop" or len(sample.token_ids) == 400


def test_the_structure_begins_after_what_the_model_thinks():
    structure = StructuredOutputsParams(choice=["yes"], begins_after="</think>")
    tracker = new_tracker()
    params = SamplingParams(max_tokens=99, structured_outputs=structure)
    (sequence,), _ = tracker.open(Request("r", None, [5], params))
    ready(sequence)
    for token in TOKENIZER.encode("so</think>", add_special_tokens=False):
        assert not sequence.allowed.restricts(0)
        tracker.append(sequence, token, 0.0)
    text = ""
    while True:
        words = np.zeros(num_words(VOCAB), np.int32)
        sequence.allowed.fill(words, ())
        delta = tracker.append(sequence, int(bits(words)[0]), 0.0)
        text += delta.text
        if delta.finish_reason is not None:
            break
    assert (text, delta.finish_reason) == ("yes", "stop")


@pytest.mark.parametrize("fields, _", STRUCTURES)
def test_a_model_may_think_first_or_not(fields, _):
    structure = StructuredOutputsParams(**fields, may_begin_with=["<think>", "</think>"])
    structure.check()
    matcher = Structures(TOKENIZER, VOCAB, EOS).matcher(structure).result()
    start = {"json": "{", "regex": "a", "grammar": ""}.get(next(iter(fields)))
    start = fields["choice"][0][:1] if start is None else start
    for text in (start, "<think>", f"<think>so, no</think>\n\n{start}"):
        assert matcher.deep_copy().consume_tokens(TOKENIZER.encode(text, False)), text
    for text in ("so", "<think>so</think>so"):
        assert not matcher.deep_copy().consume_tokens(TOKENIZER.encode(text, False)), text


@pytest.mark.parametrize("marker", ["<tool_call>", 7])
def test_a_model_may_call_a_tool_instead(marker):
    structure = StructuredOutputsParams(
        choice=["yes"], may_begin_with=["<think>", "</think>"], unless_begins_with=marker
    )
    matcher = Structures(TOKENIZER, VOCAB, EOS).matcher(structure).result()
    call = [marker] if marker == 7 else TOKENIZER.encode(marker, False)
    yes, any_text = (TOKENIZER.encode(text, False) for text in ("yes", '{"a": [[]'))
    thought = TOKENIZER.encode("<think>so</think>\n", False)
    for output in (yes, thought + yes, [*call, *any_text], [*thought, *call, *any_text, EOS[0]]):
        assert matcher.deep_copy().consume_tokens(output)
    assert not matcher.deep_copy().consume_tokens([*yes, *call])


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({}, "exactly one of json, .*got none"),
        (dict(regex="a", json_object=True), "got json_object, regex"),
        (dict(regex="a("), "unclosed group"),
        (dict(regex="a(?=b)"), "look-around"),
        (dict(json={"type": "thing"}), "Invalid type: thing"),
        (dict(json='{"type"'), "not a JSON schema"),
        (dict(json="7"), "not a JSON schema"),
        (dict(json="[" * 100_000), "not a JSON schema"),
        (dict(regex="a" * 100_000), "at most"),
        (dict(regex=5), "must be a text"),
        (dict(choice="yes"), "must be a list of texts"),
        (dict(json={"not": {}}), 'Unimplemented keys: ."not"'),
        (dict(grammar="start: nothing"), "unknown name"),
        (dict(grammar='root ::= "a'), "structured_outputs"),
        (dict(choice=[]), "must be a list of texts"),
        (dict(choice=[1]), "must be a list of texts"),
    ],
)
def test_wrong_structures_say_why(fields, reason):
    with pytest.raises(UserError, match=reason):
        StructuredOutputsParams(**fields).check()


def test_a_structure_with_too_many_ways_ends_the_request(monkeypatch):
    monkeypatch.setattr(structured, "_PATIENCE_S", 0.02)
    grammar = 'start: a\na: a a | "x" | "y"'
    params = SamplingParams(structured_outputs=StructuredOutputsParams(grammar=grammar))
    (sequence,), _ = new_tracker().open(Request("r", None, [5], params))
    x = TOKENIZER.encode("x", False)[0]
    for _ in range(400):
        sequence.allowed.fill(np.zeros(num_words(VOCAB), np.int32), ())
        if sequence.error:
            break
        sequence.structure.append(x)
    assert "ambiguity" in sequence.error


def test_a_structure_that_cannot_be_followed_ends_the_request():
    params = SamplingParams(structured_outputs=StructuredOutputsParams(regex="a("))
    (sequence,), _ = new_tracker().open(Request("r", None, [5], params))
    ready(sequence)
    sequence.allowed.fill(np.zeros(num_words(VOCAB), np.int32), ())
    assert "unclosed group" in sequence.error


def allowed_after(output, **fields):
    words = np.zeros(num_words(70), np.int32)
    Allowed(70, **fields).fill(words, output)
    return {*bits(words).tolist()}


def test_restrictions_hold_together():
    everything = {*range(70)}
    assert allowed_after([]) == everything
    assert allowed_after([], only=[3, 69]) == {3, 69}
    assert allowed_after([], never=[[3], [69]]) == everything - {3, 69}
    assert allowed_after([1, 2], never=[[1, 2, 3], [2, 4], [9, 2, 5]]) == everything - {3, 4}
    assert allowed_after([1], ends=[0], until=2) == everything - {0}
    assert allowed_after([1, 1], ends=[0], until=2) == everything
    # What would leave nothing is not applied.
    assert allowed_after([], only=[3], never=[[3]]) == {3}
    assert allowed_after([], only=[0], ends=[0], until=2) == {0}
    assert not Allowed(70, ends=[0], until=2).restricts(2)
    assert bits(words_of([0, 31, 32, 69], 70)).tolist() == [0, 31, 32, 69]


def test_bad_words_are_excluded_with_and_without_a_space():
    tracker = new_tracker()
    (sequence,), _ = tracker.open(Request("r", None, [5], SamplingParams(bad_words=["the"])))
    words = np.zeros(num_words(VOCAB), np.int32)
    sequence.allowed.fill(words, ())
    assert {TOKENIZER.decode([token]) for token in {*range(VOCAB)} - {*bits(words)}} == {
        "the",
        " the",
    }

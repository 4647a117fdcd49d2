"""Incremental text equals the whole text, character by character, and never has a stop string."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dance_jax.engine.detokenizer import Detokenizer

TEXTS = [
    "नमस्ते दुनिया, यह एक परीक्षण है।",
    "emoji 👩‍👩‍👧‍👦 and 🇮🇳, then 🎉🎉",
    "Grüße, 你好, שלום!",
    "plain words, plain spaces  and\nlines",
]


class CountingDecoder:
    """Counts the tokens it decodes."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.decoded = 0

    def decode(self, ids, skip_special_tokens=True):
        self.decoded += len(ids)
        return self.tokenizer.decode(ids)


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level BPE with 256 bytes and a few merges: most characters span several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


@pytest.fixture(scope="module")
def bytes_of(tokenizer):
    """Byte -> token id, regardless of merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = iter(range(256, 512))
    letters = {b: chr(b) if b in printable else chr(next(shifted)) for b in range(256)}
    assert sorted(letters.values()) == alphabet
    return {byte: tokenizer.token_to_id(letter) for byte, letter in letters.items()}


@pytest.fixture(scope="module")
def sentencepiece():
    """Metaspace with byte fallback, like Mixtral's tokenizer."""
    vocab = {"<unk>": 0}
    for piece in [*(f"<0x{b:02X}>" for b in range(256)), "▁", "▁hello", "▁world", "h", "i"]:
        vocab[piece] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def pieces(detokenizer, ids):
    """The text that each token adds, then the rest."""
    found = []
    for token in ids:
        found.append(detokenizer.append(token))
        if detokenizer.stopped_by is not None:
            break
    return [*found, detokenizer.finish()]


@pytest.mark.parametrize("text", TEXTS)
def test_whole_characters_as_soon_as_they_are_there(tokenizer, text):
    ids = tokenizer.encode(text).ids
    detokenizer = Detokenizer(tokenizer)
    so_far = ""
    for count, token in enumerate(ids, 1):
        new = detokenizer.append(token)
        so_far += new
        assert "\ufffd" not in new
        assert so_far == tokenizer.decode(ids[:count]).rstrip("\ufffd")
    assert so_far == text and detokenizer.finish() == ""


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd")))
def test_any_text_by_bytes(tokenizer, bytes_of, text):
    ids = [bytes_of[byte] for byte in text.encode()]
    parts = pieces(Detokenizer(tokenizer), ids)
    assert "".join(parts) == text
    assert all("\ufffd" not in part for part in parts)


@settings(max_examples=150, deadline=None)
@given(raw=st.binary(max_size=80))
def test_invalid_bytes_are_shown_as_such_and_disturb_nothing(tokenizer, bytes_of, raw):
    ids = [bytes_of[byte] for byte in raw]
    text = "".join(pieces(Detokenizer(tokenizer), ids))
    whole = tokenizer.decode(ids)
    assert text == whole.rstrip("\ufffd") + "\ufffd" * (len(text) - len(text.rstrip("\ufffd")))
    assert whole.startswith(text)


def test_invalid_bytes_forever(tokenizer, bytes_of):
    ids = [bytes_of[0x80]] * 500 + [bytes_of[byte] for byte in "ह".encode()]
    counting = CountingDecoder(tokenizer)
    parts = pieces(Detokenizer(counting), ids)
    assert "".join(parts) == "\ufffd" * 500 + "ह"
    assert len("".join(parts[:400])) > 380
    assert counting.decoded < 100 * len(ids)


def test_an_incomplete_character_at_the_end_is_dropped(tokenizer, bytes_of):
    ids = [bytes_of[byte] for byte in "aह".encode()[:-1]]
    assert "".join(pieces(Detokenizer(tokenizer), ids)) == "a"


def test_output_that_completes_the_prompts_character(tokenizer, bytes_of):
    first, *rest = [bytes_of[byte] for byte in "ह!".encode()]
    prompt = [bytes_of[ord("a")], first]
    assert "".join(pieces(Detokenizer(tokenizer, prompt), rest)) == "ह!"


def test_cost_per_token_is_constant(tokenizer):
    ids = tokenizer.encode(" ".join(TEXTS) * 20).ids
    counting = CountingDecoder(tokenizer)
    pieces(Detokenizer(counting), ids)
    assert counting.decoded < 15 * len(ids)


def test_byte_fallback_and_leading_spaces(sentencepiece):
    id_of = sentencepiece.token_to_id
    ids = [id_of("▁world"), *(id_of(f"<0x{b:02X}>") for b in "हि🎉".encode()), id_of("▁hello")]
    parts = pieces(Detokenizer(sentencepiece, [id_of("▁hello")]), ids)
    assert "".join(parts) == " worldहि🎉 hello"
    assert parts[-2:] == [" hello", ""]
    assert all("\ufffd" not in part for part in parts)
    assert "".join(pieces(Detokenizer(sentencepiece), ids)) == "worldहि🎉 hello"


def test_tokens_that_never_end_with_a_character(tokenizer):
    """Byte-level BPE learns such tokens from Indic scripts: a character's end, the next's lead."""

    class Shifted:
        raw = "नमस्तेदुनियायहएकपरीक्षण".encode() * 4

        def decode(self, ids, skip_special_tokens=True):
            start = 1 + 3 * ids[0] if ids else 0
            return self.raw[start : start + 3 * len(ids)].decode(errors="replace")

    text = "नमस्तेदुनियायहएकपरीक्षण" * 4
    parts = pieces(Detokenizer(Shifted()), range(len(text)))
    assert "".join(parts) == "\ufffd\ufffd" + text[1:]
    assert all(len(part) == 1 for part in parts[2:-1])


def naive_stop(text, stops):
    """(text before the stop string that is complete first, that stop string)."""
    for end in range(len(text) + 1):
        found = [(text[:end].find(stop), stop) for stop in stops if stop in text[:end]]
        if found:
            at, stop = min(found, key=lambda place: place[0])
            return text[:at], stop
    return text, None


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("abह🎉", max_size=30),
    stops=st.lists(st.text("abह🎉", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stop_strings_across_tokens(tokenizer, bytes_of, text, stops):
    ids = [bytes_of[byte] for byte in text.encode()]
    detokenizer = Detokenizer(tokenizer, stop=stops)
    parts = pieces(detokenizer, ids)
    assert ("".join(parts), detokenizer.stopped_by) == naive_stop(text, stops)


def test_a_stop_string_inside_one_token():
    class Words:
        words = ("one ", "two END three", " four")

        def decode(self, ids, skip_special_tokens=True):
            return "".join(self.words[i] for i in ids)

    detokenizer = Detokenizer(Words(), stop=["END"])
    assert pieces(detokenizer, [0, 1, 2]) == ["one ", "two ", ""]
    assert detokenizer.stopped_by == "END"


def test_nothing_of_a_possible_stop_string_is_streamed(tokenizer):
    ids = tokenizer.encode("abcSTOx STOP more").ids
    detokenizer = Detokenizer(tokenizer, stop=["STOP"])
    so_far = ""
    for token in ids:
        so_far += detokenizer.append(token)
        assert not so_far.endswith(("S", "ST", "STO"))
        if detokenizer.stopped_by:
            break
    assert so_far == "abcSTOx "
    unfinished = Detokenizer(tokenizer, stop=["STOP"])
    assert "".join(pieces(unfinished, tokenizer.encode("an STO").ids)) == "an STO"


def test_stop_strings_within_min_tokens_do_not_count(tokenizer, bytes_of):
    ids = [bytes_of[ord(letter)] for letter in "xxaxxb"]
    detokenizer = Detokenizer(tokenizer, stop=["xx"], min_tokens=2)
    assert "".join(pieces(detokenizer, ids)) == "xxa"
    detokenizer = Detokenizer(tokenizer, stop=["xx"], min_tokens=1)
    assert "".join(pieces(detokenizer, ids)) == ""

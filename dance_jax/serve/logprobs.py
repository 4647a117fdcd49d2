"""Conversion of the engine's logprobs to the formats of OpenAI's two APIs."""

from __future__ import annotations

from collections.abc import Sequence

from dance_jax.engine.sequence import Logprob, OutputDelta
from dance_jax.serve.answers import (
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TokenLogprob,
    TopLogprob,
)

#: Written for -inf, which JSON cannot express; the same value as vLLM's.
_LOWEST = -9999.0


def completion_logprobs(delta: OutputDelta, offset: int, as_ids: bool) -> CompletionLogprobs | None:
    """A delta's logprobs for /v1/completions; None if the request did not ask for logprobs.

    Args:
        delta: from the engine.
        offset: characters of the sample's text before the delta.
        as_ids: whether tokens are named by their ids.
    """
    if delta.logprobs is None:
        return None
    pairs = list(zip(delta.token_ids, delta.logprobs, strict=True))
    return CompletionLogprobs(
        text_offset=[offset] * len(pairs),
        token_logprobs=[_finite(found[token]) for token, found in pairs],
        tokens=[_name(token, found[token], as_ids) for token, found in pairs],
        top_logprobs=[
            {_name(token, each, as_ids): _finite(each) for token, each in found.items()}
            for _, found in pairs
        ],
    )


def echoed_logprobs(
    prompt: Sequence[int],
    first: str,
    offsets: Sequence[int],
    found: Sequence[dict[int, Logprob] | None],
    as_ids: bool,
) -> CompletionLogprobs:
    """The logprobs of a prompt that an answer repeats; the first token has none.

    Args:
        prompt: the prompt's tokens.
        first: text of the first token.
        offsets: place of each token in the text.
        found: `OutputDelta.prompt_logprobs`.
        as_ids: as in `completion_logprobs`.
    """
    own = [Logprob(0.0, decoded_token=first)]
    own += [each[token] for token, each in zip(prompt[1:], found[1:], strict=True) if each]
    return CompletionLogprobs(
        text_offset=[*offsets],
        token_logprobs=[None, *(_finite(each) for each in own[1:])],
        tokens=[_name(token, each, as_ids) for token, each in zip(prompt, own, strict=True)],
        top_logprobs=[
            None
            if each is None
            else {_name(token, one, as_ids): _finite(one) for token, one in each.items()}
            for each in found
        ],
    )


def prompt_logprobs(found: Sequence[dict[int, Logprob] | None]) -> PromptLogprobs:
    """`OutputDelta.prompt_logprobs` for the answer."""
    return [
        None
        if each is None
        else {
            token: PromptLogprob(
                logprob=_finite(one), rank=one.rank, decoded_token=one.decoded_token
            )
            for token, one in each.items()
        }
        for each in found
    ]


def chat_logprobs(delta: OutputDelta, top: int, as_ids: bool) -> list[TokenLogprob]:
    """A delta's logprobs for /v1/chat/completions.

    Args:
        delta: from the engine, with logprobs.
        top: number of most likely tokens to list.
        as_ids: whether tokens are named by their ids.
    """
    listed = []
    for token, found in zip(delta.token_ids, delta.logprobs or [], strict=True):
        best = [
            _top(other, each, as_ids) for other, each in found.items() if (each.rank or 0) <= top
        ]
        best.sort(key=lambda each: -each.logprob)
        chosen = vars(_top(token, found[token], as_ids))
        listed.append(TokenLogprob(**chosen, top_logprobs=best[:top]))
    return listed


def _top(token: int, found: Logprob, as_ids: bool) -> TopLogprob:
    name = _name(token, found, as_ids)
    text = name == found.decoded_token
    return TopLogprob(
        token=name, logprob=_finite(found), bytes=list(name.encode()) if text else None
    )


def _name(token: int, found: Logprob, as_ids: bool) -> str:
    """The token's text, or e.g. "token_id:7": if the text is empty or not whole characters, or if
    the names are to be ids.

    Names stay unique this way: the text of many tokens is U+FFFD.
    """
    text = found.decoded_token
    return text if text and "\ufffd" not in text and not as_ids else f"token_id:{token}"


def _finite(found: Logprob) -> float:
    return max(found.logprob, _LOWEST)

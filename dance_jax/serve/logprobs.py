"""Conversion of the engine's logprobs to the formats of OpenAI's two APIs."""

from __future__ import annotations

from dance_jax.engine.sequence import Logprob, OutputDelta
from dance_jax.serve.answers import CompletionLogprobs, TokenLogprob, TopLogprob

#: Written for -inf, which JSON cannot express; the same value as vLLM's.
_LOWEST = -9999.0


def completion_logprobs(delta: OutputDelta, offset: int) -> CompletionLogprobs | None:
    """A delta's logprobs for /v1/completions; None if the request did not ask for logprobs.

    Args:
        delta: from the engine.
        offset: characters of the sample's text before the delta.
    """
    if delta.logprobs is None:
        return None
    pairs = list(zip(delta.token_ids, delta.logprobs, strict=True))
    return CompletionLogprobs(
        text_offset=[offset] * len(pairs),
        token_logprobs=[_finite(found[token]) for token, found in pairs],
        tokens=[_name(token, found[token]) for token, found in pairs],
        top_logprobs=[
            {_name(token, each): _finite(each) for token, each in found.items()}
            for _, found in pairs
        ],
    )


def chat_logprobs(delta: OutputDelta, top: int) -> list[TokenLogprob]:
    """A delta's logprobs for /v1/chat/completions.

    Args:
        delta: from the engine, with logprobs.
        top: number of most likely tokens to list.
    """
    listed = []
    for token, found in zip(delta.token_ids, delta.logprobs or [], strict=True):
        best = [_top(other, each) for other, each in found.items() if (each.rank or 0) <= top]
        best.sort(key=lambda each: -each.logprob)
        chosen = vars(_top(token, found[token]))
        listed.append(TokenLogprob(**chosen, top_logprobs=best[:top]))
    return listed


def _top(token: int, found: Logprob) -> TopLogprob:
    name = _name(token, found)
    text = name == found.decoded_token
    return TopLogprob(
        token=name, logprob=_finite(found), bytes=list(name.encode()) if text else None
    )


def _name(token: int, found: Logprob) -> str:
    """The token's text, or e.g. "token_id:7" if the text is empty or not whole characters.

    Names stay unique this way: the text of many tokens is U+FFFD.
    """
    text = found.decoded_token
    return text if text and "\ufffd" not in text else f"token_id:{token}"


def _finite(found: Logprob) -> float:
    return max(found.logprob, _LOWEST)

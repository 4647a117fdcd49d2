"""The engine's logprobs in the forms of OpenAI's two APIs."""

from __future__ import annotations

from dance_jax.engine.sequence import Logprob, OutputDelta
from dance_jax.serve.answers import CompletionLogprobs, TokenLogprob, TopLogprob

#: JSON has no infinity; vLLM writes this for a token that cannot come.
_LOWEST = -9999.0


def completion_logprobs(delta: OutputDelta, offset: int) -> CompletionLogprobs | None:
    """Those of a delta, for /v1/completions; None when nobody asked for them.

    Args:
        delta: from the engine.
        offset: characters of the sample's text before it.
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
    """Those of a delta, for /v1/chat/completions.

    Args:
        delta: from the engine, with logprobs.
        top: how many of the most likely tokens are listed.
    """
    listed = []
    for token, found in zip(delta.token_ids, delta.logprobs or [], strict=True):
        best = [_top(other, each) for other, each in found.items() if (each.rank or 0) <= top]
        best.sort(key=lambda each: -each.logprob)
        chosen = _top(token, found[token]).model_dump()
        listed.append(TokenLogprob(**chosen, top_logprobs=best[:top]))
    return listed


def _top(token: int, found: Logprob) -> TopLogprob:
    name = _name(token, found)
    text = name == found.decoded_token
    return TopLogprob(
        token=name, logprob=_finite(found), bytes=list(name.encode()) if text else None
    )


def _name(token: int, found: Logprob) -> str:
    """The token's text; "token_id:7" where that is empty or no whole characters.

    So no two tokens have one name, as U+FFFD would be for many.
    """
    text = found.decoded_token
    return text if text and "\ufffd" not in text else f"token_id:{token}"


def _finite(found: Logprob) -> float:
    return max(found.logprob, _LOWEST)

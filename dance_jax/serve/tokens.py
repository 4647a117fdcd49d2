"""POST /tokenize and /detokenize, compatible with vLLM."""

from __future__ import annotations

import fastapi

from dance_jax.serve.answers import Detokenized, Tokenized
from dance_jax.serve.bodies import JsonRoute
from dance_jax.serve.errors import ApiError, documented
from dance_jax.serve.info import RouteContext
from dance_jax.serve.requests import DetokenizeRequest, TokenizeRequest

_ERRORS = documented(400, 401, 404, 408, 413, 415)


def routes(server: RouteContext) -> fastapi.APIRouter:
    """The routes /tokenize and /detokenize."""
    router = fastapi.APIRouter(route_class=JsonRoute)

    @router.post("/tokenize", responses=_ERRORS)
    async def tokenize(body: TokenizeRequest) -> Tokenized:
        """Tokenize a prompt, or messages with the model's chat template."""
        server.info.check_model(body.model)
        tokens = await _tokens(server, body)
        limit = server.info.max_model_len
        return Tokenized(count=len(tokens), max_model_len=limit, tokens=tokens)

    @router.post("/detokenize", responses=_ERRORS)
    async def detokenize(body: DetokenizeRequest) -> Detokenized:
        """Convert tokens to text."""
        server.info.check_model(body.model)
        tokens = server.prompts.known(body.tokens, "tokens")
        return Detokenized(prompt=await server.prompts.detokenized(tokens))

    return router


async def _tokens(server: RouteContext, body: TokenizeRequest) -> list[int]:
    """Tokens of the prompt or messages; they need not leave room in the context."""
    only_messages = body.add_generation_prompt, body.continue_final_message
    if body.prompt is not None and body.messages is None and only_messages == (None, None):
        special = body.add_special_tokens is not False
        return await server.prompts.encoded(body.prompt, special, "prompt")
    if body.messages is not None and body.prompt is None:
        rendered = await server.prompts.rendered(body.messages, body)
        return await server.prompts.encoded(rendered, bool(body.add_special_tokens), "messages")
    message = (
        "prompt: give either prompt or messages; add_generation_prompt and continue_final_message "
        "need messages"
    )
    raise ApiError(400, message, param="prompt")

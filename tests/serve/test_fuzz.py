"""Random requests from the API's schema give no status 500 and only documented responses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    negative_data_rejection,
    positive_data_acceptance,
)

from dance_jax.serve import view
from dance_jax.serve.app import create_app
from dance_jax.serve.view import Views
from tests.serve.scripted import MODEL, VOCABULARY, ScriptedQueue, deciding, serve_info

DRAIN = "/servers/{name}/drain"
OPERATIONS = [
    ("/v1/completions", "POST"),
    ("/v1/chat/completions", "POST"),
    ("/tokenize", "POST"),
    ("/detokenize", "POST"),
    ("/health", "GET"),
    ("/ping", "GET"),
    ("/version", "GET"),
    ("/ready", "GET"),
    ("/metrics", "GET"),
    ("/v1/models", "GET"),
    ("/v1/models/{model}", "GET"),
    ("/placement", "GET"),
    ("/placement/rebalance", "POST"),
    ("/dashboard", "GET"),
    ("/events", "GET"),
    ("/trace", "POST"),
    (DRAIN, "POST"),
]
#: Statuses of good requests other than 200: there is no engine, no key, and the page has a slash.
USUAL = {"/trace": 409, DRAIN: 403, "/dashboard": 307}


@pytest.fixture(scope="module")
def schema(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    queue, info = ScriptedQueue(), serve_info(tmp_path_factory.mktemp("model"))
    views = Views(queue, info, deciding())  # pyright: ignore[reportArgumentType]
    views.close()  # so that streams end
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(view, "WATERFALL_S", 0.01)  # there is no engine
        app = create_app(queue, info, deciding(), views=views)  # pyright: ignore
        yield schemathesis.openapi.from_asgi("/openapi.json", app)


def test_all_operations_are_known(schema: Any) -> None:
    found = [result.ok() for result in schema.get_all_operations()]
    assert [(one.path, one.method.upper()) for one in found] == OPERATIONS


@pytest.mark.parametrize(
    ("path", "method", "mode"),
    [(path, method, GenerationMode.POSITIVE) for path, method in OPERATIONS]
    + [
        (path, "POST", GenerationMode.NEGATIVE)
        for path, method in OPERATIONS
        if method == "POST" and path != DRAIN  # it has no body
    ],
)
def test_the_description_is_true(schema: Any, path: str, method: str, mode: Any) -> None:
    statuses = set()

    @given(case=schema[path][method].as_strategy(generation_mode=mode))
    @settings(
        max_examples=60 if method == "POST" else 5,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
    def check(case: schemathesis.Case) -> None:
        if mode == GenerationMode.POSITIVE:
            _make_likely(case)
        # A body that fits the schema can still be invalid, e.g. too long for the context.
        # Types are lax, as vLLM's, so the API takes more than the schema says.
        excluded = [positive_data_acceptance, negative_data_rejection]
        answer = case.call_and_validate(excluded_checks=excluded)
        statuses.add(answer.status_code)

    check()
    assert USUAL.get(path, 200) in statuses or mode == GenerationMode.NEGATIVE, statuses
    assert 400 in statuses or mode == GenerationMode.POSITIVE, statuses


def _make_likely(case: schemathesis.Case) -> None:
    """Fix what the schema cannot express, or almost no request would succeed."""
    if "model" in case.path_parameters:
        case.path_parameters["model"] = MODEL
    body: Any = case.body
    if not isinstance(body, dict):
        return
    for message in body.get("messages") or ():
        message["content"] = message.get("content") or "text"
    changed: dict[str, Any] = {"model": MODEL, "best_of": None, "logit_bias": None}
    if not body.get("stream"):
        changed["stream_options"] = None
    if "max_completion_tokens" in body:
        changed["max_tokens"] = None
    if "messages" in body and case.path == "/tokenize":
        changed["prompt"] = None
    body |= {name: value for name, value in changed.items() if name in body}
    for name in ("prompt", "tokens", "stop_token_ids"):
        body[name] = _known_tokens(body[name]) if name in body else None
    case.body = {name: _whole(value) for name, value in body.items() if value is not None}


def _known_tokens(value: Any) -> Any:
    """Turn numbers into ids of the model's tokens."""
    if isinstance(value, list):
        return [_known_tokens(each) for each in value]
    return int(value) % VOCABULARY if isinstance(value, int | float) else value


def _whole(value: Any) -> Any:
    """Convert 2.0, an integer in JSON schemas, to 2, which the API accepts."""
    return int(value) if isinstance(value, float) and value.is_integer() else value

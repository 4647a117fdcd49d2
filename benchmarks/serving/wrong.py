"""Invalid requests, which a server must refuse."""

from __future__ import annotations

import json
from typing import Any

#: HTTP status of a request that is refused only for now.
TOO_MANY = 429


def wrong_bodies(model: str, context: int) -> dict[str, bytes]:
    """Return invalid bodies for POST /v1/completions, by what is wrong with them.

    Args:
        model: name of the served model.
        context: maximum tokens of a prompt with its answer.
    """
    good: dict[str, Any] = {"model": model, "prompt": [5, 6, 7], "max_tokens": 4, "stream": True}
    changed: dict[str, dict[str, Any]] = {
        "unknown field": {"no_such_field": 1},
        "too long": {"prompt": [5] * (context + 1)},
        "text as a number": {"max_tokens": "four"},
        "a prompt of another type": {"prompt": {"text": "x"}},
        "negative length": {"max_tokens": -1},
        "no prompt": {"prompt": []},
        "unknown model": {"model": f"{model}-which-is-not-there"},
    }
    bodies = {name: json.dumps(good | change).encode() for name, change in changed.items()}
    bodies["no JSON"] = json.dumps(good).encode()[:-1]
    bodies["no object"] = b"[]"
    return bodies


def refused(status: int) -> bool:
    """Return whether a status says that the request was invalid."""
    return 400 <= status < 500 and status != TOO_MANY

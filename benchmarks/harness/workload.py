"""Bodies of requests to a server."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # it brings torch, which a client of a server does without
    from idlm.evaluation.workload import Request

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
ROUTES = (COMPLETIONS, CHAT, RESPONSES, MESSAGES)
Asked = tuple[str, dict[str, Any]]
"""A route and the body of a request to it."""


def body(model: str, request: Request, **fields: Any) -> dict[str, Any]:
    """A request of `idlm.evaluation.workload` as the body of a streamed completion."""
    size = {"prompt": request.prompt_token_ids, "max_tokens": request.max_tokens}
    settings = {"model": model, "temperature": 0, "ignore_eos": True, "stream": True}
    return settings | size | fields


def bodies(
    model: str, count: int, tokens: int | None = None, seed: int = 0, **fields: Any
) -> list[dict[str, Any]]:
    """Word problems for a bundled model, as streamed completions of `tokens` tokens (None: 16 to
    128)."""
    rng = random.Random(seed)
    return [
        {
            "model": model,
            "prompt": f"Tom has {rng.randint(2, 99)} apples and buys {rng.randint(2, 99)} more. "
            "How many has he now?",
            "max_tokens": rng.randint(16, 128) if tokens is None else tokens,
            "seed": rng.randrange(2**31),
            "ignore_eos": True,
            "stream": True,
        }
        | fields
        for _ in range(count)
    ]


def routed(bodies: Sequence[dict[str, Any]]) -> list[Asked]:
    """Bodies of `bodies`, each to the next of `ROUTES`, in that route's own words."""
    return [_routed(ROUTES[place % len(ROUTES)], body) for place, body in enumerate(bodies)]


def _routed(route: str, body: dict[str, Any]) -> Asked:
    if route == COMPLETIONS:
        return route, body
    if route == RESPONSES:
        fields = dict(body)
        prompt, most = fields.pop("prompt"), fields.pop("max_tokens")
        return route, fields | {"input": prompt, "max_output_tokens": most}
    return route, as_chat(body)


def as_chat(body: dict[str, Any]) -> dict[str, Any]:
    """The body of a completion as that of a conversation."""
    fields = dict(body)
    return fields | {"messages": [{"role": "user", "content": fields.pop("prompt")}]}


def text(events: Sequence[dict[str, Any]]) -> str:
    """The text of a streamed completion."""
    return "".join(choice["text"] for event in events for choice in event["choices"])

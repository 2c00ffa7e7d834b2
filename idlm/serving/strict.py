"""What all bodies of requests are read with: no unknown fields, no conversions, bounded JSON."""

from __future__ import annotations

from typing import Any

import msgspec
from pydantic import BaseModel, BeforeValidator, ConfigDict

from idlm.inputs import escaped_half
from idlm.serving.errors import ApiError

DEEPEST = 64
MOST_KEYS = 4096


class Strict(BaseModel):
    """A part of a request: no unknown fields, no conversions ("1" is not a number), no NaN."""

    model_config = ConfigDict(
        strict=True, extra="forbid", allow_inf_nan=False, frozen=True, protected_namespaces=()
    )


def _boolean(value: object) -> object:
    if value is not None and not isinstance(value, bool):
        raise ValueError("a boolean is wanted")
    return value


Boolean = BeforeValidator(_boolean)
"""For fields that accept one boolean: `Literal` alone accepts 0 for False and 1 for True."""


def decode(text: bytes | str, what: str) -> Any:
    """The JSON value in `text`, with bounds on its shape.

    Raises:
        ApiError: 400; the message begins with `what`.
    """
    try:
        value = msgspec.json.decode(text)
    except RecursionError:
        raise ApiError(400, f"{what} is nested deeper than {DEEPEST} levels; flatten it") from None
    except (msgspec.MsgspecError, UnicodeError) as error:
        half = escaped_half(text)
        reason = f"{half} is half of a surrogate pair; take it out" if half else error
        raise ApiError(400, f"{what} is not valid JSON: {reason}") from None
    check_shape(value, what)
    return value


def check_shape(value: object, what: str) -> None:
    """Refuse a value that is nested too deep, or has an object with too many keys.

    Both cost more time than their bytes suggest.

    Raises:
        ApiError: 400.
    """
    level = [value]
    for _ in range(DEEPEST):
        if any(isinstance(node, dict) and len(node) > MOST_KEYS for node in level):
            raise ApiError(400, f"{what} has an object of more than {MOST_KEYS} keys; send fewer")
        children = (
            node.values() if isinstance(node, dict) else node
            for node in level
            if isinstance(node, dict | list)
        )
        level = [child for group in children for child in group if isinstance(child, dict | list)]
        if not level:
            return
    raise ApiError(400, f"{what} is nested deeper than {DEEPEST} levels; flatten it")

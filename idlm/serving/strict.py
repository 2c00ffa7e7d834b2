"""What every body of a request goes through: JSON with bounds on its shape, no unknown fields, no
conversions; and the sentence for a body that is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from fastapi import Request
from pydantic import BaseModel, BeforeValidator, ConfigDict

from idlm.inputs import escaped_half
from idlm.serving.errors import ApiError

DEEPEST = 64
MOST_KEYS = 4096
SHOWN = 60
"""Characters of a wrong value that an error repeats."""


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


class StrictRequest(Request):
    """A request whose body is read with `decode`."""

    async def json(self) -> Any:
        return decode(await self.body(), "the request body")


def validation_error(errors: Sequence[Mapping[str, Any]], body: Any) -> ApiError:
    """One of pydantic's errors about `body` as a sentence that names the field.

    It is the first. If that is about a union, which has an error for each of its members, the
    member is meant that was read furthest.
    """
    first, *others = ((_path(error, body), error) for error in errors)
    same = [found for found in others if found[0][: len(first[0])] == first[0]]
    path, error = max([first, *same], key=_progress)
    field = ".".join(map(str, path))
    where, kind = field or "the request body", error["type"]
    if kind == "extra_forbidden":
        message = f"{where!r} is not supported by this server; leave it out"
        return ApiError(400, message, field, "unsupported_parameter")
    if kind == "missing":
        message = f"{where!r} is missing; it is required"
        return ApiError(400, message, field or None, "missing_required_parameter")
    reason = error["msg"].removeprefix("Value error, ")
    if kind == "union_tag_invalid":
        reason = "{discriminator} is {tag!r}; use one of {expected_tags}".format(**error["ctx"])
    value = repr(error.get("input"))
    shown = value if len(value) <= SHOWN else value[:SHOWN] + "..."
    message = f"{where}: {reason[:1].lower()}{reason[1:]}, got {shown}"
    return ApiError(400, message, field or None, "invalid_value")


def _path(error: Mapping[str, Any], body: Any) -> tuple[str | int, ...]:
    """Where an error is in `body`: pydantic's location without the names of members of unions,
    which are no keys of the body."""
    path: tuple[str | int, ...] = ()
    *_, last = places = list(enumerate(error["loc"][1:])) or [(0, "")]
    for place, part in places:
        if isinstance(body, list) and isinstance(part, int) and part < len(body):
            path, body = (*path, part), body[part]
        elif isinstance(body, dict) and (
            part in body or (error["type"] == "missing" and place == last[0])
        ):
            path, body = (*path, part), body.get(part)
    return path


def _progress(
    found: tuple[tuple[str | int, ...], Mapping[str, Any]],
) -> tuple[int, list[int], bool]:
    """How far an error's member of a union was read: to a part of the value, to a later item of a
    list, or at least past its type."""
    path, error = found
    items = [part for part in path if isinstance(part, int)]
    return len(path), items, not error["type"].endswith("_type")

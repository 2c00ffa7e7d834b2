"""Request bodies read strictly: what is not JSON, too deep, of a wrong type or unknown to us is a 400 that says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from fastapi import Request
from pydantic import BaseModel, BeforeValidator, ConfigDict

from idlm.serving.errors import ApiError

DEEPEST = 64
MOST_KEYS = 4096
SHOWN = 60
"""Characters of a wrong value that an error repeats."""


class Strict(BaseModel):
    """A part of a request: no unknown fields, no conversions ("1" is no number, true is no integer), no NaN."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True, protected_namespaces=())


def _boolean(value: object) -> object:
    if value is not None and not isinstance(value, bool):
        raise ValueError("a boolean is wanted")
    return value


Boolean = BeforeValidator(_boolean)
"""For fields of one boolean: `Literal` alone takes 0 for False and 1 for True."""


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
        raise ApiError(400, f"{what} is not valid JSON: {error}") from None
    check_shape(value, what)
    return value


def check_shape(value: object, what: str) -> None:
    """Refuse what is nested too deep, or has an object with too many keys: both cost more than their bytes.

    Raises:
        ApiError: 400.
    """
    level = [value]
    for _ in range(DEEPEST):
        if any(isinstance(one, dict) and len(one) > MOST_KEYS for one in level):
            raise ApiError(400, f"{what} has an object of more than {MOST_KEYS} keys; send fewer")
        children = (one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list))
        level = [child for group in children for child in group if isinstance(child, dict | list)]
        if not level:
            return
    raise ApiError(400, f"{what} is nested deeper than {DEEPEST} levels; flatten it")


class StrictRequest(Request):
    """A request whose body is read by `decode`."""

    async def json(self) -> Any:
        """The body; FastAPI calls this."""
        return decode(await self.body(), "the request body")


def validation_error(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first of pydantic's errors, as a sentence that names the field."""
    first = errors[0]
    field = ".".join(str(part) for part in first["loc"][1:] if not _is_type(part))
    where, kind = field or "the request body", first["type"]
    if kind == "extra_forbidden":
        return ApiError(400, f"{where!r} is not supported by this server; leave it out", field, "unsupported_parameter")
    if kind == "missing":
        return ApiError(400, f"{where!r} is missing; it is required", field or None, "missing_required_parameter")
    message = f"{where}: {first['msg'][:1].lower()}{first['msg'][1:]}"
    value = repr(first.get("input"))
    shown = value if len(value) <= SHOWN else value[:SHOWN] + "..."
    return ApiError(400, f"{message}, got {shown}", field or None, "invalid_value")


def _is_type(part: object) -> bool:
    """Whether a part of pydantic's location is the name of a union's member, and not of a field."""
    return isinstance(part, str) and (part in ("str", "int", "float", "bool") or "[" in part)

"""Values from outside: lines of a file, texts that can be encoded, numbers of NumPy."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from idlm.errors import InputError

HIGH, LOW = r"\\u[dD][89abAB]..", r"\\u[dD][c-fC-F].."
HALF = re.compile(rf"{HIGH}(?!{LOW})|(?<!{HIGH}){LOW}")


def read_lines(path: str | Path) -> Iterator[str]:
    r"""The lines of a UTF-8 file, with or without a byte order mark, read as they are needed.

    Lines end with "\n" or "\r\n" and nothing else: `str.splitlines` also splits at U+2028, U+0085
    and others, which JSON allows inside a string.

    Raises:
        InputError: the file cannot be read, or is not UTF-8.
    """
    try:
        with open(path, "rb") as file:
            for at, line in enumerate(file):
                text = line.decode("utf-8" if at else "utf-8-sig")
                yield text.removesuffix("\n").removesuffix("\r")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InputError(
            f"cannot read {str(path)!r} ({reason}); give a readable UTF-8 file"
        ) from None


def check_text(text: str, what: str) -> None:
    """Refuse a text with half of a surrogate pair, which has no encoding.

    Python makes them of bytes that are not UTF-8 in arguments, and of escapes in JSON.

    Raises:
        InputError: `what` names the text in the message.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{what} holds {text[error.start]!r}, half of a surrogate pair, which is no text; "
            "take it out"
        ) from None


def escaped_half(json_text: str | bytes) -> str | None:
    """The first escape in a JSON text that is half of a surrogate pair."""
    text = json_text.decode(errors="replace") if isinstance(json_text, bytes) else json_text
    half = HALF.search(text)
    return half and half[0]


def plain(value: Any) -> Any:
    """A scalar of NumPy or PyTorch as Python's number; any other value as it is."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value

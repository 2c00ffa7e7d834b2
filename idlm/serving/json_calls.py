"""`CallReader`: reads one tool call in JSON, one character after the other.

    {"name": "add", "arguments": {"a": 1}}

As soon as the name and the beginning of the arguments are there, the arguments are passed on as
they come. What models often write and JSON does not have is mended on the way: raw line breaks and
unknown escapes in strings, single quotes, NaN and Infinity (null, as in JavaScript), and Python's
True, False and None.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from enum import Enum

import msgspec

ARGUMENTS = ("arguments", "parameters")
NO_ARGUMENTS = "{}"
WORDS = {"True": "true", "False": "false", "None": "null"} | dict.fromkeys(
    ("NaN", "-NaN", "Infinity", "-Infinity", "+Infinity"), "null"
)
"""Words that are no JSON, and what they stand for."""
ESCAPES = frozenset('"\\/bfnrtu')


class State(Enum):
    """FAILED: this is no call, or its last character cannot be a part of it."""

    READING = 1
    DONE = 2
    FAILED = 3


class CallReader:
    """Reads the object of a call.

    Args:
        names: of the tools; an object with another name fails.
        lenient: an object without arguments is a call, too.

    Attributes:
        name: of the tool.
        announced: it is certain that this is a call.
    """

    def __init__(self, names: Collection[str], lenient: bool) -> None:
        self.state, self.name, self.announced = State.READING, "", False
        self._names, self._lenient = names, lenient
        self._json = _Mender()
        self._object = ""
        self._key: str | None = None
        self._string = ""
        self._in_arguments = False

    def push(self, character: str) -> str:
        """Read a character; returns the piece of the arguments that is certain now."""
        depth, in_string = self._json.depth, self._json.in_string
        mended = self._json.push(character)
        if mended is None:
            self.state = State.FAILED
            return ""
        if not self._in_arguments:
            self._object += mended
        opens = depth == 1 and not in_string and character == "{"
        if self._in_arguments or (opens and self._arguments_begin()):
            return self._argument(mended)
        if depth <= 1:
            self._member(character, in_string)
        if self._json.depth == 0 and self.state is not State.FAILED:
            return self._end()
        return ""

    def finish(self) -> str:
        """The rest of the arguments of a call that was cut."""
        return self._json.finish() if self._in_arguments else ""

    def _arguments_begin(self) -> bool:
        begin = self._key in ARGUMENTS and bool(self.name) and not self.announced
        self.announced |= begin
        self._in_arguments = begin
        return begin

    def _argument(self, mended: str) -> str:
        self._in_arguments = self._json.depth > 1
        return mended

    def _member(self, character: str, in_string: bool) -> None:
        """Follow the names and strings of the object itself."""
        if self._json.in_string:
            self._string = self._string + character if in_string else ""
        elif in_string:  # a string has ended
            if self._key is None:
                self._key = self._string
            elif self._key == "name" and not self.announced:
                self.name = self._string
                if self.name not in self._names:
                    self.state = State.FAILED
        elif character == ",":
            self._key = None

    def _end(self) -> str:
        """The arguments of a complete object, unless they were passed on before."""
        arguments = "" if self.announced else self._whole()
        self.announced = arguments is not None
        self.state = State.DONE if self.announced else State.FAILED
        return arguments or ""

    def _whole(self) -> str | None:
        try:
            members = msgspec.json.decode(self._object, type=dict[str, msgspec.Raw])
            raw = next((members[key] for key in ARGUMENTS if key in members), None)
            text = "null" if raw is None else bytes(raw).decode()
            if text.startswith('"'):  # an object as JSON text
                text = msgspec.json.decode(text, type=str)
            if text == "null" and self._lenient:
                text = NO_ARGUMENTS
            msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        except (msgspec.MsgspecError, RecursionError, UnicodeError):
            return None
        return text if self.name else None


class _Mender:
    """Follows JSON, and turns what is nearly JSON into JSON.

    Attributes:
        depth: open objects and lists.
    """

    def __init__(self) -> None:
        self.depth = 0
        self.in_string = False
        self._quote = ""
        self._escaping = False
        self._word = ""

    def push(self, character: str) -> str | None:
        """The text for a character, "" if it is held; None if no JSON has it here."""
        if self.in_string:
            return self._in_a_string(character)
        if character.isalnum() or character in "+-.":
            self._word += character
            return ""
        word = self.finish()
        if character in "\"'":
            self.in_string, self._quote, character = True, character, '"'
        elif character in "{[":
            self.depth += 1
        elif character in "}]":
            self.depth -= 1
        elif character not in ",: \t\r\n":
            return None
        return word + character

    def finish(self) -> str:
        """What is held of a word."""
        word, self._word = self._word, ""
        return WORDS.get(word, word)

    def _in_a_string(self, character: str) -> str:
        if self._escaping:
            self._escaping = False
            return _escape(character)
        if character == "\\":
            self._escaping = True
            return ""
        if character == self._quote:
            self.in_string = False
            return '"'
        return '\\"' if character == '"' else _in_string(character)


def _in_string(character: str) -> str:
    return character if character >= " " else json.dumps(character)[1:-1]


def _escape(character: str) -> str:
    """A backslash and a character, as JSON has it."""
    if character in ESCAPES:
        return "\\" + character
    return _in_string(character) if character < " " or character == "'" else "\\\\" + character

"""Tool calls in the text of models whose chat template writes them in a known format.

    hermes   <tool_call>{"name": .., "arguments": {..}}</tool_call>          Hermes, Qwen 2.5 and 3
    llama    {"name": .., "parameters": {..}}, all of the text               Llama 3.1 and later
    mistral  [TOOL_CALLS][{"name": .., "arguments": {..}}, ..]               Mistral up to 0.3

Text is passed on until a call may begin; from there it is held back until the name of a tool and
the beginning of the arguments are there, and then the arguments are passed on. If it turns out
before that to be no call (an unknown tool, no JSON), it is passed on as text. A call ends with its
JSON and not with a closing text, which may be in a string of the arguments.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from msgspec import UNSET

from idlm.engine.guide import CallForm
from idlm.errors import InputError
from idlm.serving.json_calls import CallReader, State
from idlm.serving.reasoning import overlap
from idlm.serving.responses import FunctionCall, ToolCall

LETTERS = string.ascii_letters + string.digits
ID_LENGTH = 9
"""The only length that Mistral's templates accept."""
BLANK = " \t\r\n"
AFTER_A_CALL = ",;]"
Piece = str | ToolCall
"""A piece of content, or of a call."""


@dataclass(frozen=True)
class Family:
    """A format of tool calls.

    Attributes:
        marker: a text that the chat templates with this format contain.
        without: a text that they do not contain; it marks newer formats that are not supported.
        opening, closing: the texts around a call; closing None: the end of the output.
        bare: the opening may be missing if the output begins with a brace.
        special: the opening is a special token, which decoding must keep.
        form: the texts of a guide that allows an answer or calls; None: such a guide cannot tell
            them apart as they begin.
    """

    marker: str
    without: str
    opening: str
    closing: str | None = None
    bare: bool = False
    special: bool = False
    form: CallForm | None = None


HERMES = Family(
    "<tool_call>",
    "<function=",
    "<tool_call>",
    "</tool_call>",
    form=CallForm("", '<tool_call>\n{"name": ', ', "arguments": ', "}\n</tool_call>", "\n", ""),
)
MISTRAL = Family("[TOOL_CALLS]", "[ARGS]", "[TOOL_CALLS]", special=True)
LLAMA = Family('"parameters": ', "<tool_call>", "<|python_tag|>", bare=True)
FAMILIES = (HERMES, MISTRAL, LLAMA)
FORCED = Family("", "", "")
"""A list of calls alone, which a guide makes."""


def family_of(template: str) -> Family:
    """The format of tool calls in a chat template.

    Raises:
        InputError: it has none that is known here.
    """
    for family in FAMILIES:
        if family.marker in template and family.without not in template:
            return family
    raise InputError(
        "tools: this model's chat template has no form of tool calls that is known here; "
        "leave tools out"
    )


class CallParser:
    """Splits the output, as it comes, into content and tool calls.

    A call comes in pieces: the first has its id and name, the others add to its arguments. What has
    been returned never depends on how the output was cut into pieces.

    Args:
        family: the format of calls.
        names: of the tools in the request.
        specials: special tokens to drop, for families whose output keeps special tokens.
        single: nothing follows the first call.
    """

    def __init__(
        self,
        family: Family,
        names: Collection[str],
        specials: Collection[str] = (),
        single: bool = False,
    ) -> None:
        self._family, self._names, self._single = family, names, single
        self._specials = (
            [token for token in specials if token != family.opening] if family.special else []
        )
        self._held = ""
        self._at = 0
        """While `_inside`: the characters of `_held` that have been read."""
        self._inside = self._forced = family is FORCED
        self._reader: CallReader | None = None
        self._found = False
        """Whether there was a call since the opening."""
        self._blank = ""
        self._started = False
        self.calls = 0

    def push(self, text: str) -> list[Piece]:
        """Add text; returns the pieces of content and of calls that are certain now."""
        for special in self._specials:
            text = text.replace(special, "")
        self._held += text
        pieces: list[Piece] = []
        while self._step(pieces):
            pass
        return joined(pieces)

    def finish(self) -> list[Piece]:
        """The rest, at the end of the output."""
        pieces: list[Piece] = []
        while self._inside:
            if self._reader is not None and self._reader.announced:
                pieces += self._argument(self._reader.finish())
                self._next(len(self._held))
            elif self._found or self._forced:  # closing marks, or a part of a call
                self._leave(len(self._held))
            else:
                pieces += self._release()
                while self._step(pieces):
                    pass
        pieces += self._content(self._held)
        self._held = ""
        return joined([*pieces, *([] if self.calls or not self._blank else [self._blank])])

    @property
    def _over(self) -> bool:
        """Whether the rest of the output is dropped."""
        one = self._single and self.calls > 0 and self._reader is None
        return one or (self._forced and not self._inside)

    def _step(self, pieces: list[Piece]) -> bool:
        """Append the next pieces to `pieces`; whether there may be more."""
        if self._over:
            self._leave(len(self._held))
            return False
        if self._inside:
            return self._read(pieces) if self._reader is not None else self._between(pieces)
        at, sure = self._opening()
        pieces += self._content(self._held[:at])
        self._held, self._inside = self._held[at:], sure
        if sure and self._held.startswith(self._family.opening):
            self._at = len(self._family.opening)
        return sure

    def _opening(self) -> tuple[int, bool]:
        """Where a call begins, or may begin once more text is there; and whether it certainly
        does."""
        opening = self._family.opening
        if self._family.bare and not self._started:
            stripped = self._held.lstrip()
            if stripped.startswith("{") or not stripped:
                return 0, bool(stripped)
        at = self._held.find(opening)
        return (at, True) if at >= 0 else (len(self._held) - overlap(self._held, opening), False)

    def _between(self, pieces: list[Piece]) -> bool:
        """Look for the next call of a list, or for the end of the list."""
        marks = BLANK + (AFTER_A_CALL if self._found else "[")
        while self._at < len(self._held) and self._held[self._at] in marks:
            self._at += 1
        rest = self._held[self._at :]
        if not rest:
            return False
        if rest[0] == "{":
            self._reader = CallReader(self._names, lenient=not self._family.bare)
            return True
        closing, opening = self._family.closing or "", self._family.opening
        for mark in filter(None, (closing, opening)):
            if rest.startswith(mark):
                self._at += len(mark)
                if mark == closing and self._found:
                    self._leave(self._at)
                return True
            if mark.startswith(rest):
                return False
        if self._found or self._forced:
            self._leave(self._at)
        else:
            pieces += self._release()
        return True

    def _read(self, pieces: list[Piece]) -> bool:
        """Read on in a call."""
        reader = self._reader
        assert reader is not None
        while self._at < len(self._held):
            new = not reader.announced
            arguments = reader.push(self._held[self._at])
            self._at += 1
            if new and reader.announced:
                pieces.append(self._begin(reader.name))
            if reader.announced:
                pieces += self._argument(arguments)
            if reader.state is State.DONE:
                return self._next(self._at)
            if reader.state is State.FAILED and reader.announced:
                return self._next(self._at - 1)
            if reader.state is State.FAILED:
                pieces += self._release()
                return True
        return False

    def _next(self, at: int) -> bool:
        """Go on after a call."""
        self._held, self._at, self._reader, self._found = self._held[at:], 0, None, True
        return True

    def _leave(self, at: int) -> None:
        """Go on with text, from the character `at` of the held text."""
        self._held, self._at, self._reader = self._held[at:], 0, None
        self._inside = self._found = False

    def _release(self) -> list[Piece]:
        """The held text is no call: pass its beginning on, and look for calls in the rest."""
        opening = self._family.opening
        length = len(opening) if opening and self._held.startswith(opening) else 1
        text = self._held[:length]
        self._leave(length)
        self._started = True
        return self._content(text)

    def _content(self, text: str) -> list[Piece]:
        """Text that is not a call. White space before and after calls is dropped."""
        text, self._blank = self._blank + text, ""
        if not text.strip() and not self._started:
            self._blank = text
            return []
        self._started = True
        return [text]

    def _begin(self, name: str) -> ToolCall:
        self.calls += 1
        self._blank, self._started = "", False
        return new_call(name, index=self.calls - 1)

    def _argument(self, text: str) -> list[Piece]:
        return [more_of(text, self.calls - 1)]


class ForcedParser:
    """For a `tool_choice` that forces a call: the output is the arguments of `name`, or a list of
    calls. A call that was cut is passed on as far as it came; content there is none."""

    def __init__(self, name: str | None, names: Collection[str], single: bool = False) -> None:
        self._parser = None if name is not None else CallParser(FORCED, names, single=single)
        self._name = name or ""
        self._calls = 0

    @property
    def calls(self) -> int:
        """How many have begun."""
        return self._calls if self._parser is None else self._parser.calls

    def push(self, text: str) -> list[Piece]:
        """Add text; returns the pieces of calls that it adds."""
        if self._parser is not None:
            return self._parser.push(text)
        if not text:
            return []
        first, self._calls = self._calls == 0, 1
        return [new_call(self._name, text)] if first else [more_of(text)]

    def finish(self) -> list[Piece]:
        """The rest, at the end of the output."""
        return [] if self._parser is None else self._parser.finish()


Parser = CallParser | ForcedParser


def new_call(name: str, arguments: str = "", index: int = 0) -> ToolCall:
    """The first piece of a call, with a new id."""
    id = "".join(secrets.choice(LETTERS) for _ in range(ID_LENGTH))
    return ToolCall(FunctionCall(arguments, name), id, "function", index)


def more_of(arguments: str, index: int = 0) -> ToolCall:
    """A later piece of a call."""
    return ToolCall(FunctionCall(arguments), index=index)


def joined(pieces: Sequence[Piece]) -> list[Piece]:
    """The same with neighbours made one: texts, and pieces of the same call. Empty ones are left
    out."""
    out: list[Piece] = []
    for piece in pieces:
        last = out[-1] if out else None
        if isinstance(piece, ToolCall):
            if isinstance(last, ToolCall) and last.index == piece.index:
                last.function.arguments += piece.function.arguments
            elif piece.id is not UNSET or piece.function.arguments:
                out.append(piece)
        elif isinstance(last, str):
            out[-1] = last + piece
        elif piece:
            out.append(piece)
    return out

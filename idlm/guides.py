"""`Guide` and `Thinking`: the form of an output, and the thoughts before it."""

from __future__ import annotations

from dataclasses import dataclass, field

from idlm.errors import InputError
from idlm.inputs import check_text

GUIDES = ("json_object", "json_schema", "regex", "choice", "grammar")
MOST_GUIDE = 2**16
"""The most characters of a guide's text."""


@dataclass(frozen=True)
class Guide:
    """A format that the whole output must match.

    Attributes:
        kind: "json_object" (any JSON object; without text), "json_schema", "regex", "choice" or
            "grammar" (Lark or GBNF).
        text: the schema as JSON, the regular expression, the choices as a JSON list of strings, or
            the grammar.
        name: what errors call it, such as a field of a request.
    """

    kind: str
    text: str = ""
    name: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if self.kind not in GUIDES:
            raise InputError(f"guide kind {self.kind!r} is unknown; use one of {', '.join(GUIDES)}")
        if not isinstance(self.text, str):
            raise InputError(
                f"the text of a guide is {type(self.text).__name__}; "
                "give a string, a schema as JSON text"
            )
        check_text(self.text, "the text of a guide")
        if len(self.text) > MOST_GUIDE:
            raise InputError(
                f"a guide of {len(self.text)} characters is too long; use at most {MOST_GUIDE}"
            )
        if (self.kind == "json_object") == bool(self.text):
            raise InputError(
                f"guide {self.kind!r} with text {self.text[:40]!r}; "
                "'json_object' has none, the others need it"
            )


@dataclass(frozen=True)
class Thinking:
    """Thoughts that a model writes before its answer, between two tokens.

    Attributes:
        start, end: the ids of these tokens.
        open: the prompt ends within the thoughts. Otherwise the output has thoughts if `start` is
            its first token.
        budget: the most tokens of the thoughts; `end` comes after them. None: no limit.
    """

    start: int
    end: int
    open: bool = False
    budget: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "open" and value is not None and not _is_count(value):
                raise InputError(
                    f"thinking.{name}={value!r} is out of range; give a whole number from 0",
                    "thinking",
                )

    @property
    def first(self) -> int | None:
        """The state at the start of the output: see `after`."""
        return 0 if self.open else -1

    def after(self, state: int | None, token: int) -> int | None:
        """The state after one more token: the number of tokens of the thoughts so far, -1 before
        the first token, None in the answer."""
        if state == -1:
            return 0 if token == self.start else None
        return None if state is None or token == self.end else state + 1


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31

"""From the text of a chat answer to its thoughts, its content and its tool calls."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from idlm.params import Thinking
from idlm.serving.prompts import Prompts
from idlm.serving.reasoning import ThoughtParser, special_strings
from idlm.serving.responses import ToolCall
from idlm.serving.schema_chat import ChatRequest
from idlm.serving.tools import CallParser, Family, ForcedParser, Parser, joined


@dataclass
class Part:
    """A part of an answer; `calls` are pieces of calls."""

    thoughts: str = ""
    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)

    def __add__(self, other: Part) -> Part:
        calls = [call for call in joined([*self.calls, *other.calls]) if isinstance(call, ToolCall)]
        return Part(self.thoughts + other.thoughts, self.content + other.content, calls)


class OutputReader:
    """Splits the text of one sample, as it comes.

    Args:
        thoughts, calls: None where the output has none.
        dropped: special tokens that the text has and the answer has not.
        inline: the thoughts are a part of the content; no calls are read in them.
    """

    def __init__(
        self,
        thoughts: ThoughtParser | None,
        calls: Parser | None,
        dropped: Sequence[str] = (),
        inline: bool = False,
    ) -> None:
        self._thoughts, self._calls = thoughts, calls
        self._dropped, self._inline = dropped, inline

    @property
    def calls(self) -> int:
        """How many calls have begun."""
        return 0 if self._calls is None else self._calls.calls

    def push(self, text: str) -> Part:
        """Add text; returns what is certain now. A special token comes in one piece."""
        for special in self._dropped:
            text = text.replace(special, "")
        thoughts, content = ("", text) if self._thoughts is None else self._thoughts.push(text)
        return self._part(thoughts, content)

    def finish(self) -> Part:
        """The rest, at the end of the output."""
        part = self._part(*(("", "") if self._thoughts is None else self._thoughts.finish()))
        return part if self._calls is None else part + _split("", self._calls.finish())

    def _part(self, thoughts: str, content: str) -> Part:
        pieces = [content] if self._calls is None else self._calls.push(content)
        return _split("", [thoughts, *pieces]) if self._inline else _split(thoughts, pieces)


def _split(thoughts: str, pieces: Sequence[str | ToolCall]) -> Part:
    text = "".join(piece for piece in pieces if isinstance(piece, str))
    return Part(thoughts, text, [piece for piece in pieces if isinstance(piece, ToolCall)])


def output_reader(
    body: ChatRequest, thinking: Thinking | None, prompts: Prompts, family: Family | None
) -> OutputReader:
    """A reader for one sample of a request.

    Args:
        thinking: the thoughts that the output may have.
        family: the format of tool calls, if the request has tools.
    """
    specials = set() if thinking is None and family is None else special_strings(prompts)
    thoughts, dropped = None, list[str]()
    if thinking is not None:
        marks = prompts.token(thinking.start), prompts.token(thinking.end)
        thoughts = ThoughtParser(
            *marks,
            thinking.open,
            raw=body.inline_thoughts,
            whole=body.stream_reasoning is False,
        )
        if marks[1] in specials:  # then the text has all special tokens
            kept = {*marks, family.opening if family is not None else ""}
            dropped = [token for token in specials if token not in kept]
    calls = _parser(body, family, specials)
    return OutputReader(thoughts, calls, dropped, body.inline_thoughts)


def _parser(body: ChatRequest, family: Family | None, specials: Collection[str]) -> Parser | None:
    if family is None:
        return None
    names = {tool.function.name for tool in body.tools_in_use}
    if body.forces_tools:
        return ForcedParser(body.forced_tool, names, body.single_call)
    return CallParser(family, names, specials, body.single_call)

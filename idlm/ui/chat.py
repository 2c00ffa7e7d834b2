"""`Chat`: a conversation in a terminal or over pipes.

Answers go to stdout, everything else to stderr.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from time import perf_counter

from rich.console import Console

from idlm.errors import InputError
from idlm.ui.backend import ChatBackend, ContextFull, End, Message, Piece
from idlm.ui.colours import COLOURS, LEGEND, Painter, harmless

HELP = {
    "/reset": "begin a new conversation",
    "/ar": "switch drafting off or on",
    "/colors": "colour tokens by where they came from, or stop it",
    "/system TEXT": "instructions from here on; without TEXT, none",
    "/help": "this list",
    "/exit": "leave; so does ctrl-D. ctrl-C ends an answer",
}


class Chat:
    """One conversation with its settings.

    Args:
        backend: the model that answers.
        colours: whether tokens are coloured by their source.

    Raises:
        InputError: colours with a backend that does not report the source of tokens.
    """

    def __init__(self, backend: ChatBackend, colours: bool = False) -> None:
        self._backend = backend
        self._out, self._notes = (
            Console(highlight=False, soft_wrap=True),
            Console(stderr=True, highlight=False),
        )
        self._instructions: list[Message] = []
        self._turns: list[Message] = []
        self._drafting, self._colours = True, False
        if colours:
            self._switch_colours()

    def run(self, read: Callable[[], str]) -> None:
        """Run until /exit or the end of the input; `read` returns a line or raises EOFError."""
        self._note(f"{self._backend.name}; /help lists the commands")
        while True:
            try:
                if not self.take(read()):
                    return
            except EOFError:
                self._out.print(end="\n" if self._out.is_terminal else "")
                return
            except KeyboardInterrupt:
                self._note("/exit or ctrl-D ends the chat")
            except InputError as error:
                self._notes.print(
                    f"error: {' '.join(str(error).split())}",
                    style="red",
                    markup=False,
                    soft_wrap=True,
                )

    def take(self, line: str) -> bool:
        """Handle a line of input; False if it ends the chat.

        Raises:
            InputError: the line cannot be handled; the conversation is unchanged.
        """
        line = line.strip()
        command, _, rest = line.partition(" ")
        if command == "/exit":
            return False
        if line.startswith("/"):
            self._command(command, rest.strip())
        elif line:
            self._say(line)
        return True

    def _command(self, command: str, rest: str) -> None:
        if command == "/system":
            self._instruct(rest)
            return
        actions = {
            "/reset": self._reset,
            "/ar": self._switch_drafting,
            "/colors": self._switch_colours,
        }
        action = (actions | {"/help": self._help}).get(command)
        if action is None:
            raise InputError(f"{command!r} is no command; /help lists them")
        action()

    def _help(self) -> None:
        for command, meaning in HELP.items():
            self._note(f"{command:14}{meaning}")

    def _reset(self) -> None:
        self._turns.clear()
        self._note("a new conversation")

    def _instruct(self, text: str) -> None:
        self._instructions = [{"role": "system", "content": text}] if text else []
        self._note("instructions are set" if text else "no instructions")

    def _switch_drafting(self) -> None:
        if not self._backend.drafts:
            raise InputError(
                f"{self._backend.name} has no drafting to switch off: "
                "it is no idlm server, or stride is 1"
            )
        self._drafting = not self._drafting
        self._note("drafting is on" if self._drafting else "drafting is off: plain AR")

    def _switch_colours(self) -> None:
        if not self._backend.traced:
            raise InputError(
                f"{self._backend.name} does not say where tokens come from; "
                "only an idlm server does"
            )
        self._colours = not self._colours
        self._note("colours are on" if self._colours else "colours are off")
        for source in LEGEND if self._colours else ():
            self._notes.print(f"[{COLOURS[source]}]{source}[/] {LEGEND[source]}")

    def _say(self, text: str) -> None:
        """One turn of the conversation.

        Without an answer the conversation is unchanged. If it is too long for the context, the
        oldest turns are dropped.
        """
        turns = [*self._turns, {"role": "user", "content": text}]
        answer = None
        while answer is None:
            try:
                answer = self._show(
                    self._backend.answer([*self._instructions, *turns], self._drafting)
                )
            except ContextFull:
                if len(turns) == 1:
                    raise
                del turns[:2]
        forgotten = (len(self._turns) + 1 - len(turns)) // 2
        if forgotten:
            self._note(f"the context was full: turns forgotten, the oldest first: {forgotten}")
        self._turns = [*turns, {"role": "assistant", "content": answer}]

    def _show(self, items: Iterator[Piece | End]) -> str:
        """Print an answer as it comes and a summary; ctrl-C ends it.

        Raises:
            KeyboardInterrupt: ctrl-C before the first text.
        """
        text, end, painter, started = "", End(), Painter(), perf_counter()
        try:
            for item in items:
                if isinstance(item, End):
                    end = item
                    continue
                text += item.text
                self._print(painter, item)
        except KeyboardInterrupt:
            if not text:
                raise
            end = End("interrupted")
        finally:
            if text:
                self._out.print()
        self._note(_summary(end, perf_counter() - started))
        return text

    def _print(self, painter: Painter, piece: Piece) -> None:
        if self._colours:
            self._out.print(painter.paint(piece.text, piece.tokens), end="")
        else:
            self._out.print(harmless(piece.text), end="", markup=False)

    def _note(self, text: str) -> None:
        self._notes.print(text, style="dim", markup=False, soft_wrap=True)


def _summary(end: End, seconds: float) -> str:
    """Tokens, TPF and speed if they are known, and the reason to end unless it is "stop"."""
    facts = []
    if end.tokens is not None:
        facts.append(f"{end.tokens} tokens")
    if end.tpf is not None:
        facts.append(f"TPF {end.tpf:.2f}")
    facts.append(f"{end.tokens / seconds:.0f} tok/s" if end.tokens else f"{seconds:.1f} s")
    if end.reason not in (None, "stop"):
        facts.append(f"cut: {end.reason}" if end.reason == "length" else str(end.reason))
    return ", ".join(facts)


def reader() -> Callable[[], str]:
    """A function that reads a line of stdin: with a prompt and line editing on a terminal."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a byte that is not UTF-8 must not end the chat
    if not sys.stdin.isatty():
        return input
    with suppress(ImportError):  # Windows has no readline
        import readline  # noqa: F401  # gives input() line editing
    return lambda: input("> ")

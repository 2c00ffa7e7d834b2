"""`Chat`: a conversation in a terminal, or over pipes; answers go to stdout, everything else to
stderr."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from time import perf_counter

from rich.console import Console

from idlm.errors import InputError
from idlm.ui.colours import COLOURS, LEGEND, Painter, harmless
from idlm.ui.partner import ContextFull, End, Message, Partner, Piece

HELP = {
    "/reset": "begin a new conversation",
    "/ar": "switch drafting off or on",
    "/colors": "colour tokens by where they came from, or stop it",
    "/system TEXT": "instructions from here on; without TEXT, none",
    "/help": "this list",
    "/exit": "leave; so does ctrl-D. ctrl-C ends an answer",
}


class Chat:
    """One conversation, and its settings.

    Args:
        partner: who answers.
        colours: whether tokens are coloured by their source.

    Raises:
        InputError: colours of a partner that does not say where tokens come from.
    """

    def __init__(self, partner: Partner, colours: bool = False) -> None:
        self._partner = partner
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
        """Until /exit or the end of the input; `read` gives a line, or raises EOFError."""
        self._note(f"{self._partner.name}; /help lists the commands")
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
        """Act on a line of input; False: it ends the chat.

        Raises:
            InputError: it cannot be done; the conversation is as before.
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
        if not self._partner.drafts:
            raise InputError(
                f"{self._partner.name} has no drafting to switch off: it is no idlm server, or stride is 1"
            )
        self._drafting = not self._drafting
        self._note("drafting is on" if self._drafting else "drafting is off: plain AR")

    def _switch_colours(self) -> None:
        if not self._partner.traced:
            raise InputError(
                f"{self._partner.name} does not say where tokens come from; only an idlm server does"
            )
        self._colours = not self._colours
        self._note("colours are on" if self._colours else "colours are off")
        for source in LEGEND if self._colours else ():
            self._notes.print(f"[{COLOURS[source]}]{source}[/] {LEGEND[source]}")

    def _say(self, text: str) -> None:
        """One turn; without an answer it is as if nothing had been said. Where it is too long, the
        oldest turns go."""
        turns = [*self._turns, {"role": "user", "content": text}]
        answer = None
        while answer is None:
            try:
                answer = self._show(
                    self._partner.answer([*self._instructions, *turns], self._drafting)
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
        """Print an answer as it comes, and what it took; ctrl-C ends it where it is.

        Raises:
            KeyboardInterrupt: before there was anything of it.
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
    """Tokens, TPF and pace, as far as they are known, and how it ended if not by itself."""
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
    """Reads lines of stdin: with a prompt and line editing on a terminal, plainly otherwise."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # else a byte that is no UTF-8 would end the chat
    if not sys.stdin.isatty():
        return input
    with suppress(ImportError):  # there is none on Windows
        import readline  # noqa: F401  # gives input() its editing
    return lambda: input("> ")

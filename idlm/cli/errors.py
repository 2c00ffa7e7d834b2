"""Errors on the command line: one line on stderr that names the value and the fix, and status 2."""

from __future__ import annotations

import sys
from typing import Any, NoReturn

from typer import Abort, Context
from typer.core import TyperGroup
from typer.exceptions import TyperException

from idlm.errors import InputError

BAD_INPUT = 2
INTERRUPTED = 130


class OneLineErrors(TyperGroup):
    """The commands of the program. Any error but bad input is a bug and keeps its traceback."""

    def main(self, *args: Any, **extra: Any) -> NoReturn:
        """Run the program and exit with its status."""
        extra["standalone_mode"] = False  # otherwise Typer prints errors itself, on several lines
        try:
            status = super().main(*args, **extra)
        except TyperException as error:
            status = _complain(usage_message(error))
        except InputError as error:
            status = _complain(str(error))
        except Abort:
            status = INTERRUPTED
        sys.exit(status or 0)


def _complain(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return BAD_INPUT


def usage_message(error: TyperException) -> str:
    """Typer's message, the value that it is about, and the command whose help to read.

    Typer leaves out numbers that it cannot parse.
    """
    message = error.format_message().removesuffix(".")
    validation = error.__cause__
    # pydantic's ValidationError, which is not imported because that is slow
    if validation is not None and hasattr(validation, "errors"):
        value = repr(validation.errors()[0]["input"])
        if value not in message:
            message += f", got {value}"
    context: Context | None = getattr(error, "ctx", None)
    command = context.command_path if context else "idlm"
    return f"{message}; see '{command} --help'"

"""Prompts from arguments, from a file, or built in; all become token ids."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from idlm.errors import InputError
from idlm.inputs import read_lines
from idlm.messages import as_user, read_messages

if TYPE_CHECKING:
    from idlm.models.idlm_model import Idlm

BUILT_IN = (
    "Once upon a time",
    "The quick brown fox",
    "In the beginning there was",
    "def main():",
)
GROUPS = ("domain", "language")
"""Keys of a .jsonl file by which `idlm accept` groups prompts."""
HELD_OUT = 8
"""How many held-out problems the bundled models get."""


@dataclass(frozen=True)
class Prompt:
    """A text, a conversation, or token ids; `groups` are what `GROUPS` of a .jsonl file say."""

    text: str | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    token_ids: Sequence[int] | None = None
    groups: tuple[tuple[str, str], ...] = ()

    def encode(self, idlm: Idlm, chat: bool) -> list[int]:
        """Its token ids; a text goes through the model's chat template if `chat` and if there is
        one.

        Raises:
            InputError: the model has no tokenizer, or no chat template for a conversation.
        """
        if self.token_ids is not None:
            return list(self.token_ids)
        encoder, text, messages = idlm.encoder, self.text or "", self.messages
        if messages is None:
            messages = as_user(text, chat, encoder.has_template)
        return encoder.text(text, trusted=True) if messages is None else encoder.chat(messages)


def given(texts: Sequence[str], file: Path | None) -> list[Prompt]:
    """The prompts of the command line and of `file`, if any."""
    return [Prompt(text) for text in texts] + (read(file) if file else [])


def read(file: Path) -> list[Prompt]:
    """The prompts of a .txt file (one a line) or a .jsonl file (one object a line).

    Raises:
        InputError: the file cannot be read, or a line is not a prompt; the message names the file
            and the line.
    """
    if file.suffix not in (".txt", ".jsonl"):
        raise InputError(
            f"prompts file '{file}' is neither .txt (one prompt a line) nor .jsonl; "
            "rename or convert it"
        )
    numbered = [(at, line) for at, line in enumerate(read_lines(file), start=1) if line.strip()]
    if not numbered:
        raise InputError(f"prompts file '{file}' holds no prompt; write one a line")
    if file.suffix == ".txt":
        return [Prompt(line) for _, line in numbered]
    return [_parse(line, f"{file}:{at}") for at, line in numbered]


def _parse(line: str, where: str) -> Prompt:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not JSON ({error.msg}); write one object a line") from None
    if isinstance(record, dict):
        text, messages, ids = (
            record.get(key) for key in ("prompt", "messages", "prompt_token_ids")
        )
        groups = tuple((key, str(record[key])) for key in GROUPS if record.get(key) is not None)
        if isinstance(text, str):
            return Prompt(text, groups=groups)
        if isinstance(messages, list):
            try:
                return Prompt(messages=read_messages(messages), groups=groups)
            except InputError as error:
                raise InputError(f"{where}: {error}") from None
        if isinstance(ids, list) and ids:
            return Prompt(token_ids=ids, groups=groups)
    raise InputError(
        f"{where} is no prompt: {line[:60]!r}; "
        'write {"prompt": "..."}, {"messages": [{"role": "user", "content": "..."}]} '
        'or {"prompt_token_ids": [1, 2]}'
    )


def defaults(idlm: Idlm) -> list[Prompt]:
    """Built-in prompts: problems for bundled models, else beginnings of texts.

    Without a tokenizer it is the BOS token alone.
    """
    if idlm.name in ("nano", "nano-base", "nano-full"):
        from idlm.nano.problems import held_out_problems

        return [Prompt(problem.question) for problem in held_out_problems(HELD_OUT)]
    if idlm.tokenizer is not None:
        return [Prompt(text) for text in BUILT_IN]
    return [Prompt(token_ids=[getattr(idlm.model.config, "bos_token_id", None) or 0])]

"""Where the answers of a conversation are in what the chat template writes.

Each answer is found as the model meets it when it decodes: after what the template writes before it
with the generation prompt. Where each of these texts begins the one of the last answer, they are
one document with several answers. A template may also write earlier turns differently later, as
those do that leave out what an answer thought; then each answer is a document of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from itertools import groupby
from typing import Any

from idlm.chat_template import PROBE, PromptEncoder
from idlm.errors import InputError
from idlm.messages import as_template_takes, read_messages

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
Ranges = tuple[tuple[int, int], ...]


class NoAnswers(InputError):
    """The chat template never writes an answer: an error of the model and no row's."""


def check_answers(encoder: PromptEncoder, tools: bool) -> None:
    """Refuse a chat template that never writes an answer.

    Raises:
        NoAnswers: as it says.
    """
    template = encoder.template_for(tools)
    if not _writes_answers(encoder.tokenizer, template):
        raise NoAnswers(
            f"the chat template of {encoder.name!r} writes no assistant turns; give the model "
            "another template, or rows of prompt and response texts"
        )


@lru_cache(maxsize=4)
def _writes_answers(tokenizer: Any, template: str) -> bool:
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": PROBE}]
    try:
        text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    except Exception:  # a template may raise anything; its rows say what
        return True
    return PROBE in text


def generated(
    encoder: PromptEncoder, messages: list[dict[str, Any]], tools: list[Any] | None
) -> tuple[list[int], list[int]] | None:
    """The ids of a conversation, and 1 for each that is within the template's generation marks;
    None if the template has no such marks."""
    template = encoder.template_for(bool(tools))
    if not GENERATION.search(template):
        return None
    shown = as_template_takes(read_messages(messages), *encoder.contents(template))
    written = encoder.tokenizer.apply_chat_template(
        shown, tools, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    return written["input_ids"], written["assistant_masks"]


def marked(answers: Iterable[tuple[int, int]], mask: list[int]) -> Ranges:
    """The parts of the answers that are marked. The last token of an answer, its end, counts if
    any of the answer does."""
    found: list[tuple[int, int]] = []
    for first, stop in answers:
        inside = mask[first:stop]
        if any(inside):
            inside[-1] = 1
        at = first
        for is_marked, run in groupby(inside):
            size = len(list(run))
            if is_marked:
                found.append((at, at + size))
            at += size
    return tuple(found)

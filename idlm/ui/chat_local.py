"""A chat backend in this process: an `LLM`."""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager

from idlm.engine.llm import LLM
from idlm.engine.request import Result, Update
from idlm.errors import InputError
from idlm.params import SamplingParams
from idlm.ui.backend import End, Message, Piece, check_room


class LocalBackend:
    """A model that answers with its own chat template.

    Raises:
        InputError: it has no chat template.
    """

    def __init__(self, llm: LLM, params: SamplingParams) -> None:
        tokenizer = llm.idlm.tokenizer
        if tokenizer is None or not tokenizer.chat_template:
            name = llm.idlm.name
            raise InputError(
                f"model {name!r} has no chat template; "
                f"use 'idlm generate {name}', which completes text"
            )
        self.name = llm.idlm.name
        self.drafts = self.traced = llm.config.stride > 1
        self._llm, self._params, self._tokenizer = llm, params, tokenizer

    def answer(self, messages: Sequence[Message], drafting: bool) -> Iterator[Piece | End]:
        """As in `ChatBackend`; ctrl-C takes effect between two steps of the engine."""
        prompt = self._llm.encode_chat(messages)
        check_room(len(prompt), self._params.max_tokens, self._llm.idlm.context)
        with interrupts_held() as check, closing(self._updates(prompt, drafting)) as updates:
            for update in updates:
                yield self._piece(update)
                if update.result is not None:
                    yield _end(update.result)
                check()

    def _updates(self, prompt: list[int], drafting: bool) -> Generator[Update, None, None]:
        yield from self._llm.stream(prompt, self._params, drafting=drafting)

    def _piece(self, update: Update) -> Piece:
        texts = [
            str(self._tokenizer.decode([token], skip_special_tokens=True))
            for token in update.tokens
        ]
        return Piece(update.text, list(zip(texts, update.sources, strict=True)))


def _end(result: Result) -> End:
    return End(result.finish_reason, len(result.token_ids), result.tpf)


@contextmanager
def interrupts_held() -> Iterator[Callable[[], None]]:
    """Delay ctrl-C until the function that this yields is called, so that no step is
    interrupted."""
    came: list[bool] = []

    def check() -> None:
        if came:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, lambda *_: came.append(True))
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)

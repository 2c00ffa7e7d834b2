"""`UrlModel`: any OpenAI-compatible server as a model of lm-evaluation-harness.

through      generated texts                  likelihoods
chat         /chat/completions                none: a chat API does not give them
raw          /completions                     /completions with echo and logprobs
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import openai
from lm_eval.api.model import LM
from lm_eval.models.utils import postprocess_generated_text

from idlm.errors import InputError
from idlm.evaluation.answers import after_thinking
from idlm.evaluation.harness_model import Answer, Ask, Generation, Journaled
from idlm.evaluation.journal import Journal

RETRIES = 8
SECONDS = 3600.0
MOST_STOPS = 4
"""Stop texts of a request in OpenAI's API; all of them are cut off afterwards in any case."""
EXTRA = ("top_k", "min_p", "repetition_penalty")
"""Sampling options that are not OpenAI's; vLLM, SGLang, llama.cpp and idlm take them."""


class Conversation(str):
    """Messages as JSON: a chat is sent as it is, and the server applies its template."""


class UrlModel(Journaled, LM):
    """A model on a server.

    Args:
        url: of the API, up to and with /v1.
        model: its name there.
        chat: through /chat/completions.
        concurrency: requests at once.
        thinking: given to the chat template as `enable_thinking`, where servers take it.
        thoughts: the texts around thoughts, which are cut; None keeps them.
    """

    tokenizer = None
    tokenizer_name = ""

    def __init__(
        self,
        url: str,
        model: str,
        chat: bool,
        concurrency: int = 8,
        thinking: bool | None = None,
        thoughts: tuple[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.client = openai.OpenAI(
            base_url=url,
            api_key=os.environ.get("OPENAI_API_KEY") or "none",
            max_retries=RETRIES,
            timeout=SECONDS,
        )
        self.url, self.model, self.chat, self.concurrency = url, model, chat, concurrency
        self.extra: dict[str, Any] = (
            {} if thinking is None else {"chat_template_kwargs": {"enable_thinking": thinking}}
        )
        self.thoughts = thoughts
        self.start(Journal())

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The messages themselves; the server has the template."""
        if not add_generation_prompt:
            raise InputError(
                "this task begins the model's answer, which a chat API does not take; "
                "use --generative, or --raw"
            )
        return Conversation(json.dumps(chat_history, ensure_ascii=False))

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """By request: the text that the model goes on with, up to the first stop text."""
        return self.answers("generate_until", requests, self._each(self._generate))

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """By request: log p of the continuation, and whether greedy decoding gives it."""
        found = self.answers("loglikelihood", requests, self._each(self._score))
        return [(value, greedy) for value, greedy in found]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """By request: log p of a text, without that of its first token."""
        return self.answers("loglikelihood_rolling", requests, self._each(self._score_all))

    def _each(
        self, ask_one: Callable[[Ask], tuple[Any, dict[str, Any]]]
    ) -> Callable[[list[Ask]], Iterator[Answer]]:
        """A function that asks several at once, and yields answers as they come."""

        def run(asks: list[Ask]) -> Iterator[Answer]:
            following = iter(enumerate(asks))
            running: dict[Future[tuple[Any, dict[str, Any]]], int] = {}
            with ThreadPoolExecutor(self.concurrency) as pool:
                while True:
                    while (
                        len(running) < self.concurrency
                        and (new := next(following, None)) is not None
                    ):
                        running[pool.submit(ask_one, new[1])] = new[0]
                    if not running:
                        return
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        yield Answer(running.pop(future), *self._result(future))

        return run

    def _result(self, future: Future[tuple[Any, dict[str, Any]]]) -> tuple[Any, dict[str, Any]]:
        try:
            return future.result()
        except openai.OpenAIError as error:
            raise InputError(f"{self.url} does not answer as it should: {error}") from None

    def _generate(self, ask: Ask) -> tuple[str, dict[str, Any]]:
        prompt, generation = ask.arguments[0], Generation.of(ask.arguments[1])
        until = [] if self.thoughts else generation.until
        sampling = generation.sampling
        extra = {**self.extra, **{name: sampling[name] for name in EXTRA if name in sampling}}
        options: dict[str, Any] = {
            "model": self.model,
            "max_tokens": generation.max_tokens,
            "seed": ask.seed,
            **{name: value for name, value in sampling.items() if name not in EXTRA},
            **({"stop": until[:MOST_STOPS]} if until else {}),
            **({"extra_body": extra} if extra else {}),
        }
        if self.chat:
            text, finish, usage = self._chat(prompt, options)
        else:
            answer = self.client.completions.create(prompt=str(prompt), **options)
            text, finish, usage = (
                answer.choices[0].text,
                answer.choices[0].finish_reason,
                answer.usage,
            )
        if self.thoughts:
            text = after_thinking(text, *self.thoughts)
        more = {"tokens": usage.completion_tokens if usage else None, "finish": finish}
        return postprocess_generated_text(text, generation.until, None), more

    def _chat(self, prompt: str, options: dict[str, Any]) -> tuple[str, str, Any]:
        messages: Any = (
            json.loads(prompt)
            if isinstance(prompt, Conversation)
            else [{"role": "user", "content": prompt}]
        )
        answer = self.client.chat.completions.create(messages=messages, **options)
        choice = answer.choices[0]
        return choice.message.content or "", choice.finish_reason, answer.usage

    def _score(self, ask: Ask) -> tuple[list[Any], dict[str, Any]]:
        context, continuation = ask.arguments
        offsets, values, best = self._echo(context + continuation)
        # a token that begins in the context and ends after it belongs to the continuation
        ends = [*offsets[1:], len(context + continuation)]
        places = [at for at, end in enumerate(ends) if end > len(context.rstrip())]
        places = [at for at in places if values[at] is not None]
        greedy = all(values[at] >= best[at] for at in places)
        return [sum(values[at] for at in places), greedy], {}

    def _score_all(self, ask: Ask) -> tuple[float, dict[str, Any]]:
        _, values, _ = self._echo(ask.arguments[0])
        return sum(value for value in values if value is not None), {}

    def _echo(self, text: str) -> tuple[list[int], list[Any], list[Any]]:
        """Where each token of a text begins, its log-probability, and that of the likeliest."""
        answer = self.client.completions.create(
            model=self.model, prompt=text, max_tokens=1, temperature=0, echo=True, logprobs=1
        )
        found: Any = answer.choices[0].logprobs
        if found is None or not found.text_offset:
            raise InputError(
                f"{self.url} echoes no log-probabilities of a prompt, which this suite compares; "
                "use --generative"
            )
        count = sum(offset < len(text) for offset in found.text_offset)
        best = [max(top.values()) if top else None for top in (found.top_logprobs or [])[:count]]
        return list(found.text_offset[:count]), list(found.token_logprobs[:count]), best

"""`Admission`: checks a caller's arguments and makes a `Request` from them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from time import perf_counter
from typing import Any

from idlm.engine.adapters import Adapters
from idlm.engine.guide import Constraint, Guides
from idlm.engine.pages import PagePool
from idlm.engine.request import USUAL, Request, Result, Terms, Timing
from idlm.engine.text import TextStream
from idlm.engine.thinking import ThinkingMatcher
from idlm.errors import InputError
from idlm.models.idlm_model import Idlm
from idlm.params import SamplingParams


class Admission:
    """Makes requests for one engine.

    Args:
        depth: K, the most drafts of any plan.
        pool: the pages of the KV cache; a request must fit into it.
    """

    def __init__(self, idlm: Idlm, depth: int, pool: PagePool, adapters: Adapters) -> None:
        self.idlm, self.depth, self.pool, self.adapters = idlm, depth, pool, adapters
        self._guides = Guides(idlm)
        self._numbers = itertools.count()

    def request(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        seed: int,
        terms: Terms = USUAL,
    ) -> Request:
        """A request for one sample.

        Args:
            prompt: token ids, which the caller has checked against the vocabulary.

        Raises:
            InputError: the engine can never run the request.
        """
        self.check_size(prompt, params)
        params = self._with_ids(params)
        index = self.adapters.index(terms.adapter)
        number, now = next(self._numbers), perf_counter()
        result = Result(list(prompt), seed, [0] * self.depth, [0] * self.depth, Timing(now))
        if params.logprobs is not None:
            result.logprobs = []
        if params.prompt_logprobs is not None:
            result.prompt_logprobs = [None]
        if terms.windows:
            result.windows = []
        return Request(
            id=f"request-{number}",
            prompt=list(prompt),
            params=params,
            result=result,
            limit=self._limit(prompt, params),
            stop_ids=self._stop_ids(params),
            adapter=index,
            drafting=terms.drafting and self.adapters.drafts(index),
            looking=terms.drafting,
            order=(terms.priority, number),
            deadline=None if terms.timeout is None else now + terms.timeout,
            stream=self._stream(params),
            salt=terms.salt,
            matcher=self.matcher(params),
        )

    def matcher(self, params: SamplingParams) -> Constraint | None:
        """A matcher for the request's guide and the budget of its thoughts; None if it has neither.

        Raises:
            InputError: the guide cannot be used, or the end of the thoughts is banned.
        """
        guide, thinking = params.guide, params.thinking
        limits = params.banned_tokens, params.allowed_token_ids
        matcher = None if guide is None else self._guides.matcher(guide, *limits)
        if thinking is None or (matcher is None and thinking.budget is None):
            return matcher
        if thinking.end in params.banned_tokens:
            raise InputError(
                f"banned_tokens has {thinking.end}, the end of the thoughts; allow it",
                "banned_tokens",
            )
        return ThinkingMatcher(thinking, matcher, self.idlm.vocab_size, self.idlm.eos_ids)

    def check_size(self, prompt: Sequence[int], params: SamplingParams) -> None:
        """Refuse a request that does not fit into the pool even if it is empty.

        Raises:
            InputError: the request needs more pages than the pool has.
        """
        needed = -(-self._limit(prompt, params) // self.pool.page_size)
        if needed > self.pool.total:
            raise InputError(
                f"a request of {len(prompt)} prompt tokens and max_tokens={params.max_tokens} "
                f"needs {needed} pages of {self.pool.total}; lower max_tokens or raise kv_memory"
            )

    def _with_ids(self, params: SamplingParams) -> SamplingParams:
        """The settings with token ids for each text of `bad_words`."""
        tokenizer: Any = self.idlm.tokenizer
        if tokenizer is None and any(isinstance(word, str) for word in params.bad_words):
            raise InputError(
                f"bad_words={list(params.bad_words)!r} needs a tokenizer, which the model lacks; "
                "give token ids",
                "bad_words",
            )
        return params.with_bad_words(
            lambda word: list(tokenizer(word, add_special_tokens=False).input_ids)
        )

    def _limit(self, prompt: Sequence[int], params: SamplingParams) -> int:
        return min(len(prompt) + params.max_tokens, self.idlm.context)

    def _stop_ids(self, params: SamplingParams) -> frozenset[int]:
        """The tokens that end the output. A guide ends with the model's end token, so a request
        with a guide stops at it even if `ignore_eos` is set."""
        own = frozenset(params.stop_token_ids)
        return own if params.ignore_eos and params.guide is None else own | self.idlm.eos_ids

    def _stream(self, params: SamplingParams) -> TextStream | None:
        if not params.detokenize:
            return None
        if self.idlm.tokenizer is None:
            if params.stop:
                raise InputError(
                    f"stop={params.stop!r} needs a tokenizer, which the model lacks; "
                    "use stop_token_ids"
                )
            return None
        return TextStream(
            self.idlm.tokenizer,
            params.skip_special_tokens,
            (params.stop,) if isinstance(params.stop, str) else params.stop,
            params.include_stop_str_in_output,
            params.min_tokens,
        )

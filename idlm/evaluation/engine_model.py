"""`EngineModel`: our engine as a model of lm-evaluation-harness, under the name "idlm".

Prompts are tokenised, cut and stopped as the harness's own "hf" model does it, so that both give
the same figures; `tests/evaluation/test_harness.py` compares them item by item.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import has_bos_prefix, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from idlm.config import EngineConfig
from idlm.engine.llm import LLM, Result
from idlm.engine.request import Terms
from idlm.errors import InputError
from idlm.evaluation.answers import after_thinking
from idlm.evaluation.harness_model import Answer, Ask, Generation, Journaled
from idlm.evaluation.journal import Journal
from idlm.models.loading import load
from idlm.params import SamplingParams

IGNORED = ("batch_size", "max_batch_size")
"""What the harness gives every model and the engine has no use for: it batches by itself."""
SCORE = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)


@register_model("idlm")
class EngineModel(Journaled, TemplateLM):
    """A model in our engine, for the harness.

    Args:
        pretrained: a folder, a hub id, a GGUF file, a bundled name, or an `LLM` that was built with
            `logprobs_mode="raw_logprobs"`.
        adapter: the folder of a gated LoRA.
        enable_thinking: given to the chat template; None leaves it to the template.
        think_start, think_end_token: the texts around thoughts, which are cut before grading; None
            keeps them.
        options: fields of `EngineConfig`.
    """

    def __init__(
        self,
        pretrained: str | LLM,
        adapter: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        enable_thinking: bool | None = None,
        think_start: str = "<think>",
        think_end_token: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        options = {name: value for name, value in options.items() if name not in IGNORED}
        if isinstance(pretrained, str):
            pretrained = _load(pretrained, adapter, dtype, device or "cpu", options)
        elif options or adapter:
            raise InputError("options with a built LLM; give them to the LLM instead")
        self.llm = pretrained
        self.idlm = pretrained.idlm
        self.tokenizer = self.idlm.encoder.tokenizer
        self.template_options = (
            {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        )
        self.thoughts = None if think_end_token is None else (think_start, think_end_token)
        self.start(Journal())

    @property
    def max_length(self) -> int:
        """The most tokens of prompt and output."""
        return int(self.idlm.context)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        token = self.tokenizer.eos_token_id
        return int(self.idlm.end_of(chat=False) or 0 if token is None else token)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def tokenizer_name(self) -> str:
        """A name for the harness's caches of prompts."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """The ids of a text; a BOS that it has already is not added again."""
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        if add_special_tokens is None and has_bos_prefix(
            string, self.tokenizer.decode(self.prefix_token_id)
        ):
            options = {"add_special_tokens": False}
        return list(self.tokenizer.encode(string, **options))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation; without `add_generation_prompt` its last message goes on."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                **self.template_options,
            )
        )

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """By request: log p of the continuation, and whether greedy decoding gives it."""
        found = self.answers("loglikelihood", requests, self._score_texts)
        return [(value, greedy) for value, greedy in found]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """By request: log p of the whole text, in windows of the context's length."""
        return self.answers("loglikelihood_rolling", requests, self._score_windows)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """By request: the text that the model goes on with, up to the first stop text."""
        return self.answers("generate_until", requests, self._generate)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        scores = dict(self._scores(pairs))
        return [scores[at] for at in range(len(pairs))]

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if context:
            ids: tuple[list[int], list[int]] = self._encode_pair(context, continuation)
            return ids
        tokens = self.tok_encode(continuation, add_special_tokens=False)
        if tokens[:1] == [self.prefix_token_id]:
            return tokens[:1], tokens[1:]
        return [self.prefix_token_id], tokens

    def _score_texts(self, asks: list[Ask]) -> Iterator[Answer]:
        pairs = [self._pair(*ask.arguments) for ask in asks]
        for at, score in self._scores(pairs):
            yield Answer(at, list(score), {})

    def _score_windows(self, asks: list[Ask]) -> Iterator[Answer]:
        owners, pairs = [], []
        for at, ask in enumerate(asks):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(ask.arguments[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 2,  # window and target, and an output of one token
                context_len=1,
            )
            for window in map(make_disjoint_window, windows):
                owners.append(at)
                pairs.append(window)
        totals, left = [0.0] * len(asks), [owners.count(at) for at in range(len(asks))]
        scores: list[dict[int, float]] = [{} for _ in asks]
        for place, (value, _greedy) in self._scores(pairs):
            owner = owners[place]
            scores[owner][place] = value
            left[owner] -= 1
            if left[owner] == 0:
                totals[owner] = sum(scores[owner][key] for key in sorted(scores[owner]))
                yield Answer(owner, totals[owner], {})

    def _scores(
        self, pairs: Sequence[tuple[list[int], list[int]]]
    ) -> Iterator[tuple[int, tuple[float, bool]]]:
        """Score continuations; a context that is too long loses its beginning."""
        texts = [[*context, *continuation] for context, continuation in pairs]
        jobs = [(text[-(self.max_length - 1) :], SCORE) for text in texts]
        for at, result in self._run(jobs):
            known = result.prompt_logprobs or []
            entries = known[-len(pairs[at][1]) :]
            found = [next(iter(entry.values())) for entry in entries if entry is not None]
            yield at, (sum(one.logprob for one in found), all(one.rank == 1 for one in found))

    def _generate(self, asks: list[Ask]) -> Iterator[Answer]:
        wanted = [Generation.of(ask.arguments[1]) for ask in asks]
        jobs = [self._job(ask, generation) for ask, generation in zip(asks, wanted, strict=True)]
        for at, result in self._run(jobs):
            text = self._answer(asks[at].arguments[0], result, wanted[at].until)
            more = {"tokens": len(result.token_ids), "forwards": result.forwards}
            yield Answer(at, text, {**more, "finish": result.finish_reason})

    def _job(self, ask: Ask, generation: Generation) -> tuple[list[int], SamplingParams]:
        """The ids of a prompt, cut from the left so that the output has room, and its settings."""
        ids, most = self.tok_encode(ask.arguments[0]), generation.max_tokens
        if most < self.max_length:
            ids = ids[-(self.max_length - most) :]
        ids = ids[-(self.max_length - 1) :]
        until = [] if self.thoughts else generation.until  # thoughts may hold them too
        special = {text: self._special(text) for text in until}
        params = self.idlm.sampling(
            {
                **generation.sampling,
                "max_tokens": min(most, self.max_length - len(ids)),
                "seed": ask.seed,
                "stop": tuple(text for text in until if text and special[text] is None),
                "stop_token_ids": tuple(one for one in special.values() if one is not None),
            },
            "auto",
        )
        return ids, params

    def _special(self, text: str) -> int | None:
        """The special token that a text is; it does not come out as text."""
        token = self.tokenizer.convert_tokens_to_ids(text)
        return token if token in self.tokenizer.all_special_ids else None

    def _answer(self, prompt: str, result: Result, until: list[str]) -> str:
        """The text of a result without thoughts, up to the first stop text."""
        text = result.text
        if self.thoughts:
            start, end = self.thoughts
            token, ids = self._special(end), result.token_ids
            if token in ids:  # not in the text, as special tokens are left out of it
                last = len(ids) - ids[::-1].index(token)
                text = end + self.tokenizer.decode(ids[last:], skip_special_tokens=True)
            text = after_thinking(text, start, end, prompt.rstrip().endswith(start))
        return str(postprocess_generated_text(text, until, None))

    def _run(
        self, jobs: Sequence[tuple[list[int], SamplingParams]]
    ) -> Iterator[tuple[int, Result]]:
        """Run requests together, and yield each result as it is there."""
        engine, most = self.llm.engine, 2 * self.llm.config.max_num_seqs
        running: dict[str, int] = {}
        following = iter(enumerate(jobs))
        try:
            while True:
                while len(running) < most and (new := next(following, None)) is not None:
                    at, (ids, params) = new
                    running[engine.add(ids, params, params.seed or 0, Terms())] = at
                if not running:
                    return
                for update in engine.step():
                    if update.result is not None and update.request_id in running:
                        yield running.pop(update.request_id), update.result
        finally:
            for request_id in running:
                engine.abort(request_id)


def _load(model: str, adapter: str | None, dtype: str, device: str, options: dict[str, Any]) -> LLM:
    """An engine for the harness: a model that cannot draft decodes AR unless a stride is given."""
    options = {"logprobs_mode": "raw_logprobs", **options}
    loaded = load(model, adapter, dtype, device, options.get("max_model_len"))
    if "stride" not in options and loaded.gate is None and loaded.block_size is None:
        options["stride"] = 1
    config = EngineConfig().with_options(options)
    return LLM(loaded, config=config)

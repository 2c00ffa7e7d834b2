"""`LLM`: the offline interface, under the names vLLM users know."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from os import PathLike, fspath
from typing import Any, overload
from weakref import finalize

import torch
from rich.console import Console
from rich.progress import Progress

from idlm.chat_template import Message, Messages, check_ids
from idlm.config import EngineConfig
from idlm.engine.build import build_engine
from idlm.engine.engine import Engine
from idlm.engine.preflight import Wanted, preflight
from idlm.engine.ranks import LeadingRunner, Ranks, rank_device
from idlm.engine.request import Result, Terms, Update
from idlm.engine.runner import Runner
from idlm.errors import InputError
from idlm.inputs import plain
from idlm.models.idlm_model import Idlm
from idlm.models.loading import load
from idlm.models.more_adapters import attach_place, load_checked
from idlm.params import SamplingParams
from idlm.progress import Lines

__all__ = ["LLM", "Result"]

Prompt = str | Iterable[int] | Mapping[str, Any]
"""A text, token ids, or one of them as vLLM's {"prompt": ...} or {"prompt_token_ids": ...}."""


class LLM:
    """A model with an engine that generates text.

    Args:
        model: a folder, a hub id, a GGUF file, a bundled name ("nano", "nano-base", "nano-full"),
            or a loaded `Idlm`. If it is loaded here, the engine frees the weights that its kernels
            have a copy of. A loaded `Idlm` is not changed in this way.
        adapter: the folder of a gated LoRA.
        adapters: more gated LoRAs of the same base, by the name that requests give: `generate(...,
            adapter=name)`. The first adapter is the default; `adapter` has the name "default".
        changing: adapters can be loaded and unloaded later: `engine.load_adapter`. Without a
            first adapter, requests that name none decode AR.
        dtype: "auto" (the checkpoint's), or a torch dtype or its name.
        device: for example "cpu", "cuda" or "cuda:1".
        config: the engine's options.
        options: fields of `EngineConfig`, which replace those of `config`: stride, branches,
            drafts, max_num_seqs, kv_memory, page_size, prefill_tokens, deterministic, weights,
            threads, max_model_len, tensor_parallel_size, ...

    With `tensor_parallel_size` above 1 the other ranks are processes, which end with the LLM.

    Attributes:
        engine: runs the requests; its counters are `engine.metrics`.

    Raises:
        InputError: an argument cannot be used; the message says why and what to do.
    """

    def __init__(
        self,
        model: str | PathLike[str] | Idlm,
        adapter: str | PathLike[str] | None = None,
        *,
        adapters: Mapping[str, str | PathLike[str]] | None = None,
        changing: bool = False,
        dtype: str | torch.dtype = "auto",
        device: str = "cpu",
        config: EngineConfig | None = None,
        **options: Any,
    ) -> None:
        self.config = (config or EngineConfig()).with_options(options)
        if isinstance(model, Idlm) and adapter is not None:
            raise InputError(
                f"adapter={adapter!r} with a loaded model; give it to idlm.load instead"
            )
        named = ({} if adapter is None else {"default": adapter}) | dict(adapters or {})
        ranks = self.config.tensor_parallel_size
        if ranks > 1 and (changing or isinstance(model, Idlm)):
            what = "adapters that change" if changing else "a loaded model; give its folder"
            raise InputError(f"tensor_parallel_size={ranks} does not go with {what}")
        folders = {name: fspath(folder) for name, folder in named.items()}
        with ExitStack() as others:
            self._start(model, folders, changing, (dtype, device), others)
            self._others = finalize(self, others.pop_all().close)

    def _start(
        self,
        model: str | PathLike[str] | Idlm,
        named: Mapping[str, str],
        changing: bool,
        kind: tuple[str | torch.dtype, str],
        others: ExitStack,
    ) -> None:
        """Load the model, in `kind`, its type and device, and build the engine. `others` closes the
        other ranks."""
        ours, limit = not isinstance(model, Idlm), self.config.max_model_len
        make: Callable[..., Runner] = Runner
        if isinstance(model, Idlm):
            self.idlm = model if limit is None else model.limited(limit)
        else:
            wanted = Wanted(fspath(model), list(named.values()), *kind)
            preflight(wanted, self.config)
            if (size := self.config.tensor_parallel_size) > 1:
                ranks = Ranks(wanted, self.config)
                others.callback(ranks.close)
                make = partial(LeadingRunner, ranks)
            device = rank_device(wanted, self.config)
            self.idlm = load(wanted.model, None, wanted.dtype, device, limit, size)
        names: list[str | None] = ["default"] if self.idlm.gate is not None else []
        names += named
        for folder in named.values():
            load_checked(self.idlm, folder)
        self.get_default_sampling_params()  # refused and warned about before the engine is built
        if changing and self.idlm.gate is None:
            attach_place(self.idlm)
            names = [None] if self.idlm.block_size is None else []
        self.engine: Engine = build_engine(self.idlm, self.config, names, ours, changing, make)

    def close(self) -> None:
        """End the other ranks, if there are any; the LLM is of no use then. It happens by itself
        when the LLM is not used any more."""
        self._others()

    def get_default_sampling_params(self) -> SamplingParams:
        """The settings of requests that give none: those of the checkpoint's generation config,
        unless the option `generation_config` is "none"."""
        return self.idlm.sampling({}, self.config.generation_config)

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | None = None,
        priority: int = 0,
        timeout: float | None = None,
        progress: bool | Callable[[], None] = False,
    ) -> list[Result]:
        """Complete each prompt: a text, token ids, or a dict of vLLM's with one of them.

        Results are in the order of the prompts.

        All prompts are checked before any of them runs.

        Args:
            sampling_params: for all prompts, or for each; None: `get_default_sampling_params`.
            adapter: the name of the adapter that drafts.
            priority: requests with lower numbers run first.
            timeout: seconds after which each request ends with the output that it has.
            progress: show a progress bar on stderr, or a line at times if that is no terminal; or
                a function to call after each request.

        Raises:
            InputError: a prompt is empty or longer than the context, or contains MASK or ids that
                the model does not have; or the model cannot use the sampling_params.
        """
        ids = [self.encode(prompt) for prompt in _as_prompts(prompts)]
        params = self._as_params(sampling_params, len(ids))
        for prompt, one in zip(ids, params, strict=True):
            one.check_vocabulary(self.idlm.vocab_size)
            self.engine.admission.check_size(prompt, one)
            self.engine.admission.matcher(one)
        terms = Terms(adapter, priority=priority, timeout=timeout)
        with self._requests() as add:
            groups = [add(prompt, one, terms) for prompt, one in zip(ids, params, strict=True)]
            done: dict[str, Result] = {}
            with _progress(progress, sum(map(len, groups))) as advance:
                while len(done) < sum(map(len, groups)):
                    for update in self.engine.step():
                        if update.result is not None:
                            done[update.request_id] = update.result
                            advance()
        return [_gather([done[one] for one in group]) for group in groups]

    @overload
    def chat(
        self,
        messages: str | Sequence[Message],
        sampling_params: SamplingParams | None = None,
        **options: Any,
    ) -> Result: ...

    @overload
    def chat(
        self,
        messages: Sequence[Sequence[Message]],
        sampling_params: SamplingParams | None = None,
        **options: Any,
    ) -> list[Result]: ...

    def chat(
        self,
        messages: Messages | Iterable[Messages],
        sampling_params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Result | list[Result]:
        """Answer a conversation of {"role", "content"} messages, or each of several, with the
        model's chat template. A text is one message of the user.

        Args:
            tools: their JSON schemas, for the template. Calls stay in the text of the result.
            chat_template_kwargs: variables of the template, such as `enable_thinking`.
            options: those of `generate`.
        """
        given: Any = messages if isinstance(messages, str) else list(messages)
        single = isinstance(given, str) or not given or isinstance(given[0], Mapping)
        conversations = [given] if single else given
        prompts = [self.encode_chat(one, tools, chat_template_kwargs) for one in conversations]
        results = self.generate(prompts, sampling_params, **options)
        return results[0] if single else results

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        adapter: str | None = None,
        drafting: bool = True,
    ) -> Iterator[Update]:
        """Complete one prompt and yield its updates. The last update has the result.

        `drafting=False` is plain AR: the same tokens, one per forward.

        Raises:
            InputError: for the reasons of `generate`, or n > 1; raised by the call, before the
                first update.
        """
        (params,) = self._as_params(sampling_params, 1)
        if params.n > 1:
            raise InputError(f"n={params.n} cannot be streamed by LLM.stream; use n=1, or generate")
        ids = self.encode(prompt)
        params.check_vocabulary(self.idlm.vocab_size)
        self.engine.admission.check_size(ids, params)
        self.engine.admission.matcher(params)
        return self._stream(ids, params, Terms(adapter, drafting))

    def _stream(self, ids: list[int], params: SamplingParams, terms: Terms) -> Iterator[Update]:
        with self._requests() as add:
            (mine,) = add(ids, params, terms)
            while True:
                for update in self.engine.step():
                    if update.request_id == mine:
                        yield update
                        if update.result is not None:
                            return

    def _as_params(
        self, params: SamplingParams | Sequence[SamplingParams] | None, number: int
    ) -> Sequence[SamplingParams]:
        if params is None:
            params = self.get_default_sampling_params()
        if isinstance(params, SamplingParams):
            return [params] * number
        if len(params) != number:
            raise InputError(
                f"{len(params)} sampling_params for {number} prompts; give one, or one for each"
            )
        return params

    @contextmanager
    def _requests(self) -> Iterator[Callable[[list[int], SamplingParams, Terms], list[str]]]:
        """Yields a function that adds all samples of a prompt. Requests that have not finished when
        the context ends are aborted."""
        added: list[str] = []

        def add(prompt: list[int], params: SamplingParams, terms: Terms) -> list[str]:
            group = [self.engine.add(prompt, one, one.seed or 0, terms) for one in params.samples()]
            added.extend(group)
            return group

        try:
            yield add
        finally:
            for one in added:
                self.engine.abort(one)

    def encode(self, prompt: Prompt) -> list[int]:
        """The token ids of a prompt, checked against the model.

        Raises:
            InputError: the prompt is empty or longer than the context, or contains MASK or ids that
                the model does not have.
        """
        given = _of_dict(prompt) if isinstance(prompt, Mapping) else prompt
        if isinstance(given, str):
            given = self.idlm.encoder.text(given, trusted=True)
        if isinstance(given, bytes) or not isinstance(given, Iterable):
            raise InputError(f"prompt {given!r} is neither text nor token ids; give one of them")
        return check_ids(given, self.idlm)

    def encode_chat(
        self,
        messages: Messages,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The token ids of a conversation in the model's chat template. Their number is not checked
        against the context.

        Raises:
            InputError: the model has no chat template, or the template refuses the messages.
        """
        return self.idlm.encoder.chat(messages, tools, options=chat_template_kwargs)


def _gather(samples: list[Result]) -> Result:
    """The first sample's result; its `samples` are the other results of the same prompt."""
    first, *others = samples
    return replace(first, samples=others) if others else first


@contextmanager
def _progress(asked: bool | Callable[[], None], total: int) -> Iterator[Callable[[], object]]:
    """A function to call after each request, as `progress` of `generate` says."""
    console = Console(stderr=True)
    if callable(asked):
        yield asked
    elif not asked:
        yield lambda: None
    elif not console.is_terminal:
        yield Lines("requests", total)
    else:
        with Progress(console=console) as bar:
            task = bar.add_task("requests", total=total)
            yield lambda: bar.advance(task)


def _as_prompts(prompts: Any) -> list[Prompt]:
    """The prompts as a list, even if there is one."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if isinstance(prompts, bytes) or not isinstance(prompts, Iterable):
        raise InputError(f"prompts={prompts!r} is no prompt; give text, token ids, or a list")
    given = list(prompts)
    return [given] if given and isinstance(plain(given[0]), int) else given


def _of_dict(prompt: Mapping[str, Any]) -> str | Iterable[int]:
    """The text or the ids of a prompt in vLLM's form."""
    given = {name: value for name, value in prompt.items() if value is not None}
    ids = given.pop("prompt_token_ids", None)
    text = given.pop("prompt", None)
    if given or (ids is None and text is None):
        wrong = f"has {', '.join(map(repr, given))}" if given else "holds no prompt"
        raise InputError(
            f"a prompt {wrong}; give {{'prompt': '...'}} or {{'prompt_token_ids': [1, 2]}}"
        )
    return text if ids is None else ids

"""`LLM`: the offline interface, under the names vLLM users know."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from idlm.decoding.errors import InputError
from idlm.decoding.params import SEED_LIMIT, SamplingParams
from idlm.decoding.window import parse_branches
from idlm.engine.decoder import CachedDecoder, Step
from idlm.models.idlm_model import Idlm
from idlm.models.loading import load

Prompt = str | Sequence[int]


@dataclass
class Result:
    """One finished request.

    Attributes:
        prompt_token_ids, token_ids: the prompt and the output; the output keeps its stop token.
        text: the output as text, special tokens left out; empty where the model has no tokenizer.
        finish_reason: "stop" or "length".
        seed: of the noise: the same seed gives the same tokens at any stride.
        forwards: forward passes, the prefill included.
        reached: by depth (index k - 1): drafts looked at, all before them having been accepted.
        accepted: by depth: drafts accepted.
        sources: for each token "first" (from the prefill), "accepted", "corrected" or "bonus".
    """

    prompt_token_ids: list[int]
    seed: int
    reached: list[int]
    accepted: list[int]
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = "length"
    forwards: int = 0
    sources: list[str] = field(default_factory=list)

    @property
    def tpf(self) -> float:
        """Tokens per forward, the prefill counted."""
        return len(self.token_ids) / self.forwards

    @property
    def acceptance(self) -> list[float]:
        """By depth: accepted / reached; 0 where no draft was reached."""
        return [a / r if r else 0.0 for a, r in zip(self.accepted, self.reached, strict=True)]


class LLM:
    """A model that generates.

    Args:
        model: a folder, a hub id, a bundled name ("nano", "nano-base", "nano-full"), or a loaded `Idlm`.
        adapter: a gated LoRA's folder.
        stride: N, the most tokens a forward commits; 1 is plain AR.
        branches: "all" drafts for every outcome of the verification, "chain" only for the one where every draft stands;
            or the numbers of accepted drafts to draft for.
        dtype: "auto" (the checkpoint's), or a torch dtype or its name.
        device: where to run.

    Raises:
        InputError: an argument cannot be used; the message says why and what to do.
    """

    def __init__(
        self,
        model: str | Idlm,
        adapter: str | None = None,
        stride: int = 4,
        branches: str | Iterable[int] = "all",
        dtype: str | torch.dtype = "auto",
        device: str = "cpu",
    ) -> None:
        plan = parse_branches(branches, stride)
        if isinstance(model, Idlm) and adapter is not None:
            raise InputError(f"adapter={adapter!r} with a loaded model; give it to idlm.load instead")
        self.idlm = model if isinstance(model, Idlm) else load(model, adapter=adapter, dtype=dtype, device=device)
        self.stride = stride
        self._decoder = CachedDecoder(self.idlm, stride, plan)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Result]:
        """Complete each prompt (text, or token ids); one result for each, in order.

        Every prompt is checked before the first is run.

        Raises:
            InputError: a prompt is empty, longer than the context, or holds a MASK or ids the model does not have.
        """
        ids = [self._encode(prompt) for prompt in _as_prompts(prompts)]
        params = _as_params(sampling_params, len(ids))
        for one in params:
            one.check_vocabulary(self.idlm.vocab_size)
        return [self._complete(prompt, one) for prompt, one in zip(ids, params, strict=True)]

    def chat(self, messages: Sequence[dict[str, str]], sampling_params: SamplingParams | None = None) -> Result:
        """Answer a conversation of {"role", "content"} messages, through the model's own chat template."""
        tokenizer = self.idlm.tokenizer
        if tokenizer is None or not tokenizer.chat_template:
            raise InputError(f"model {self.idlm.name!r} has no chat template; use generate with plain text")
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return self.generate([ids], sampling_params)[0]

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            if self.idlm.tokenizer is None:
                raise InputError(f"model {self.idlm.name!r} has no tokenizer; give the prompt as token ids")
            prompt = self.idlm.tokenizer(prompt).input_ids
        ids = [self._checked(token) for token in prompt]
        if not 0 < len(ids) < self.idlm.context:
            raise InputError(f"a prompt has {len(ids)} tokens; this model takes 1 to {self.idlm.context - 1}")
        return ids

    def _checked(self, token: object) -> int:
        if isinstance(token, bool) or not isinstance(token, int):
            raise InputError(f"prompt token {token!r} is not a whole number; give text or token ids")
        if token == self.idlm.mask_id:
            raise InputError(f"a prompt holds the MASK token {token}; take it out, it stands for no text")
        if not 0 <= token < self.idlm.vocab_size:
            raise InputError(f"prompt token {token} is outside the vocabulary 0..{self.idlm.vocab_size - 1}")
        return token

    def _complete(self, prompt: list[int], params: SamplingParams) -> Result:
        seed = secrets.randbelow(SEED_LIMIT) if params.seed is None else params.seed
        depth = self.stride - 1
        result = Result(prompt, seed, reached=[0] * depth, accepted=[0] * depth)
        stop_ids = set(params.stop_token_ids) | (set() if params.ignore_eos else self.idlm.eos_ids)
        limit = min(params.max_tokens, self.idlm.context - len(prompt))
        for step in self._decoder.steps(prompt, params, seed):
            _extend(result, step, stop_ids, limit)
            if result.finish_reason == "stop" or len(result.token_ids) == limit:
                break
        if self.idlm.tokenizer is not None:
            result.text = str(self.idlm.tokenizer.decode(result.token_ids, skip_special_tokens=True))
        return result


def _extend(result: Result, step: Step, stop_ids: set[int], limit: int) -> None:
    """Add a step's tokens as far as the request wants them; drafts past its end are not counted."""
    result.forwards += 1
    for index, token in enumerate(step.tokens):
        result.token_ids.append(token)
        result.sources.append(_source(step, index, first=result.forwards == 1))
        if index < step.drafted:
            result.reached[index] += 1
            result.accepted[index] += index < step.accepted
        if token in stop_ids:
            result.finish_reason = "stop"
        if token in stop_ids or len(result.token_ids) == limit:
            return


def _source(step: Step, index: int, first: bool) -> str:
    if first:
        return "first"
    if index < step.accepted:
        return "accepted"
    return "corrected" if index < step.drafted else "bonus"


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return prompts  # type: ignore[return-value]


def _as_params(params: SamplingParams | Sequence[SamplingParams] | None, number: int) -> Sequence[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * number
    if len(params) != number:
        raise InputError(f"{len(params)} sampling_params for {number} prompts; give one, or one for each")
    return params

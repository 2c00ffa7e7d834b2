"""What a checkpoint says about generating: its end tokens, and its default sampling settings.

The files name ends in up to four places, which often disagree. All parts of the package use one set
(`Idlm.eos_ids`), so that decoding, guides, self-distillation and training data end alike:

    generation_config.json, else config.json     as transformers' `generate`
    the tokenizer's end token                    as vLLM, besides those
    the token after an answer in a chat template what chat models are trained to write
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from idlm.errors import InputError
from idlm.models.sources import first_line, read_json
from idlm.params import SamplingParams

log = logging.getLogger("idlm")
FILE = "generation_config.json"
ANSWER = "the answer"
"""What the assistant says in the conversation that shows a chat template's end of turn."""

SAME_MEANING = {
    **{name: name for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")},
    **{"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"},
}
"""Keys of a generation config, and the fields of `SamplingParams` with the same meaning."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    **{"num_beams": (1,), "penalty_alpha": (0,), "guidance_scale": (1,), "typical_p": (1,)},
    **{"epsilon_cutoff": (0,), "eta_cutoff": (0,), "top_h": (), "min_length": (0,)},
    **{"no_repeat_ngram_size": (0,), "encoder_no_repeat_ngram_size": (0,)},
    **{"encoder_repetition_penalty": (1,), "begin_suppress_tokens": ([],)},
    **{"forced_bos_token_id": (), "forced_eos_token_id": (), "sequence_bias": ({}, [])},
    **{"exponential_decay_length_penalty": (), "watermarking_config": (), "dola_layers": ()},
    **{"stop_strings": ([], ""), "token_healing": (False,)},
    **{"force_words_ids": ([],), "constraints": ([],)},
}
"""Keys that change transformers' output and that `SamplingParams` cannot express, with the values
that change nothing."""


def check_generation_config(folder: Path) -> None:
    """Check the generation config of a folder, if it has one.

    transformers silently uses config.json instead of a file that it cannot read.

    Raises:
        InputError: it is no valid generation config.
    """
    path = folder / FILE
    if not path.exists():
        return
    try:
        GenerationConfig.from_dict(read_json(path))
    except InputError:
        raise
    except Exception as error:  # comparisons of wrong types raise any
        raise InputError(
            f"{str(path)!r} is no valid generation config ({first_line(error)}); "
            "correct or remove it"
        ) from error


def end_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int, name: str
) -> frozenset[int]:
    """The tokens that end a sequence. One outside the vocabulary can never come out: it is dropped
    with a warning."""
    ends = set()
    for token, where in _named_ends(model, tokenizer).items():
        if type(token) is int and 0 <= token < vocab_size:
            ends.add(token)
        else:
            log.warning(
                f"{where} of {name!r} names the end token {token!r}, "
                f"which is outside the vocabulary 0..{vocab_size - 1}; it is ignored"
            )
    return frozenset(ends)


def _named_ends(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> dict[Any, str]:
    """Each end that the checkpoint names, and the first place that names it."""
    config = getattr(model.config, "eos_token_id", None)  # RoCBERT's config has none
    generation = getattr(model, "generation_config", None)
    named = getattr(generation, "eos_token_id", None)
    found: dict[Any, str] = {}
    for token in _as_list(config if named is None else named):
        token = token if isinstance(token, int) else str(token)  # a list has no hash
        found.setdefault(token, "config.json" if named is None else _source(model))
    if tokenizer is not None:
        for token, where in (
            (tokenizer_end(tokenizer), "tokenizer_config.json"),
            (turn_end(tokenizer), "the chat template"),
        ):
            if token is not None:
                found.setdefault(token, where)
    return found


def _source(model: PreTrainedModel) -> str:
    """The file that a model's generation config comes from."""
    path = Path(model.name_or_path or "")
    if path.is_file():  # GGUF
        return path.name
    return FILE if (path / FILE).exists() else "config.json"


def _as_list(value: Any) -> list[Any]:
    """The values of a key that holds one, several or none."""
    values = list(value) if isinstance(value, list | tuple) else [value]
    return [item for item in values if item is not None]


def tokenizer_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of the tokenizer's end token; None if it names none that it has.

    A token that the vocabulary lacks would get the id of the unknown token.
    """
    end: str | None = tokenizer.eos_token
    return None if end is None else tokenizer.get_vocab().get(end)


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of the special token that the chat template writes after an answer; None without one.

    ChatML's is <|im_end|>, Llama 3's <|eot_id|>, Gemma's <end_of_turn>.
    """
    added = {str(token): id for id, token in tokenizer.added_tokens_decoder.items()}
    special = [token for token in {*added, *tokenizer.all_special_tokens} if token]
    for after in _after_answers(tokenizer):
        # the longest, if one token's text begins with another's
        if tokens := [token for token in special if after.startswith(token)]:
            longest = max(tokens, key=len)
            return added.get(longest, tokenizer.get_vocab().get(longest))
    return None


def _after_answers(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """What each chat template writes after an answer, without white space before it."""
    templates = tokenizer.chat_template or {}
    if isinstance(templates, str):
        templates = {"default": templates}
    # the default first: the others are for special uses
    for name in sorted(templates, key=lambda name: name != "default"):
        for parts in (False, True):
            turns: list[Any] = [
                {"role": role, "content": [{"type": "text", "text": text}] if parts else text}
                for role, text in (("user", "a question"), ("assistant", ANSWER))
            ]
            try:
                text = tokenizer.apply_chat_template(
                    turns, chat_template=templates[name], tokenize=False
                )
            except Exception:  # a template may raise anything; then it shows no end
                continue
            _, found, after = str(text).rpartition(ANSWER)
            if found:
                yield after.lstrip()
                break


def sampling_defaults(
    model: PreTrainedModel, ends: Iterable[int], vocab_size: int, name: str
) -> dict[str, Any]:
    """Fields of `SamplingParams` that the model's generation config gives. Keys that cannot be
    expressed are named in a warning.

    As in vLLM, a temperature counts although `do_sample` is not set; if that is false, the default
    is greedy.

    Raises:
        InputError: token ids are no lists of integers.
    """
    config = getattr(model, "generation_config", None)
    keys = {} if config is None else config.to_dict()
    fields = {field: keys[key] for key, field in SAME_MEANING.items() if keys.get(key) is not None}
    if keys.get("do_sample") is False:
        fields["temperature"] = 0.0
    try:
        words = [list(word) for word in keys.get("bad_words_ids") or ()]
        # transformers never bans an end by a bad word
        banned = {word[0] for word in words if len(word) == 1} - set(ends)
        banned |= set(keys.get("suppress_tokens") or ())
        banned = {token for token in banned if 0 <= token < vocab_size}
    except TypeError:
        raise InputError(
            f"{_source(model)} of {name!r} has suppress_tokens or bad_words_ids "
            "that are no lists of token ids; correct them"
        ) from None
    if banned:
        fields["banned_tokens"] = tuple(sorted(banned))
    lost = _not_applied(keys) + ["bad_words_ids"] * any(len(word) > 1 for word in words)
    if lost:
        log.warning(f"{_source(model)} of {name!r} sets {', '.join(lost)}, which is not applied")
    return fields


def _not_applied(keys: Mapping[str, Any]) -> list[str]:
    return [
        f"{key}={keys[key]!r}"
        for key, neutral in NEUTRAL.items()
        if keys.get(key) is not None and keys[key] not in neutral
    ]


def with_defaults(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> SamplingParams:
    """The fields `given`, and a model's `defaults` for the others.

    A default of `min_tokens` gives way to a `max_tokens` or a guide that it contradicts.

    Raises:
        InputError: a value is out of range.
    """
    fields = {**defaults, **given}
    if "min_tokens" in defaults and "min_tokens" not in given:
        if "max_tokens" in fields:
            fields["min_tokens"] = min(fields["min_tokens"], fields["max_tokens"])
        if fields.get("guide") is not None:
            del fields["min_tokens"]
    return SamplingParams(**fields)

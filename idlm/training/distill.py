"""Self-distillation: the model that is converted writes the responses, so a run needs only prompts.

transformers' own `generate` samples them in batches with equal settings. Batch i is a function of
(seed, i), so an interrupted generation continues to the same file.
"""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import GenerationConfig

from idlm.errors import InputError
from idlm.inputs import read_lines
from idlm.models.idlm_model import Idlm
from idlm.params import SamplingParams
from idlm.training.config import DataConfig
from idlm.training.data import SOURCES, Example, fit, prompt_ids
from idlm.training.rows import read_jsonl


def distill(config: DataConfig, idlm: Idlm, file: Path) -> list[Example]:
    """The examples of `data.source: self`: read from `file`, after the missing ones are written
    there.

    The first line of the file holds the settings, each other line {"prompt": ids, "response": ids}.

    Raises:
        InputError: a prompt is broken or leaves no room, or the file was made with other settings.
    """
    prompts = [_checked(prompt, row, config, idlm) for prompt, row in prompts_of(config, idlm)]
    settings = _settings(config, idlm)
    rows = _read(file, settings)
    size = config.generate_batch
    rows = rows[: len(prompts)] if len(rows) >= len(prompts) else rows[: len(rows) // size * size]
    starts = range(len(rows), len(prompts), size)
    if starts:
        _write(file, [settings, *rows], "w")
        for at in track(starts, "generating responses", console=Console(stderr=True)):
            batch = prompts[at : at + size]
            responses = generate(idlm, batch, config, seed=config.seed * 1_000_003 + at // size)
            new = [{"prompt": p, "response": r} for p, r in zip(batch, responses, strict=True)]
            _write(file, new, "a")
            rows += new
    return [
        Example(row["prompt"], row["response"], f"{file} row {i}")
        for i, row in enumerate(rows, start=1)
    ]


def prompts_of(config: DataConfig, idlm: Idlm) -> list[tuple[list[int], str]]:
    """Token ids and name of each prompt that `data.prompts` and `data.examples` select."""
    if config.prompts in ("bos", *SOURCES) and config.examples is None:
        raise InputError(
            f"data.examples is missing; data.prompts: {config.prompts} "
            "needs to know how many to generate"
        )
    if config.prompts == "bos":
        bos = getattr(idlm.model.config, "bos_token_id", None)
        if bos is None:
            raise InputError(
                f"the model {idlm.name!r} has no BOS token; "
                "give data.prompts a jsonl file of prompts"
            )
        return [([bos], "the BOS prompt")] * int(config.examples or 0)
    if config.prompts in SOURCES:
        pairs = islice(SOURCES[config.prompts].training(config.seed), config.examples)
        chats = [[{"role": "user", "content": question}] for question, _ in pairs]
        return [(ids, f"problem {i}") for i, ids in enumerate(idlm.encoder.chats(chats))]
    rows = islice(read_jsonl(config.prompts), config.examples)
    return [(prompt_ids(row, name, idlm), name) for name, row in rows]


def _checked(prompt: list[int], row: str, config: DataConfig, idlm: Idlm) -> list[int]:
    """The prompt, if it is not empty and leaves room for a response."""
    return fit(
        Example(prompt, [0], row), min(config.max_length or idlm.context, idlm.context)
    ).prompt


@torch.no_grad()
def generate(
    idlm: Idlm, prompts: list[list[int]], config: DataConfig, seed: int
) -> list[list[int]]:
    """A sampled response (greedy at temperature 0) to each prompt, with its end token."""
    limit = min(config.max_length or idlm.context, idlm.context)
    longest = max(len(p) for p in prompts)
    rows = [[0] * (longest - len(p)) + p for p in prompts]
    attended = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
    params = _params(config, idlm)
    settings = GenerationConfig(
        max_length=longest + max(min(config.max_tokens, limit - longest), 1),
        min_new_tokens=params.min_tokens,
        eos_token_id=sorted(idlm.eos_ids) or None,
        pad_token_id=0,
        repetition_penalty=params.repetition_penalty,
        suppress_tokens=[*params.banned_tokens, idlm.mask_id],
        do_sample=not params.greedy,
        **({} if params.greedy else _filters(params)),
    )
    model, own = idlm.model, idlm.model.generation_config
    ours = model.config._attn_implementation
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
        model.generation_config = GenerationConfig()  # it would fill what is not set
        try:
            output = model.eval().generate(
                torch.tensor(rows, device=model.device),
                attention_mask=torch.tensor(attended, device=model.device),
                generation_config=settings,
            )
        finally:
            model.generation_config = own
            model.set_attn_implementation(ours)
    return [_until_end(response, idlm.eos_ids) for response in output[:, longest:]]


def _params(config: DataConfig, idlm: Idlm) -> SamplingParams:
    """The settings of the responses: as the model decodes without a request's own, but for the
    temperature if the config has one."""
    given: dict[str, Any] = {"max_tokens": config.max_tokens}
    if config.temperature is not None:
        given["temperature"] = config.temperature
    return idlm.sampling(given)


def _filters(params: SamplingParams) -> dict[str, Any]:
    return {
        "temperature": params.temperature,
        "top_k": max(params.top_k, 0),
        "top_p": params.top_p,
        "min_p": params.min_p or None,
    }


def _until_end(response: Tensor, ends: frozenset[int]) -> list[int]:
    """The tokens up to and including the first end token."""
    tokens: list[int] = response.tolist()
    end = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:end]


def _settings(config: DataConfig, idlm: Idlm) -> dict[str, Any]:
    """What the responses depend on besides the weights."""
    keys = ("prompts", "seed", "max_tokens", "generate_batch", "max_length")
    params, plain = _params(config, idlm), SamplingParams(max_tokens=config.max_tokens)
    names = ("min_tokens", "top_k", "top_p", "min_p", "repetition_penalty", "banned_tokens")
    of_model = {
        name: getattr(params, name)
        for name in names
        if getattr(params, name) != getattr(plain, name)
    }
    sampling = {"temperature": params.temperature} | json.loads(json.dumps(of_model))
    return {"model": idlm.name, **{key: getattr(config, key) for key in keys}, **sampling}


def _read(file: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that are already in the file; a line cut off by a kill is dropped."""
    if not file.exists():
        return []
    rows = []
    for line in read_lines(file):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    for key in rows[0] | settings if rows else ():
        if rows[0].get(key) != settings.get(key):
            raise InputError(
                f"{file} was generated with {key} {rows[0].get(key)!r}, "
                f"now it is {settings.get(key)!r}; delete the file or restore the setting"
            )
    return rows[1:]


def _write(file: Path, rows: list[dict[str, Any]], mode: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open(mode, encoding="utf-8") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)

"""Random checkpoints with adapters, and requests, for engines whose model is split over ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from idlm import LLM, Result, SamplingParams, load
from idlm.engine.request import Terms
from idlm.guides import Thinking
from idlm.models import adapter
from idlm.models.gated_lora import LoraSpec, adapter_parameters, all_linear, attach
from idlm.models.heads import HeadSpec
from tests.heads import random_head
from tests.models.tiny import VOCAB, write

SHARED = [5, 9, 3, 7, 11, 4, 8, 6]
PROMPTS = [SHARED, [*SHARED, 30], [7], [4, 8] * 6, [11, 2, 11, 2]]
PAGES, PAGE = 24, 4
KV_BYTES = PAGES * 2 * 2 * PAGE * 2 * 8 * 8
"""Of the pages of a whole model: two layers of two KV heads of eight float64."""


def checkpoint(folder: Path, family: str, entry: int = 0, head: str | None = None) -> Path:
    """A base in `folder`/base with two adapters, `folder`/0 and `folder`/1, on all its layers."""
    biases = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
    base = write(folder / "base", family, tie_word_embeddings=entry == 0, **biases)
    for number in range(2):
        idlm = load(base, dtype="float64")
        spec = LoraSpec(3 + number, 6.0, all_linear(idlm.model, entry), entry=entry)
        idlm.gate = attach(idlm.model, spec, VOCAB)
        torch.manual_seed(number)
        for parameter in adapter_parameters(idlm.model).values():
            torch.nn.init.normal_(parameter, std=0.3)
        if head is not None:
            idlm.draft_heads = {0: random_head(idlm.model, HeadSpec(head, 6, 7), number)}
        print_of = adapter.fingerprint(idlm.model)
        adapter.save(idlm, spec, folder / str(number), print_of, VOCAB, block_size=3)
    return folder


def engine(folder: Path, ranks: int = 1, **options: Any) -> LLM:
    """An engine on all of it, with few pages. One with ranks has as many as one without. The
    prefill's budget is fixed, not steered by time: the ratio rule's tokens depend on the steps."""
    return LLM(
        str(folder / "base"),
        adapters={"one": folder / "0", "two": folder / "1"},
        dtype="float64",
        tensor_parallel_size=ranks,
        kv_memory=KV_BYTES // ranks,
        page_size=PAGE,
        max_num_seqs=4,
        prefill_tokens=8,
        **options,
    )


def settings(**changed: Any) -> SamplingParams:
    return SamplingParams(**({"temperature": 0.0, "max_tokens": 24, "ignore_eos": True} | changed))


REQUESTS = {
    "greedy": settings(),
    "logprobs": settings(logprobs=2, prompt_logprobs=1, max_tokens=12),
    "sampled": settings(temperature=1.0, seed=3),
    "filtered": settings(temperature=0.8, top_k=9, top_p=0.9, min_p=0.01, seed=4),
    "penalised": settings(temperature=0.9, presence_penalty=0.5, repetition_penalty=1.2, seed=5),
    "ratio": settings(temperature=0.9, verification="ratio", seed=6),
    "guided": settings(temperature=1.0, seed=7, thinking=Thinking(30, 31, True, 5), max_tokens=12),
}


def answers(llm: LLM, params: SamplingParams) -> list[Result]:
    """Those of both adapters to all prompts."""
    return [
        result for name in ("one", "two") for result in llm.generate(PROMPTS, params, adapter=name)
    ]


def with_an_abort(llm: LLM) -> list[Result]:
    """Requests of both adapters in one batch, of which one is aborted when it has begun."""
    names = [("one", True), ("two", True), ("one", False), ("two", True), ("one", True)]
    ids = [
        llm.engine.add(prompt, settings(temperature=1.0), 9, Terms(name, drafting))
        for prompt, (name, drafting) in zip(PROMPTS, names, strict=True)
    ]
    results = {}
    for number in range(10_000):
        if number == 3:
            llm.engine.abort(ids[1])
        for update in llm.engine.step():
            if update.result is not None:
                results[update.request_id] = update.result
        if not llm.engine.busy:
            break
    llm.engine.check()
    return [results[one] for one in ids if one != ids[1]]

"""A short real decode of held-out prompts while the model trains: what the engine makes of it.

The model is decoded as it is, without a copy: adapter, MASK row and all. Batch-invariant kernels
make AR and ISD comparable in every type; they also need no copy of the weights.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from idlm.engine.llm import LLM
from idlm.engine.request import Result
from idlm.models.idlm_model import Idlm
from idlm.params import SamplingParams

TOKENS = 64
"""The most tokens of each answer."""


def decode(
    idlm: Idlm, prompts: Sequence[list[int]], block_size: int, accelerator: Accelerator
) -> dict[str, Any]:
    """Decode the prompts greedily, with AR and at stride b + 1 with drafts for all outcomes.

    Each rank decodes its share.

    Returns:
        TPF and acceptance by depth over all prompts; how many prompts there were, and how many gave
        the tokens of AR, which is all of them unless something is broken.
    """
    mine = prompts[accelerator.process_index :: accelerator.num_processes]
    pairs = _decoded(idlm, mine, block_size) if mine else []
    sums = [torch.zeros(4 + 2 * block_size, dtype=torch.int64), *(_counts(*pair) for pair in pairs)]
    total = accelerator.reduce(torch.stack(sums).sum(0).to(accelerator.device), reduction="sum")
    count, identical, tokens, forwards, *depths = total.tolist()
    reached, accepted = depths[:block_size], depths[block_size:]
    return {
        "decode_tpf": tokens / max(forwards, 1),
        "decode_acceptance": [a / max(r, 1) for a, r in zip(accepted, reached, strict=True)],
        "decode_prompts": int(count),
        "decode_identical": int(identical),
    }


def _counts(ar: Result, isd: Result) -> Tensor:
    """Prompt, whether it is identical, tokens, forwards, drafts reached and accepted by depth."""
    same, tokens = ar.token_ids == isd.token_ids, len(isd.token_ids)
    return torch.tensor([1, same, tokens, isd.forwards, *isd.reached, *isd.accepted])


def _decoded(
    idlm: Idlm, prompts: Sequence[list[int]], block_size: int
) -> list[tuple[Result, Result]]:
    """The results of AR and ISD for each prompt; the context is as long as they need."""
    room = max(map(len, prompts)) + TOKENS
    options: dict[str, Any] = {
        "max_num_seqs": len(prompts),
        "max_model_len": min(room, idlm.context),
        "deterministic": True,
        "record": False,
        "threads": torch.get_num_threads(),
        "generation_config": "none",
    }
    most = [min(TOKENS, idlm.context - len(prompt)) for prompt in prompts]
    params = [SamplingParams(temperature=0, max_tokens=tokens) for tokens in most]
    with _as_loaded(idlm):
        ar = LLM(idlm, stride=1, **options).generate(prompts, params)
        isd = LLM(idlm, stride=block_size + 1, branches="all", **options).generate(prompts, params)
    gc.collect()  # the engines' pages, which cycles hold
    return list(zip(ar, isd, strict=True))


@contextmanager
def _as_loaded(idlm: Idlm) -> Iterator[None]:
    """The model as if it was loaded: without dropout and gradients, in one type. Afterwards it is
    as before, and so are the random numbers."""
    training, parameters = idlm.model.training, list(idlm.model.parameters())
    wanted, held = [p.requires_grad for p in parameters], [p.data for p in parameters]
    idlm.model.eval()
    with torch.random.fork_rng():
        try:
            for parameter in parameters:
                parameter.data = parameter.data.to(idlm.dtype)
            yield
        finally:
            for parameter, gradient, data in zip(parameters, wanted, held, strict=True):
                parameter.requires_grad_(gradient).data = data
            idlm.model.train(training)

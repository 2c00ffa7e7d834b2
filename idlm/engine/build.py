"""`build_engine`: from a model and a few wishes to an engine, with the reason for each automatic choice."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Sequence

import psutil
import torch

from idlm.decoding.errors import InputError
from idlm.decoding.plan import Plan
from idlm.decoding.window import parse_branches, window
from idlm.engine.engine import Engine
from idlm.engine.planner import Planner, candidates, measured
from idlm.engine.runner import Runner, attention_shapes
from idlm.kernels import native
from idlm.kernels.draft_weights import DraftWeights
from idlm.models.idlm_model import Idlm

log = logging.getLogger("idlm")

DEFAULT_SLOTS = 64
MEMORY_SHARE = {"cpu": 0.25, "cuda": 0.85}
"""Of the memory that is free once the weights are loaded, what the KV cache may take by itself."""
DRAFT_SHARE = 0.25
"""Of the free memory, what weights for MASK rows alone may take."""
UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def build_engine(
    idlm: Idlm,
    stride: int,
    branches: str | Iterable[int],
    adapters: Sequence[str] = (),
    max_num_seqs: int = DEFAULT_SLOTS,
    kv_memory: int | str | None = None,
    page_size: int = 16,
    prefill_tokens: int | None = None,
    deterministic: bool = False,
    simulate_acceptance: Sequence[float] | None = None,
    late: int | None = None,
    record: bool = True,
) -> Engine:
    """See `LLM` for the arguments; `late` and `record` as in `Engine` and `Runner`.

    Raises:
        InputError: an argument cannot be used.
    """
    plans = plans_for(stride, branches)
    _check(idlm, stride, max_num_seqs, page_size, prefill_tokens, simulate_acceptance)
    pages = _pages(idlm, max_num_seqs, kv_memory, page_size)
    depth = max(plan.drafts for plan in plans)
    weights = _draft_weights(idlm) if depth and not deterministic else None
    runner = Runner(idlm, max_num_seqs, depth, pages, page_size, record, simulate_acceptance, deterministic, weights)
    costs = measured(runner, plans, max_num_seqs) if branches == "planner" else None
    late = int(idlm.device.type == "cuda") if late is None else late
    root = f"{idlm.name} {idlm.dtype}".encode()
    planner = Planner(plans, costs)
    return Engine(runner, planner, pages, page_size, max_num_seqs, late, prefill_tokens, adapters, root)


def plans_for(stride: int, branches: str | Iterable[int]) -> list[Plan]:
    """The plans to choose from; one where the plan is fixed.

    Raises:
        InputError: the stride or the branches are wrong, or too wide for a window.
    """
    if branches == "planner":
        parse_branches("chain", stride)
        return candidates(stride)
    chosen = parse_branches(branches, stride)
    window(stride, chosen)  # refuses one that is too wide
    return [Plan(stride, chosen)]


def _check(
    idlm: Idlm,
    stride: int,
    max_num_seqs: int,
    page_size: int,
    prefill_tokens: int | None,
    simulate_acceptance: Sequence[float] | None,
) -> None:
    if stride > 1 and idlm.gate is None and idlm.mask_id >= idlm.vocab_size:
        raise InputError(f"model {idlm.name!r} has no MASK row to draft with; give an adapter, or use stride 1")
    for name, value in (("max_num_seqs", max_num_seqs), ("page_size", page_size), ("prefill_tokens", prefill_tokens)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise InputError(f"{name}={value!r} is not a whole number above 0; use for example 16")
    if simulate_acceptance is not None:
        wrong = [value for value in simulate_acceptance if not 0 <= value <= 1]
        if wrong or not simulate_acceptance:
            raise InputError(f"simulate_acceptance={list(simulate_acceptance)} must be shares from 0 to 1, by depth")


def parse_memory(value: int | str) -> int:
    """Bytes of `value`: a number of bytes, or a string such as "512MiB" or "2GiB".

    Raises:
        InputError: it is neither.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(|KiB|MiB|GiB)\s*", str(value))
    if isinstance(value, bool) or found is None or float(found[1]) == 0:
        raise InputError(f"kv_memory={value!r} is no amount of memory; give bytes, or for example '512MiB' or '2GiB'")
    return int(float(found[1]) * UNITS[found[2]])


def _pages(idlm: Idlm, slots: int, kv_memory: int | str | None, page_size: int) -> int:
    """How many pages the KV cache has, the trash page included; the reason goes to the log."""
    page_bytes = sum(2 * page_size * groups * size for _, groups, size in attention_shapes(idlm)) * idlm.dtype.itemsize
    per_request = math.ceil(idlm.context / page_size)
    enough = 2 * slots * per_request + 1  # every slot full, and as much again for the prefix cache
    budget = _share(idlm.device) if kv_memory is None else parse_memory(kv_memory)
    pages = min(enough, budget // page_bytes) if kv_memory is None else budget // page_bytes
    if pages < 2:
        raise InputError(f"kv_memory={kv_memory!r} holds {pages} pages of {page_bytes} bytes; give at least two")
    why = "as many as the slots can use, twice" if pages == enough else f"what {budget / 2**20:.0f} MiB hold"
    log.info(
        "KV cache: %d pages of %d tokens (%s), %.0f MiB, %.1f requests of full length",
        *(pages, page_size, why, pages * page_bytes / 2**20, (pages - 1) / per_request),
    )
    return int(pages)


def _draft_weights(idlm: Idlm) -> DraftWeights | None:
    """Weights for MASK rows alone, where this machine is faster with them; the reason goes to the log."""
    if idlm.device.type != "cpu" or idlm.dtype != torch.float32 or not native.int8_pays():
        return None
    adapters = 1 if idlm.gate is None else idlm.gate.adapters
    size, free = adapters * idlm.model.num_parameters(), psutil.virtual_memory().available
    if size > DRAFT_SHARE * free:
        why = "int8 weights of their own would take %.0f MiB, over a quarter of what is free"
        log.info(f"MASK rows run in float32: {why}", size / 2**20)
        return None
    log.info("MASK rows run in int8, %.0f MiB: their drafts are verified in float32 anyway", size / 2**20)
    return DraftWeights(idlm.mask_weights())


def _share(device: torch.device) -> int:
    """Bytes that the KV cache may take where nobody has said."""
    if device.type == "cuda":
        return int(MEMORY_SHARE["cuda"] * torch.cuda.mem_get_info(device)[0])
    return int(MEMORY_SHARE["cpu"] * psutil.virtual_memory().available)

"""`build_engine`: from a model and a few wishes to an engine, with the reason for each automatic
choice."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Sequence

import psutil
import torch

from idlm.decoding.plan import AR, Plan
from idlm.decoding.window import parse_branches, window
from idlm.engine.engine import PREFILL_ALONE, Engine
from idlm.engine.planner import Planner, candidates, measured
from idlm.engine.runner import Runner, attention_shapes, working_memory
from idlm.engine.threads import choose_threads
from idlm.errors import InputError
from idlm.kernels import native
from idlm.kernels.choice import choose_linears, drafts_pay
from idlm.kernels.fused import faster_operators
from idlm.kernels.huge_pages import give_back
from idlm.kernels.linears import Linears
from idlm.kernels.panels import FORMATS
from idlm.models.idlm_model import Idlm

log = logging.getLogger("idlm")

DEFAULT_SLOTS = 64
MEMORY_SHARE = {"cpu": 0.25, "cuda": 0.85}
"""Of the memory that is free once the weights are loaded, what the KV cache may take by itself."""
GRAPHS_MEMORY = 3 * 2**29
"""What CUDA's graphs and libraries may take."""
PANELS_SHARE, DRAFT_SHARE = 0.5, 0.25
"""Of the free memory, what the kernels' copy of the weights may take, and what weights for MASK
rows alone may."""
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
    weights: str = "auto",
    threads: int | None = None,
    take_weights: bool = False,
) -> Engine:
    """See `LLM` for the arguments; `late` and `record` as in `Engine` and `Runner`.

    With `take_weights` the model is the engine's: weights of linear layers that nobody reads any
    more are freed.

    Raises:
        InputError: an argument cannot be used.
    """
    plans = plans_for(stride, branches)
    _check(idlm, stride, branches, max_num_seqs, page_size, prefill_tokens, simulate_acceptance)
    if branches == "planner" and not idlm.can_draft:
        log.info(
            "AR: model %r has no MASK row to draft with; an adapter would bring one", idlm.name
        )
        plans = [AR]
    pages = _pages(
        idlm, max_num_seqs, kv_memory, page_size, max(plans, key=lambda plan: plan.width)
    )
    depth = max(plan.drafts for plan in plans)
    idlm.model.requires_grad_(False)
    linears = _linears(idlm, weights, deterministic)
    if idlm.device.type == "cpu":
        choose_threads(idlm, linears, threads)
    if linears is not None:
        choose_linears(linears)
        if depth:
            _add_drafts(idlm, linears)
    floats = idlm.device.type == "cpu" and idlm.dtype == torch.float32
    fused = _fused(idlm) if floats else frozenset()
    simulated = simulate_acceptance
    runner = Runner(
        idlm,
        max_num_seqs,
        depth,
        pages,
        page_size,
        record,
        simulated,
        deterministic,
        linears,
        fused,
    )
    if (
        take_weights and linears is not None
    ):  # before steps are recorded: a recording keeps what it reads
        linears.take(layer for _, layer in idlm.linear_layers())
        idlm.leave_file()
        give_back()
    costs = measured(runner, plans, max_num_seqs) if len(plans) > 1 else None
    late = int(idlm.device.type == "cuda") if late is None else late
    root = f"{idlm.name} {idlm.dtype}".encode()
    planner = Planner(plans, costs)
    return Engine(
        runner, planner, pages, page_size, max_num_seqs, late, prefill_tokens, adapters, root
    )


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
    branches: str | Iterable[int],
    max_num_seqs: int,
    page_size: int,
    prefill_tokens: int | None,
    simulate_acceptance: Sequence[float] | None,
) -> None:
    if any(not layer.weight.numel() for _, layer in idlm.linear_layers()):
        raise InputError(
            f"model {idlm.name!r}: its weights are an engine's, which freed them; load it again"
        )
    if stride > 1 and branches != "planner" and not idlm.can_draft:
        raise InputError(
            f"model {idlm.name!r} has no MASK row to draft with; give an adapter, or use stride 1"
        )
    for name, value in (
        ("max_num_seqs", max_num_seqs),
        ("page_size", page_size),
        ("prefill_tokens", prefill_tokens),
    ):
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int) or value < 1
        ):
            raise InputError(f"{name}={value!r} is not a whole number above 0; use for example 16")
    if simulate_acceptance is not None:
        wrong = [value for value in simulate_acceptance if not 0 <= value <= 1]
        if wrong or not simulate_acceptance:
            raise InputError(
                f"simulate_acceptance={list(simulate_acceptance)} must be shares from 0 to 1, by depth"
            )


def parse_memory(value: int | str) -> int:
    """Bytes of `value`: a number of bytes, or a string such as "512MiB" or "2GiB".

    Raises:
        InputError: it is neither.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(|KiB|MiB|GiB)\s*", str(value))
    if isinstance(value, bool) or found is None or float(found[1]) == 0:
        raise InputError(
            f"kv_memory={value!r} is no amount of memory; give bytes, or for example '512MiB' or '2GiB'"
        )
    return int(float(found[1]) * UNITS[found[2]])


def _pages(
    idlm: Idlm, slots: int, kv_memory: int | str | None, page_size: int, widest: Plan
) -> int:
    """How many pages the KV cache has, the trash page included; the reason goes to the log."""
    page_bytes = (
        sum(2 * page_size * groups * size for _, groups, size in attention_shapes(idlm))
        * idlm.dtype.itemsize
    )
    per_request = math.ceil(idlm.context / page_size)
    enough = 2 * slots * per_request + 1  # every slot full, and as much again for the prefix cache
    budget = _share(idlm, slots, widest) if kv_memory is None else parse_memory(kv_memory)
    pages = min(enough, budget // page_bytes) if kv_memory is None else budget // page_bytes
    if pages < 2:
        raise InputError(
            f"kv_memory={kv_memory!r} holds {pages} pages of {page_bytes} bytes; give at least two"
        )
    why = (
        "as many as the slots can use, twice"
        if pages == enough
        else f"what {budget / 2**20:.0f} MiB hold"
    )
    log.info(
        "KV cache: %d pages of %d tokens (%s), %.0f MiB, %.1f requests of full length",
        *(pages, page_size, why, pages * page_bytes / 2**20, (pages - 1) / per_request),
    )
    return int(pages)


def _linears(idlm: Idlm, weights: str, deterministic: bool) -> Linears | None:
    """The kernels that multiply by the model's weights; None where PyTorch does. The reasons go to
    the log.

    Raises:
        InputError: `weights` cannot be used with this model or on this machine.
    """
    if weights not in ("auto", *FORMATS):
        raise InputError(f"weights={weights!r} is unknown; use auto, {', '.join(FORMATS)}")
    reason = _no_kernels(idlm, deterministic)
    if reason is not None:
        if weights != "auto":
            raise InputError(f"weights={weights!r} {reason}; leave it out")
        return None
    format = weights
    if weights == "auto":
        format = "bfloat16" if idlm.stored == torch.bfloat16 else "float32"
        size, free = 4 * idlm.model.num_parameters(), psutil.virtual_memory().available
        if format == "float32" and size > PANELS_SHARE * free:
            why = "a copy of the weights for the C kernels would take %.0f MiB, over half of what is free"
            log.info(
                f"PyTorch multiplies: {why}; weights='bfloat16' or 'int8' need less", size / 2**20
            )
            return None
    return Linears(idlm.linear_groups(), format)


def _no_kernels(idlm: Idlm, deterministic: bool) -> str | None:
    """Why the C kernels cannot multiply for this engine; None where they can."""
    if idlm.device.type != "cpu":
        return f"is for a CPU, and the model is on {idlm.device}"
    if deterministic:
        return "does not go with deterministic=True, which has kernels of its own"
    if idlm.dtype != torch.float32:
        kind = str(idlm.dtype).removeprefix("torch.")
        return f"needs float32 activations, and the model is {kind} (dtype='float32' makes it that)"
    return (
        None if native.loaded() else "needs the C kernels, which are not there (the log says why)"
    )


def _add_drafts(idlm: Idlm, linears: Linears) -> None:
    """Give MASK rows int8 weights of their own where this machine is faster with them."""
    adapters = 1 if idlm.gate is None else idlm.gate.adapters
    size, free = adapters * idlm.model.num_parameters(), psutil.virtual_memory().available
    beside = idlm.adapter_weights()
    if size > DRAFT_SHARE * free:
        why = "int8 weights of their own would take %.0f MiB, over a quarter of what is free"
        log.info(f"MASK rows: the model's weights and the adapter; {why}", size / 2**20)
    elif drafts_pay(linears, {id(w): sum(m.shape[0] for m in low[::2]) for w, low in beside}):
        linears.add_drafts(idlm.mask_weights())
        return
    if linears.format == "float32":
        linears.add([matrix] for _, low in beside for matrix in low)


def _fused(idlm: Idlm) -> frozenset[str]:
    """The operators that recordings of steps use the C kernels for."""
    heads, _, size = attention_shapes(idlm)[0]
    config = idlm.model.config
    hidden = int(config.hidden_size)
    return faster_operators(
        hidden, int(getattr(config, "intermediate_size", None) or 4 * hidden), heads, size
    )


def _share(idlm: Idlm, slots: int, widest: Plan) -> int:
    """Bytes that the KV cache may take where nobody has said."""
    if idlm.device.type != "cuda":
        return int(MEMORY_SHARE["cpu"] * psutil.virtual_memory().available)
    work = working_memory(idlm, PREFILL_ALONE + slots * widest.width, slots * widest.stride)
    return gpu_share(torch.cuda.mem_get_info(idlm.device)[0], work)


def gpu_share(free: int, work: int) -> int:
    """Bytes of a GPU's free ones for the KV cache; `work` is what a step's forward takes, its
    verdict takes as much."""
    return max(0, min(int(MEMORY_SHARE["cuda"] * free), free - 2 * work - GRAPHS_MEMORY))

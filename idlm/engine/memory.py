"""The size of the KV cache. The log gives the reason for it."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import psutil
import torch

from idlm.config import EngineConfig, parse_memory
from idlm.decoding.plan import Plan
from idlm.engine.budget import PREFILL_ALONE
from idlm.engine.shapes import Shape, working_memory
from idlm.errors import InputError
from idlm.models.idlm_model import Idlm

log = logging.getLogger("idlm")

MEMORY_SHARE = {"cpu": 0.25, "cuda": 0.85}
"""The default share of the KV cache in the memory that is free after the weights are loaded."""
GRAPHS_MEMORY = 3 * 2**29
"""Bytes reserved for CUDA graphs and libraries."""


def cache_pages(idlm: Idlm, config: EngineConfig, shapes: Sequence[Shape], widest: Plan) -> int:
    """The number of pages of the KV cache, including the trash page.

    `shapes` are those of the attention, by layer; `widest` is the plan with the most rows.

    Raises:
        InputError: `config.kv_memory` is too small for two pages.
    """
    page_size, slots = config.page_size, config.max_num_seqs
    page_bytes = _page_bytes(config, shapes, idlm.dtype)
    per_request = math.ceil(idlm.context / page_size)
    enough = 2 * slots * per_request + 1  # all slots at full length, and as many cached pages
    if config.kv_memory is None:
        budget = _share(idlm, config, widest)
        pages = min(enough, budget // page_bytes)
    else:
        budget = parse_memory(config.kv_memory)
        pages = budget // page_bytes
    _two_at_least(config, pages, page_bytes)
    held = f"what {budget / 2**20:.0f} MiB hold"
    log.info(
        "KV cache: %d pages of %d tokens (%s), %.0f MiB, %.1f requests of full length",
        pages,
        page_size,
        "as many as the slots can use, twice" if pages == enough else held,
        pages * page_bytes / 2**20,
        (pages - 1) / per_request,
    )
    return int(pages)


def check_kv_memory(config: EngineConfig, shapes: Sequence[Shape], dtype: torch.dtype) -> None:
    """Check `config.kv_memory` for a model that is not loaded yet.

    Raises:
        InputError: as `cache_pages`.
    """
    if config.kv_memory is not None:
        page_bytes = _page_bytes(config, shapes, dtype)
        _two_at_least(config, parse_memory(config.kv_memory) // page_bytes, page_bytes)


def _page_bytes(config: EngineConfig, shapes: Sequence[Shape], dtype: torch.dtype) -> int:
    numbers = sum(2 * config.page_size * groups * size for _, groups, size in shapes)
    return numbers * dtype.itemsize


def _two_at_least(config: EngineConfig, pages: int, page_bytes: int) -> None:
    if pages < 2:
        raise InputError(
            f"kv_memory={config.kv_memory!r} holds {pages} pages of {page_bytes} bytes; "
            "give at least two"
        )


def _share(idlm: Idlm, config: EngineConfig, widest: Plan) -> int:
    """The bytes of the KV cache if `kv_memory` is not set. On a CPU all ranks share the memory."""
    if idlm.device.type != "cuda":
        free = psutil.virtual_memory().available
        return int(MEMORY_SHARE["cpu"] * free / config.tensor_parallel_size)
    slots = config.max_num_seqs
    work = working_memory(idlm, PREFILL_ALONE + slots * widest.width, slots * widest.stride)
    return gpu_share(torch.cuda.mem_get_info(idlm.device)[0], work)


def gpu_share(free: int, work: int) -> int:
    """The bytes of the KV cache on a GPU with `free` bytes. A step's forward takes `work` bytes;
    its verification takes as many again."""
    return max(0, min(int(MEMORY_SHARE["cuda"] * free), free - 2 * work - GRAPHS_MEMORY))

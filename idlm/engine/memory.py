"""How much memory the KV cache takes, and the reason for it."""

from __future__ import annotations

import logging
import math

import psutil
import torch

from idlm.config import EngineConfig, parse_memory
from idlm.decoding.plan import Plan
from idlm.engine.budget import PREFILL_ALONE
from idlm.engine.shapes import attention_shapes, working_memory
from idlm.errors import InputError
from idlm.models.idlm_model import Idlm

log = logging.getLogger("idlm")

MEMORY_SHARE = {"cpu": 0.25, "cuda": 0.85}
"""Of the memory that is free after the weights are loaded: the KV cache's share by default."""
GRAPHS_MEMORY = 3 * 2**29
"""Bytes left for CUDA's graphs and libraries."""


def cache_pages(idlm: Idlm, config: EngineConfig, widest: Plan) -> int:
    """Pages of the KV cache, the trash page included; the log says why so many.

    Raises:
        InputError: `config.kv_memory` holds less than two pages.
    """
    page_size, slots = config.page_size, config.max_num_seqs
    shapes = attention_shapes(idlm)
    page_bytes = sum(2 * page_size * groups * size for _, groups, size in shapes)
    page_bytes *= idlm.dtype.itemsize
    per_request = math.ceil(idlm.context / page_size)
    enough = 2 * slots * per_request + 1  # every slot full, and as much again for the prefix cache
    if config.kv_memory is None:
        budget = _share(idlm, slots, widest)
        pages = min(enough, budget // page_bytes)
    else:
        budget = parse_memory(config.kv_memory)
        pages = budget // page_bytes
    if pages < 2:
        raise InputError(
            f"kv_memory={config.kv_memory!r} holds {pages} pages of {page_bytes} bytes; "
            "give at least two"
        )
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

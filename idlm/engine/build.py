"""`build_engine`: chooses plans, kernels and cache size, and makes an engine from them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from idlm.attention.torch import TorchAttention
from idlm.config import EngineConfig
from idlm.decoding.plan import AR, LOOKUPS, Plan, plans_for
from idlm.engine.costs import measured_costs
from idlm.engine.engine import Engine
from idlm.engine.kv_cache import KVCache
from idlm.engine.lookup_planner import LookupPlanner
from idlm.engine.memory import cache_pages
from idlm.engine.planner import Planner
from idlm.engine.products import free_weights, products_for
from idlm.engine.runner import Runner
from idlm.engine.shapes import attention_shapes
from idlm.errors import InputError
from idlm.models.idlm_model import Idlm
from idlm.models.parallel import least

log = logging.getLogger("idlm")


def build_engine(
    idlm: Idlm,
    config: EngineConfig,
    adapters: Sequence[str | None] = (),
    take_weights: bool = False,
    changing: bool = False,
    make: Callable[..., Runner] = Runner,
) -> Engine:
    """An engine for the model. The log gives the reason for each automatic choice.

    Args:
        adapters: the names of the adapters, by index; None: an index without adapter.
        take_weights: the engine owns the model. It frees the weights of linear layers that its
            kernels have a copy of.
        changing: adapters can be loaded and unloaded later. Then MASK rows have no weights of
            their own, which would hold all adapters.
        make: makes the runner, of the arguments of `Runner`.

    Raises:
        InputError: an option cannot be used with this model or on this machine.
    """
    usual, lookups = plans_of(idlm, config)
    plans = [*usual, *lookups]
    runner, window = runner_for(idlm, config, plans, changing, make)
    products = runner.model_step.products
    if take_weights and products.linears is not None:
        free_weights(idlm, products.linears)  # before recording: a recording keeps them alive
    costs = measured_costs(runner, plans, config.max_num_seqs) if len(plans) > 1 else None
    planner = Planner(usual, costs)
    if not lookups or planner.costs is None or runner.lookup is None:
        return Engine(runner, planner, config, adapters, window)
    second = LookupPlanner(lookups, planner.costs, planner.acceptance, runner.replace_from)
    return Engine(runner, planner, config, adapters, window, second)


def runner_for(
    idlm: Idlm,
    config: EngineConfig,
    plans: Sequence[Plan],
    changing: bool,
    make: Callable[..., Runner],
) -> tuple[Runner, int | None]:
    """The runner of an engine, and the largest sliding window if all layers have one; arguments and
    errors as of `build_engine`. If the model is split, all ranks call this together."""
    idlm.model.requires_grad_(False)
    drafting = any(plan.masks for plan in plans) and not changing
    shapes, window = attention_shapes(idlm)
    # before the kernels copy the weights: the cache's share is of the memory that is free now
    pages = cache_pages(idlm, config, shapes, max(plans, key=lambda plan: plan.width))
    products = products_for(idlm, config, shapes, drafting)
    like = torch.empty(0, dtype=idlm.dtype, device=idlm.device)
    if config.tensor_parallel_size > 1:
        pages = least(pages, idlm.device)
    cache = KVCache(shapes, pages, config.page_size, like, config.deterministic)
    if config.tensor_parallel_size > 1 and idlm.device.type == "cpu":
        # not the faster one here: ranks must record the same steps
        cache.backend = TorchAttention(cache.pages[0], shapes[0][0])
    return make(idlm, config, plans, cache, products), window


def plans_of(idlm: Idlm, config: EngineConfig) -> tuple[list[Plan], list[Plan]]:
    """The configured plans that the model can run, those that only look drafts up apart. Without a
    MASK row the others are AR."""
    if any(not layer.weight.numel() for _, layer in idlm.linear_layers()):
        raise InputError(
            f"model {idlm.name!r}: its weights are an engine's, which freed them; load it again"
        )
    looking = config.stride > 1 and config.branches == "planner" and config.drafts != "masks"
    lookups = list(LOOKUPS) if looking else []
    if looking and config.drafts == "lookup":
        return [AR], lookups
    plans = plans_for(config.stride, config.branches)
    if idlm.can_draft or not any(plan.masks for plan in plans):
        return plans, lookups
    if config.branches != "planner":
        raise InputError(
            f"model {idlm.name!r} has no MASK row to draft with; give an adapter, or use stride 1"
        )
    log.info(
        "%s: model %r has no MASK row to draft with; an adapter would bring one",
        "lookup drafts only" if lookups else "AR",
        idlm.name,
    )
    return [AR], lookups

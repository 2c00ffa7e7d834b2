"""First checks on a GPU: the same tokens for every plan, batch, graph and device?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Any

import torch

from idlm import Idlm, SamplingParams, load
from idlm.config import EngineConfig
from idlm.engine.build import build_engine
from idlm.engine.prefill import Chunk, PrefillBatch
from idlm.nano.problems import held_out_problems

Figure = tuple[str, Callable[[], dict[str, object]]]
Outputs = list[list[int]]

NUMBER, TOKENS = 8, 40
DTYPES = (torch.float32, torch.bfloat16)
PLANS = ((4, "all"), (3, "chain"))
PARAMS = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=TOKENS),
    "sampled": SamplingParams(temperature=0.8, top_p=0.9, max_tokens=TOKENS),
}
KINDS = (("greedy", False), ("sampled", False), ("greedy", True))
"""Names of `PARAMS`, and whether the engine is deterministic."""


def smoke(device: str = "cuda") -> Iterator[Figure]:
    """The bundled model in float32 and bfloat16; each figure is one comparison of tokens."""
    for dtype in DTYPES:
        idlm = load("nano", dtype=dtype, device=device)
        prompts = questions(idlm)
        for name, deterministic in KINDS:
            label = f"{str(dtype).removeprefix('torch.')} {name}"
            label += " deterministic" if deterministic else ""
            yield label, partial(comparisons, idlm, prompts, PARAMS[name], deterministic)
        yield f"{dtype} layers".removeprefix("torch."), partial(few_launches, idlm, prompts)
    yield "float32 greedy against the CPU", partial(against_the_cpu, device)


def questions(idlm: Idlm, count: int = NUMBER) -> Outputs:
    tokenizer: Any = idlm.tokenizer
    chats = [
        [{"role": "user", "content": problem.question}] for problem in held_out_problems(count)
    ]
    texts = [
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        for chat in chats
    ]
    return [list(tokenizer(text, add_special_tokens=False).input_ids) for text in texts]


def decode(
    idlm: Idlm, prompts: Outputs, params: SamplingParams, stride: int, branches: str, **options: Any
) -> Outputs:
    """The tokens of each prompt, all in flight at once; `options` are those of `build_engine`."""
    engine = build_engine(
        idlm,
        EngineConfig(stride, branches, **{"max_num_seqs": 16, "kv_memory": "256MiB"} | options),
    )
    names = [engine.add(prompt, params, seed=seed) for seed, prompt in enumerate(prompts)]
    results = {
        update.request_id: update.result for update in engine.run() if update.result is not None
    }
    return [results[name].token_ids for name in names]


def comparisons(
    idlm: Idlm, prompts: Outputs, params: SamplingParams, deterministic: bool
) -> dict[str, object]:
    """Every plan against AR, graphs against eager steps, a batch against each prompt alone.

    If sums depend on the shapes of a step (bfloat16, not deterministic), equality is a figure
    without a bound.
    """
    started = perf_counter()
    run = partial(decode, idlm, prompts, params, deterministic=deterministic)
    ar = run(1, "all")
    shares = {
        f"{branches}-{stride} = AR": same(run(stride, branches), ar) for stride, branches in PLANS
    }
    shares["batch = alone"] = same(run(1, "all", max_num_seqs=1), ar)
    graph = same(run(4, "all", record=False), run(4, "all"))
    exact = deterministic or idlm.dtype == torch.float32
    bounds = {name: [share, share == 1.0] for name, share in shares.items() if exact}
    bounds["graph = eager"] = [graph, graph == 1.0]
    return {**shares, "graph = eager": graph, "took": perf_counter() - started, "bounds": bounds}


def few_launches(idlm: Idlm, prompts: Outputs) -> dict[str, object]:
    """Whether layers run by few kernels, and how far the hidden states of a prompt are from those
    of the model's own layers, relative to their size."""
    config = EngineConfig(1, max_num_seqs=1, kv_memory="64MiB", record=False)
    products = build_engine(idlm, config).runner.model_step.products
    states = []
    for used in (products, replace(products, layers=None)):
        engine = build_engine(idlm, config)
        step = engine.runner.model_step
        step.products = used
        page = step.cache.page_size  # the spare slot has one page
        chunk = [Chunk(engine.runner.slots.spare, prompts[0][:page], 0)]
        batch = PrefillBatch.of(chunk, page, engine.runner._on_device)
        with torch.inference_mode():
            states.append(step.prefill(batch).double())
    apart = float((states[0] - states[1]).norm() / states[1].norm())
    few, limit = products.layers is not None, 50 * torch.finfo(idlm.dtype).eps
    return {"apart": apart, "bounds": {"few": [few, few], "alike": [apart, apart <= limit]}}


def against_the_cpu(device: str) -> dict[str, object]:
    """AR on the GPU and on the CPU; rounding differs, so outputs may differ where two tokens nearly
    tie."""
    params, outputs = PARAMS["greedy"], []
    for where in (device, "cpu"):
        idlm = load("nano", dtype=torch.float32, device=where)
        outputs.append(decode(idlm, questions(idlm), params, 1, "all"))
    share = same(*outputs)
    return {"same": share, "bounds": {"9 of 10 requests": [share, share >= 0.9]}}


def same(some: Sequence[Sequence[int]], others: Sequence[Sequence[int]]) -> float:
    """The share of requests with the same tokens."""
    return sum(mine == theirs for mine, theirs in zip(some, others, strict=True)) / len(some)

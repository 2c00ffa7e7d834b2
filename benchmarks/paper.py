"""The paper's figure, small: AR, I-DLM, SDAR and LLaDA from one base with equal training tokens.

    python -m benchmarks.paper [--size small|full] [--methods ...] [--runs FOLDER] [--out FILE]

1. Each method is trained on the bundled base: the same word problems in the same order, as many
   steps of 16 texts, one learning rate for whole models and one for adapters. A run that is already
   in the folder goes on where it was, or is used as it is.
2. Each decodes held-out problems greedily: exact answers with a 95 % interval (Wilson), tokens per
   forward, rows per token.
3. alpha by depth at temperature 1, as `idlm accept` measures it.
4. Tokens per CPU second of one thread at 1, 8 and 32 requests at once. The engine's kernels are in
   C and the baselines' are PyTorch's, so `in_engine` says what SDAR would reach in the engine: its
   TPF over the cost of an engine's step of as many rows (the plan all-2, which has 4).

SDAR's block is the stride of ISD: both commit at most 4 tokens at a time. LLaDA decodes one token,
and two, for each forward; both are shown. Prompt lookup is the plain rival, without training: the
engine with 7 lookup drafts in every step.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from time import process_time
from typing import Any, NamedTuple

import torch

import idlm.nano.source  # noqa: F401  # registers the texts
from benchmarks.pages.tables import markdown, shares
from idlm import LLM, SamplingParams
from idlm.baselines import llada, sdar
from idlm.baselines.llada import Llada
from idlm.baselines.sdar import Sdar
from idlm.decoding.plan import plans_for
from idlm.environment import environment
from idlm.evaluation.acceptance import Item, measure_baseline, measure_causal
from idlm.evaluation.results import wilson
from idlm.models.idlm_model import Idlm
from idlm.models.loading import load
from idlm.nano.problems import Problem, held_out_problems, read_answer
from idlm.training.read_config import parse_config
from idlm.training.run import train

BLOCK = 4
ANSWER = 192
"""The most tokens of an answer: the longest solutions have 172."""
SIZES = {"small": (100, 200, 16), "full": (900, 2000, 64)}
"""Steps of the training, problems, and texts for alpha."""
CONCURRENCY = (1, 8, 32)
OBJECTIVES: dict[str, dict[str, Any]] = {
    "idlm-lora": {"objective": "idlm", "method": "lora", "lora": {"rank": 64, "alpha": 64}},
    "idlm-full": {"objective": "idlm", "method": "full"},
    "sdar": {"objective": "sdar", "method": "full"},
    "llada": {"objective": "llada", "method": "full", "diffusion": {"fill": 288}},
}
"""What the training of a method has of its own."""
ADAPTER = {"name": "adamw", "lr": 0.006}
WHOLE = {"name": "muon", "lr": 0.003}
"""The optimizers of configs/nano-lora.yaml and configs/nano-full.yaml."""


class Method(NamedTuple):
    """A way to decode: the training it needs (None: the base), and a baseline's rule, or stride and
    branches of the engine."""

    trained: str | None
    rule: Sdar | Llada | None = None
    stride: int = 1
    branches: str = "all"


METHODS = {
    "ar": Method(None),
    "prompt lookup": Method(None, stride=8, branches="lookup"),
    "idlm-lora": Method("idlm-lora", stride=BLOCK),
    "idlm-full": Method("idlm-full", stride=BLOCK),
    "sdar": Method("sdar", Sdar(BLOCK, BLOCK, "dynamic", 0.9)),
    "llada": Method("llada", Llada(32, 32)),
    "llada, 2 a step": Method("llada", Llada(32, 16)),
}


def config(method: str, steps: int, folder: Path) -> dict[str, Any]:
    """The keys of a method's training, for `idlm train`."""
    soft = {"tv": 1.0} if method.startswith("idlm") else {}
    block = BLOCK - 1 if method.startswith("idlm") else BLOCK
    optimizer = ADAPTER if OBJECTIVES[method]["method"] == "lora" else WHOLE
    return {
        "output_dir": str(folder / method),
        "resume": True,
        "seed": 0,
        "threads": 1,
        "bf16": True,
        "batch_size": 16,
        "log_steps": 10,
        "eval_steps": steps,
        "save_steps": 50,
        "stages": [{"block_size": block, "steps": steps, **soft}],
        "optimizer": {**optimizer, "schedule": "cosine", "warmup": min(30, steps // 4)},
        "data": {"source": "nano", "seed": 2, "held_out": 64},
        "model": {"path": "nano-base"},
        **OBJECTIVES[method],
    }


class Decoded(NamedTuple):
    """Answers as token ids, with their forwards and the rows of these."""

    token_ids: list[list[int]]
    forwards: int
    rows: int


Decode = Callable[[list[list[int]]], Decoded]


def decoder(idlm: Idlm, method: Method, width: int) -> Decode:
    """A function that decodes prompts greedily, `width` at once."""
    params = SamplingParams(temperature=0.0, max_tokens=ANSWER)
    if method.rule is None:
        plan = {"stride": method.stride, "branches": method.branches}
        llm = LLM(idlm, **plan, max_num_seqs=width, threads=1)
        (window,) = plans_for(**plan)

        def by_engine(prompts: list[list[int]]) -> Decoded:
            results = llm.generate(prompts, params)
            forwards = sum(result.forwards for result in results)
            ids = [result.token_ids for result in results]
            return Decoded(ids, forwards, forwards * window.width)

        return by_engine
    rule = method.rule
    run: Any = {Sdar: sdar, Llada: llada}[type(rule)].decode

    def by_baseline(prompts: list[list[int]]) -> Decoded:
        parts = [prompts[at : at + width] for at in range(0, len(prompts), width)]
        found = [one for part in parts for one in run(idlm, part, params, rule)]
        ids = [one.token_ids for one in found]
        return Decoded(ids, sum(one.forwards for one in found), sum(one.rows for one in found))

    return by_baseline


def quality(
    idlm: Idlm, decode: Decode, problems: Sequence[Problem], prompts: list[list[int]]
) -> dict[str, Any]:
    """Part 2: exact answers, TPF and rows a token."""
    found = decode(prompts)
    tokenizer = idlm.encoder.tokenizer
    texts = [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in found.token_ids]
    right = sum(
        read_answer(text) == problem.answer for text, problem in zip(texts, problems, strict=True)
    )
    tokens = sum(map(len, found.token_ids))
    return {
        "problems": len(problems),
        "accuracy": right / len(problems),
        "interval": wilson(right, len(problems))[1:],
        "tpf": tokens / found.forwards,
        "rows_per_token": found.rows / tokens,
    }


def speeds(idlm: Idlm, method: Method, prompts: list[list[int]]) -> dict[str, float]:
    """Part 4: tokens per CPU second by requests at once, after a warm-up."""
    found = {}
    for width in CONCURRENCY:
        decode, chosen = decoder(idlm, method, width), prompts[: max(width, 4)]
        decode(chosen[:1])
        began = process_time()
        tokens = sum(map(len, decode(chosen).token_ids))
        found[str(width)] = tokens / (process_time() - began)
    return found


def alpha(idlm: Idlm, method: Method, prompts: list[list[int]]) -> dict[str, Any]:
    """Part 3, by definition of p: alpha in all and by depth."""
    items = [Item(prompt) for prompt in prompts]
    params = SamplingParams(temperature=1.0, max_tokens=ANSWER, seed=0)
    if method.rule is None:
        report = measure_causal(idlm, items, params, method.stride, branches=method.branches)
    else:
        report = measure_baseline(idlm, items, params, method.rule)
    return {
        name: {
            "alpha": one["alpha"],
            "argmax": one["argmax"],
            "by_depth": [depth["alpha"] for depth in one["by_depth"]],
        }
        for name, one in report["definitions"].items()
    }


def measured(
    name: str, idlm: Idlm, problems: Sequence[Problem], texts: int, wide: Method
) -> dict[str, Any]:
    """All figures of a method; `wide` is the engine's plan with as many rows as SDAR."""
    method = METHODS[name]
    chats = [[{"role": "user", "content": problem.question}] for problem in problems]
    prompts = idlm.encoder.chats(chats)
    report = quality(idlm, decoder(idlm, method, max(CONCURRENCY)), problems, prompts)
    report["acceptance"] = alpha(idlm, method, prompts[:texts])
    report["tokens_per_second"] = speeds(idlm, method, prompts)
    if isinstance(method.rule, Sdar):
        drafted = load("nano")
        once = decoder(drafted, wide, max(CONCURRENCY))(prompts[: max(CONCURRENCY)])
        tpf = sum(map(len, once.token_ids)) / once.forwards
        steps = {at: rate / tpf for at, rate in speeds(drafted, wide, prompts).items()}
        report["in_engine"] = {at: rate * report["tpf"] for at, rate in steps.items()}
    return report


def table(report: dict[str, Any]) -> str:
    """The figures as Markdown."""
    head = ["method", "exact answers", "TPF", "rows a token", "alpha", "by depth"]
    head += [f"tokens/s at {width}" for width in CONCURRENCY]
    rows = []
    for name, one in report["methods"].items():
        low, high = one["interval"]
        exact = f"{one['accuracy']:.3f} ({low:.3f}-{high:.3f})"
        both = one["acceptance"].values()
        values = " / ".join(f"{each['alpha']:.3f}" for each in both)
        depths = " / ".join(shares(each["by_depth"][:BLOCK]) for each in both)
        speed = [f"{rate:,.0f}" for rate in one["tokens_per_second"].values()]
        cost = f"{one['rows_per_token']:.1f}"
        rows.append([name, exact, f"{one['tpf']:.2f}", cost, values, depths, *speed])
        if "in_engine" in one:
            engine = [f"{rate:,.0f}" for rate in one["in_engine"].values()]
            rows.append([f"{name}, by the engine's steps", *[""] * 5, *engine])
    return "\n".join(markdown(head, rows))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--runs", type=Path, default=Path("runs/paper"))
    for name in ("steps", "problems", "texts"):
        parser.add_argument(f"--{name}", type=int, help="instead of the size's")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    given = (options.steps, options.problems, options.texts)
    steps, count, texts = (
        mine or all for mine, all in zip(given, SIZES[options.size], strict=True)
    )
    problems, folder = held_out_problems(count), options.runs / f"{steps}-steps"
    report: dict[str, Any] = {"environment": environment(), "steps": steps, "methods": {}}
    for name in options.methods:
        trained = METHODS[name].trained
        idlm = load("nano-base")
        if trained is not None:
            final = folder / trained / "final"
            if not final.exists():
                train(parse_config(config(trained, steps, folder)))
            lora = OBJECTIVES[trained]["method"] == "lora"
            idlm = load("nano-base", adapter=final) if lora else load(final)
        wide = Method("idlm-lora", stride=2)
        report["methods"][name] = measured(name, idlm, problems, texts, wide)
        print(json.dumps({name: report["methods"][name]}), flush=True)
        if options.out is not None:
            options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(report))


if __name__ == "__main__":
    main()

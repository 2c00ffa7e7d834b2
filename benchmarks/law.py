"""The law's top-k, top-p and min-p by candidates (`idlm.kernels.keep`) against the sort.

    python -m benchmarks.law [--rows 10000] [--jobs 4] [--out FILE]

1. Rows of Qwen3's vocabulary, random and adversarial, each with a filter of its own: whether the
   same tokens are kept, and the same one is chosen. `--jobs` processes share them.
2. What both compute for a row: bytes that PyTorch's operations read and write, comparisons of sorts
   (n log2 n), and for the GPU's kernel the passes over the row.
3. CPU time of both, in turn, the least of several rounds.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from idlm import SamplingParams
from idlm.decoding.law import choose, filtered
from idlm.decoding.noise import Stream
from idlm.decoding.settings import Settings
from idlm.environment import environment
from idlm.kernels import keep

VOCAB = 151_936
SIZES = (151_936, 49_152, 640)
"""Qwen3's vocabulary, SmolLM2's, and about nano's."""
ROUNDS = 7
KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "random": lambda x: 3 * x,
    "peaked": lambda x: 3 * x + 12 * (x > 3.5),
    "flat": lambda x: 0.1 * x,
    "bfloat16": lambda x: (3 * x).to(torch.bfloat16),
    "many ties": lambda x: (2 * x).round(),
    "all equal": lambda x: torch.zeros_like(x),
    "two values": lambda x: (x > 0).to(x.dtype),
    "few allowed": lambda x: x.masked_fill(x < 3, -torch.inf),
    "steep": lambda x: 300 * x,
    "apart by 1e-15": lambda x: 1 + 1e-15 * (4 * x.to(torch.float64)).round(),
}


def some_filter(chance: random.Random) -> SamplingParams:
    """A request with a filter; some masses are those that equal tokens reach exactly."""
    return SamplingParams(
        temperature=chance.choice([0.3, 0.7, 1.0, 1.3, 2.0]),
        top_p=chance.choice([1.0, 0.95, 0.9, 0.5, 0.25, 1e-3, chance.random() or 1.0]),
        top_k=chance.choice([0, 0, 1, 20, 50, 1000, 100_000]),
        min_p=chance.choice([0.0, 0.0, 0.05, 0.5]),
    )


def settings_of(requests: list[SamplingParams], vocab: int) -> Settings:
    rows = Settings.empty(len(requests), vocab, vocab)
    for slot, params in enumerate(requests):
        rows.put(slot, params, seed=slot, prompt=[0])
    return rows


@torch.inference_mode()
def same(rows: int, seed: int) -> dict[str, Counter[str]]:
    """Rows by kind, those of which kept tokens or the choice differ, and those that were sorted."""
    torch.set_num_threads(1)
    chance, source = random.Random(seed), torch.Generator().manual_seed(seed)
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    with counted_sorts() as sorts:
        for number in range(rows):
            kind = list(KINDS)[number % len(KINDS)]
            scores = KINDS[kind](torch.randn(1, 1, VOCAB, generator=source))
            settings = settings_of([some_filter(chance)], VOCAB)
            before, position = sorts[0], torch.tensor([number])
            ours = keep.keep_on_cpu(scores, settings, settings.features)
            counts[kind]["rows"] += 1
            counts[kind]["sorted"] += sorts[0] > before
            oracle = filtered(scores, settings, settings.features)
            counts[kind]["kept differ"] += not torch.equal(ours, oracle)
            tokens = [choose(of, settings, True, Stream.TOKEN, position) for of in (ours, oracle)]
            counts[kind]["tokens differ"] += not torch.equal(*tokens)
    return counts


def shared(rows: int, jobs: int) -> dict[str, dict[str, int]]:
    """`same` in several processes, each with a seed of its own."""
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        parts = list(pool.map(same, [rows // jobs] * jobs, range(jobs)))
    return {kind: dict(sum((part[kind] for part in parts), Counter())) for kind in KINDS}


class counted_sorts:
    """Counts the rows that `keep` sorts after all."""

    def __enter__(self) -> list[int]:
        self.count, self.by_sort = [0], keep._by_sort

        def counted(scaled: Tensor, k: int, p: float) -> Tensor:
            self.count[0] += 1
            return self.by_sort(scaled, k, p)

        keep._by_sort = counted
        return self.count

    def __exit__(self, *_: object) -> None:
        keep._by_sort = self.by_sort


class Counted(TorchDispatchMode):
    """Bytes that operations read and write, and comparisons of sorts."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.comparisons = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [one for one in tree_leaves((args, result)) if isinstance(one, Tensor)]
            self.bytes += sum(one.numel() * one.element_size() for one in tensors)
        if "sort" in str(func):
            size = args[0].shape[-1]
            self.comparisons += args[0].numel() * max(1, math.ceil(math.log2(max(size, 2))))
        return result


def work(scores: Tensor, params: SamplingParams) -> dict[str, float]:
    """What sort, candidates and kernel compute for a row [V] of float32."""
    settings, found = settings_of([params], len(scores)), {}
    columns = settings.temperature, settings.top_k, settings.top_p, settings.min_p
    calls: dict[str, Callable[[], Tensor]] = {
        "sort": lambda: filtered(scores[None, None], settings, settings.features),
        "candidates": lambda: keep.keep(scores[None, None], *columns),
    }
    for name, call in calls.items():
        with Counted() as counted:
            call()
        found |= {f"{name} bytes": counted.bytes, f"{name} comparisons": counted.comparisons}
    passes = sum(1 for _ in kernel_passes(scores.double() / params.temperature, params.top_p))
    return found | {"kernel passes": passes, "kernel bytes": passes * 4 * len(scores)}


def kernel_passes(scores: Tensor, p: float) -> Iterator[str]:
    """The passes of `keep_triton` over a row with top-p alone, by its own steps."""
    yield "largest"
    weights = (scores - scores.amax()).exp()
    yield "total"
    total = weights.sum()
    low = max(scores.amin(), scores.amax() + ((1 - p) * total / len(scores)).log() - 1)
    high = scores.amax()
    while low < high:
        middle = low + (high - low) / 2
        middle = middle if middle > low else high
        upper = scores >= middle
        yield "search"
        if weights[upper].sum() >= p * total:
            low = scores[upper].amin()
        else:
            high = torch.maximum(scores[~upper].amax(), low)
    yield "above"
    yield "write, which reads and writes"
    yield "write"


def seconds(call: Callable[[], object]) -> float:
    began = process_time()
    call()
    return process_time() - began


def times(vocab: int, rows: int, params: SamplingParams) -> dict[str, Any]:
    """CPU milliseconds for a batch of `rows` slots, in turn, and the median of their ratios."""
    scores = 3 * torch.randn(rows, 1, vocab, generator=torch.Generator().manual_seed(0))
    settings = settings_of([params] * rows, vocab)
    ways = [
        lambda: filtered(scores, settings, settings.features),
        lambda: keep.keep_on_cpu(scores, settings, settings.features),
    ]
    pairs = [[seconds(way) for way in ways] for _ in range(ROUNDS + 1)][1:]
    old, new = (1e3 * min(each) for each in zip(*pairs, strict=True))
    what = {"vocabulary": vocab, "slots": rows, "top_p": params.top_p, "top_k": params.top_k}
    ratio = median(new / old for old, new in pairs)
    return what | {"min_p": params.min_p, "sort": old, "candidates": new, "ratio": ratio}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--jobs", type=int, default=4)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logits = 3 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(1))
    filters = [SamplingParams(top_p=0.9), SamplingParams(top_k=50), SamplingParams(min_p=0.05)]
    report = {
        "environment": environment(),
        "command": f"python -m benchmarks.law --rows {options.rows}",
        "times": [
            times(vocab, rows, params) for vocab in SIZES for rows in (1, 8) for params in filters
        ],
        "work": {str(p): work(logits, SamplingParams(top_p=p)) for p in (0.5, 0.9, 0.99)},
        "same": shared(options.rows, options.jobs),
    }
    text = json.dumps(report, indent=1)
    print(text) if options.out is None else options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()

"""`idlm distill` against transformers' `generate`: tokens of finished responses a second.

    python -m benchmarks.distill_speed MODEL gsm8k/test.jsonl [--prompts 128] [--threads 1]
        [--max-tokens 256] [--batch 32] [--rounds 3] [--out FILE]

Both write responses to the same chat prompts, sampled at temperature 1, with the same number of
threads, float32 weights and the same limit; they take turns. transformers runs static batches of
`--batch`, padded on the left, in the order of the prompts: a batch runs until its longest response
ends. A response counts if it has an end, as only those are for training.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from idlm import SamplingParams, load
from idlm.config import EngineConfig
from idlm.engine.build import build_engine
from idlm.environment import environment
from idlm.models.idlm_model import Idlm
from idlm.training.distill import Recipe, distill
from idlm.training.prompts import Encoding, Prompts
from idlm.training.shards import shards
from idlm.training.tables import Tables

Figures = dict[str, float]


def by_engine(idlm: Idlm, prompts: Prompts, options: argparse.Namespace) -> Figures:
    """A run of `distill` into a new folder; an engine is built for it, as the command does."""
    params = SamplingParams(max_tokens=options.max_tokens, temperature=1.0)
    recipe = Recipe(params, seed=1, keep_repetitive=True, shard_rows=10**6)
    config = EngineConfig(stride=1, max_num_seqs=options.slots, threads=options.threads)
    with TemporaryDirectory() as folder:
        report = distill(prompts, recipe, Path(folder), lambda: build_engine(idlm, config))
        rows = [json.loads(line) for file in shards(Path(folder)) for line in file.open()]
    finished = sum(len(row["response"]) for row in rows)
    return figures(finished, len(rows), report["tokens"], report["seconds"])


def by_generate(model: Any, prompts: list[list[int]], options: argparse.Namespace) -> Figures:
    """Static batches; tokens after the end of a response are padding."""
    ends = model.generation_config.eos_token_id
    ends = torch.tensor(ends if isinstance(ends, list) else [ends])
    began, finished, rows, tokens = perf_counter(), 0, 0, 0
    for start in range(0, len(prompts), options.batch):
        batch = prompts[start : start + options.batch]
        longest = max(map(len, batch))
        ids = torch.tensor([[0] * (longest - len(ids)) + ids for ids in batch])
        seen = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in batch])
        output = model.generate(
            input_ids=ids,
            attention_mask=seen,
            max_new_tokens=options.max_tokens,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            pad_token_id=int(ends[0]),
        )[:, longest:]
        for row in output:
            at = torch.isin(row, ends).nonzero()
            length = int(at[0]) + 1 if len(at) else len(row)
            tokens += length
            finished += length if len(at) else 0
            rows += bool(len(at))
    return figures(finished, rows, tokens, perf_counter() - began)


def figures(finished: int, rows: int, tokens: int, seconds: float) -> Figures:
    return {
        "finished_tokens": finished,
        "finished_rows": rows,
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "finished_tokens_per_second": round(finished / seconds, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("questions", type=Path, help='a .jsonl file with a "question" in each row')
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32, help="of transformers")
    parser.add_argument("--slots", type=int, default=EngineConfig.max_num_seqs, help="of idlm")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    idlm = load(options.model, dtype="float32")
    encoding = Encoding(idlm, chat=True, column="question")
    prompts = Prompts(Tables((str(options.questions),)).rows, encoding, options.prompts)
    ids = [prompt.ids for prompt in prompts]
    stock = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    engines: dict[str, Callable[[], Figures]] = {
        "idlm distill": lambda: by_engine(idlm, prompts, options),
        "transformers static": lambda: by_generate(stock, ids, options),
    }
    rounds = []
    for number in range(options.rounds):
        order = list(engines) if number % 2 == 0 else list(reversed(engines))
        rounds.append({name: engines[name]() for name in order})
        print(json.dumps(rounds[-1]), file=sys.stderr, flush=True)
    speed = "finished_tokens_per_second"
    if not all(one[speed] for r in rounds for one in r.values()):
        sys.exit("no response ended in a round; raise --max-tokens or --prompts")
    ratios = [r["idlm distill"][speed] / r["transformers static"][speed] for r in rounds]
    shown = {"median": median(ratios), "min": min(ratios), "max": max(ratios)}
    settings = {name: value for name, value in vars(options).items() if isinstance(value, int)}
    report = {"environment": environment(), "settings": settings, "rounds": rounds, "ratio": shown}
    text = json.dumps(report, indent=1)
    print(text) if options.out is None else options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()

"""Same bytes on a model that was not trained to draft: this benchmark writes its drafts.

    python -m benchmarks.drafted_bytes --prompts FILE.jsonl [--model M] [--weights int8]
                                       [--stride 4]

AR decodes every prompt first. Then each plan decodes it with drafts that are AR's own next tokens,
each right with probability `--right`, else a random token. Verification is unchanged. A prompt is
equal if every plan gives AR's tokens. Prints a table and writes
benchmarks/results/drafted_bytes_<weights>.json; exit status 1 if a prompt differs.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch

from benchmarks.real_model import MODEL
from idlm import LLM, SamplingParams
from idlm.cli import prompts
from idlm.decoding.plan import Plan, candidates
from idlm.environment import environment
from idlm.models.idlm_model import Idlm
from idlm.models.loading import load

RESULTS = Path(__file__).parent / "results"


def engine(idlm: Idlm, plan: Plan, options: argparse.Namespace) -> LLM:
    """An engine with one plan; its steps are recorded first, so that all steps run the same
    operators."""
    settings = {"max_num_seqs": options.batch, "kv_memory": "512MiB", "weights": options.weights}
    llm = LLM(idlm, stride=plan.stride, branches=plan.branches, threads=options.threads, **settings)
    llm.engine.warm_up(60)
    return llm


def decode(
    llm: LLM,
    ids: Sequence[list[int]],
    options: argparse.Namespace,
    known: Sequence[list[int]] = (),
) -> tuple[list[list[int]], float]:
    """Greedy tokens of each prompt, and tokens per forward; `known` are outputs to draft from."""
    params = SamplingParams(temperature=0, max_tokens=options.tokens)
    running, order, waiting = llm.engine, {}, iter(range(len(ids)))
    done: dict[int, list[int]] = {}
    forwards, rng = 0, random.Random(0)
    while len(done) < len(ids):
        for index in islice(waiting, options.batch - len(order) + len(done)):
            order[running.add(ids[index], params, seed=0)] = index
        for update in running.step():
            if update.result is not None:
                done[order[update.request_id]] = list(update.result.token_ids)
                forwards += update.result.forwards
        if known:
            draft(
                llm,
                {name: known[index] for name, index in order.items() if index not in done},
                options.right,
                rng,
            )
    outputs = [done[index] for index in range(len(ids))]
    return outputs, sum(map(len, outputs)) / forwards


def draft(llm: LLM, known: dict[str, list[int]], right: float, rng: random.Random) -> None:
    """Overwrite the drafts of the next windows, in the slots where the last step has put its
    own."""
    running, state = llm.engine, llm.engine.runner.slots.state
    depth, last = running.runner.depth, llm.idlm.mask_id - 1
    for request in running.scheduler.decoding:
        done = len(request.result.token_ids)
        tokens = (known[request.id][done : done + depth] + [0] * depth)[:depth]
        row = [token if rng.random() < right else rng.randrange(last) for token in tokens]
        state.drafts[request.slot, :depth] = torch.tensor(row)


def main() -> int:
    """Exit status 1 if a prompt differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument(
        "--prompts", type=Path, required=True, help=".jsonl with 'prompt' or 'messages'"
    )
    parser.add_argument("--weights", default="int8", choices=("float32", "bfloat16", "int8"))
    parser.add_argument("--stride", type=int, default=4)
    parser.add_argument("--right", type=float, default=0.8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument(
        "--longest", type=int, default=200, help="prompts are cut to so many tokens"
    )
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    idlm = load(options.model, dtype="float32")
    # it has no MASK token; any id will do, since the drafts of MASK rows are not used
    idlm = replace(idlm, mask_id=idlm.vocab_size - 1)
    ids = [
        prompt.encode(idlm, chat=True)[-options.longest :]
        for prompt in prompts.read(options.prompts)
    ]
    ar, *plans = candidates(options.stride)
    expected, _ = decode(engine(idlm, ar, options), ids, options)
    equal, rows = [True] * len(ids), {}
    for plan in plans:
        outputs, tpf = decode(engine(idlm, plan, options), ids, options, expected)
        same = [output == of_ar for output, of_ar in zip(outputs, expected, strict=True)]
        equal = [a and b for a, b in zip(equal, same, strict=True)]
        rows[plan.name] = {"equal": sum(same), "tpf": tpf}
        print(
            f"{plan.name}: {sum(same)} of {len(ids)} prompts have AR's tokens, TPF {tpf:.2f}",
            flush=True,
        )
    tokens = sum(map(len, expected))
    print(
        f"{options.weights}: {sum(equal)} of {len(ids)} equal in every plan, {tokens} tokens each"
    )
    settings = {
        key: str(value) for key, value in vars(options).items() if key not in ("model", "prompts")
    }
    report = {"plans": rows, "prompts": len(ids), "equal": sum(equal), "ar_tokens": tokens}
    out = RESULTS / f"drafted_bytes_{options.weights}.json"
    out.write_text(json.dumps(report | {"environment": environment() | settings}, indent=1) + "\n")
    return int(sum(equal) < len(ids))


if __name__ == "__main__":
    raise SystemExit(main())

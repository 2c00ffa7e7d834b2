"""Same bytes: ISD against AR over prompts, settings and plans, token by token.

    python -m benchmarks.same_bytes MODEL ... [--dtype float64] [--prompts 4] [--max-tokens 40]
                                    [--builds avx512_vnni avx2 x86_64 0] [--out FILE]

With --builds each model runs once for each of these values of `IDLM_NATIVE`, in a process of its
own. A pair is one prompt under one setting. It is equal if every plan gives AR's tokens. The
lengths of the prompts run from one token to the context less one. If a pair differs (in float32),
the first difference is reported with AR's margin: its token's log p + noise less the best other
one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from idlm import LLM, Idlm, SamplingParams, load
from idlm.environment import environment
from idlm.evaluation.parity import first_difference, margin, token_scores
from idlm.models.heads import KINDS, HeadSpec
from tests.engine.tiny import CLASSES, SLIDING, sliding_idlm, tiny_idlm
from tests.heads import random_head

PLANS = [
    (n, branches) for n in (1, 2, 3, 4, 8) for branches in (("all", "chain") if n > 1 else ("all",))
]
PENALTIES = {"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.2}
FILTERS = {"top_k": 12, "top_p": 0.9, "min_p": 0.02}
SETTINGS = [
    {"temperature": 0.0},
    {"temperature": 0.0, **PENALTIES},
    {"temperature": 0.0, "logit_bias": {5: 1.5}, "banned_tokens": (7,)},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 12},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.5, "min_p": 0.05},
    {"temperature": 0.9, "repetition_penalty": 1.3},
    {"temperature": 0.9, "presence_penalty": 0.5},
    {"temperature": 0.9, "frequency_penalty": 0.5},
    {"temperature": 1.2, **FILTERS, **PENALTIES, "logit_bias": {5: 1.5}, "banned_tokens": (7,)},
]


def prompts_for(idlm: Idlm, count: int) -> list[list[int]]:
    """`count` prompts with lengths from 1 to the context less one; real text if the model has
    any."""
    text = list(itertools.islice(itertools.cycle(real_tokens(idlm)), idlm.context))
    lengths = torch.linspace(1, idlm.context - 1, count).round().int().tolist()
    return [text[:length] for length in lengths]


def real_tokens(idlm: Idlm) -> list[int]:
    """Tokens that the model knows: its own problem, or the text that it writes after its first
    token."""
    if idlm.name.startswith("nano") and idlm.tokenizer is not None:
        from idlm.nano.problems import held_out_problems

        template = idlm.tokenizer.apply_chat_template
        question = [{"role": "user", "content": held_out_problems(1)[0].question}]
        return list(
            idlm.tokenizer(template(question, tokenize=False, add_generation_prompt=True)).input_ids
        )
    start = idlm.model.config.bos_token_id
    params = SamplingParams(max_tokens=idlm.context - 1, seed=0, ignore_eos=True)
    result = LLM(idlm, stride=1).generate([[1 if start is None else start]], params)[0]
    return result.prompt_token_ids + result.token_ids


def named(name: str, dtype: str) -> Idlm:
    """A checkpoint, `FOLDER+ADAPTER` with an adapter, or a new random model such as `random-
    qwen3`, `sliding-gemma2-5` with the sliding window 5, `chained-mlp-qwen3` with a random draft
    head, or `late-mlp-qwen3` whose MASK rows skip the first layer too."""
    family = name.removeprefix("random-")
    if family in CLASSES and family != name:
        return tiny_idlm(family)
    kind, _, family = name.partition("-")
    head, _, of = family.partition("-")
    if kind in ("chained", "late") and head in KINDS and of in CLASSES:
        idlm = tiny_idlm(of, entry=int(kind == "late"))
        idlm.draft_heads[0] = random_head(idlm.model, HeadSpec(head, 6, 7))
        return idlm
    family, _, window = family.rpartition("-")
    if kind == "sliding" and family in SLIDING:
        return sliding_idlm(family, int(window))
    folder, _, adapter = name.partition("+")
    return load(folder, adapter=adapter or None, dtype=dtype)


def sweep(idlm: Idlm, count: int, max_tokens: int) -> dict[str, object]:
    """Count the pairs of one model over `count` prompts."""
    # one request runs at a time; the caches of all engines for more would take gigabytes
    llms = {plan: LLM(idlm, stride=plan[0], branches=plan[1], max_num_seqs=1) for plan in PLANS}
    pairs = equal = tokens = 0
    differences = []
    for prompt, (index, setting) in itertools.product(
        prompts_for(idlm, count), enumerate(SETTINGS)
    ):
        params = SamplingParams(max_tokens=max_tokens, seed=index, ignore_eos=True, **setting)  # type: ignore[arg-type]
        outputs = {plan: llm.generate([prompt], params)[0].token_ids for plan, llm in llms.items()}
        expected = outputs[1, "all"]
        wrong = [plan for plan, output in outputs.items() if output != expected]
        pairs, equal, tokens = pairs + 1, equal + (not wrong), tokens + len(expected)
        if wrong:
            at = first_difference(expected, outputs[wrong[0]]) or 0
            scores = token_scores(idlm, prompt, expected[:at], params)
            differences.append(
                {
                    "setting": index,
                    "plan": wrong[0],
                    "position": at,
                    "margin": margin(scores, expected[at]),
                }
            )
    return {
        "pairs": pairs,
        "equal": equal,
        "plans": len(PLANS),
        "ar_tokens": tokens,
        "differences": differences,
    }


def rows_of_build(build: str, args: argparse.Namespace) -> dict[str, dict[str, object]]:
    """The rows of another process, whose C kernels are those of `build`."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        options = f"--dtype={args.dtype} --prompts={args.prompts} --max-tokens={args.max_tokens}"
        command = ["-m", "benchmarks.same_bytes", *args.models, *options.split(), f"--out={out}"]
        environment = os.environ | {"IDLM_NATIVE": build}
        done = subprocess.run(
            [sys.executable, *command], env=environment, stdout=subprocess.DEVNULL
        )
        if not out.exists():
            raise SystemExit(f"{build}: the process ended with status {done.returncode}")
        rows: dict[str, dict[str, object]] = json.loads(out.read_text())["models"]
    return {f"{name}, {build}": row for name, row in rows.items()}


def rows_here(args: argparse.Namespace) -> dict[str, dict[str, object]]:
    """A row for each model, by this process."""
    rows = {}
    for name in args.models:
        started = time.perf_counter()
        row = sweep(named(name, args.dtype), args.prompts, args.max_tokens)
        rows[name.rpartition("/")[2]] = row
        print(f"{name}: {row} in {time.perf_counter() - started:.0f} s", file=sys.stderr)
    return rows


def main() -> int:
    """Exit status 1 if a float64 pair differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "models",
        nargs="+",
        help="folder, FOLDER+ADAPTER, bundled name, random-FAMILY, sliding-FAMILY-WINDOW, "
        "chained-HEAD-FAMILY",
    )
    parser.add_argument("--dtype", default="float64")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=40)
    parser.add_argument("--builds", nargs="+", metavar="IDLM_NATIVE", default=[])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    report: dict[str, object] = {"dtype": args.dtype, "environment": environment()}
    rows: dict[str, dict[str, object]] = {}
    for build in args.builds:
        rows |= rows_of_build(build, args)
    if not args.builds:
        rows = rows_here(args)
    report["models"] = rows
    report["pairs"], report["equal"] = (
        sum(int(str(row[key])) for row in rows.values()) for key in ("pairs", "equal")
    )
    text = json.dumps(report, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")
    return int(args.dtype == "float64" and report["pairs"] != report["equal"])


if __name__ == "__main__":
    raise SystemExit(main())

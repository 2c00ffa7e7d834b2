"""SmolLM2-135M-Instruct on idlm, llama.cpp, vLLM (CPU) and transformers, in turn: `make
real-model`.

    python -m benchmarks.real_model [--threads 1 2] [--concurrency 1 8]
                                    [--precisions float32 bfloat16 int8]
                                    [--peers llamacpp vllm transformers] [--repeats 5] ...

All engines get the same chat prompts and give 64 greedy tokens for each. Our float32 is compared
with llama.cpp's F32, vLLM and transformers, our bfloat16 with llama.cpp's F16 and BF16, our int8
with its Q8_0; all weights come from one file. In every round each engine runs once, so that
disturbances of the machine affect all alike; ratios are of the same round. The first round warms
up. The model was not trained to draft: modes other than "ar" run with SIMULATED acceptance, and
their tokens mean nothing. The cost of a step by its rows is measured at each precision too.

`make models` and `make peers` install what this needs; missing peers are left out. Prints a table
and writes benchmarks/results/real_model.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median

import torch

from benchmarks.chat_prompts import draw
from benchmarks.cost_curve import step_costs
from benchmarks.peers.process import Peer
from idlm import LLM
from idlm.cli.bench import MODES
from idlm.cli.common import keep_what_is_loaded
from idlm.decoding.plan import AR, Plan
from idlm.environment import environment
from idlm.evaluation.closed_loop import BenchEngine, Ours, Run
from idlm.evaluation.simulation import simulate_acceptance
from idlm.models.idlm_model import Idlm
from idlm.models.loading import load

ROOT = Path(__file__).parent
BUILD = ROOT.parent / "build"
MODEL = BUILD / "models" / "SmolLM2-135M-Instruct"
GGUF = BUILD / "models" / "SmolLM2-135M-Instruct-Q4_1.gguf"
RESULTS = ROOT / "results" / "real_model.json"
LLAMACPP, VLLM = BUILD / "llamacpp" / "bin", BUILD / "vllm" / "bin"
NEEDED = {
    "llamacpp": LLAMACPP / "llama-server",
    "llamacpp-wheel": LLAMACPP / "python",
    "vllm": VLLM / "python",
    "transformers": Path(sys.executable),
}
"""The file that each peer needs to start."""

PLANS = (AR, Plan(2, "all"), Plan(4, "chain"), Plan(4, "all"))
"""Windows of 1, 4, 7 and 16 rows."""
KV_MEMORY = "256MiB"


PRECISIONS = {"float32": ("F32",), "bfloat16": ("F16", "BF16"), "int8": ("Q8_0",)}
"""The weights of our linear layers (activations are float32), and llama.cpp's names for them."""


@dataclass(frozen=True)
class Entry:
    """An engine and the precision at which it is compared."""

    precision: str
    engine: BenchEngine

    @property
    def is_ar(self) -> bool:
        """Whether the other engines of its precision are compared with it."""
        return (self.engine.engine, self.engine.mode) == ("idlm", "ar")


def loaded(folder: Path) -> Idlm:
    """The model with its last token as MASK: it has none, and simulated drafts need one."""
    idlm = load(folder, dtype="float32")
    return replace(idlm, mask_id=idlm.vocab_size - 1)


def ours(idlm: Idlm, threads: int, options: argparse.Namespace) -> Iterator[Entry]:
    """Our engine at each precision and in each mode."""
    for name in options.precisions:
        for mode in options.modes:
            stride, branches = (1, "all") if mode == "ar" else (options.stride, mode)
            simulated = None if mode == "ar" else options.simulate_acceptance
            llm = LLM(
                idlm,
                stride=stride,
                branches=branches,
                max_num_seqs=max(options.concurrency),
                kv_memory=KV_MEMORY,
                weights=name,
                threads=threads,
            )
            if simulated is not None:
                simulate_acceptance(llm.engine, simulated)
            llm.engine.warm_up(60)
            yield Entry(name, Ours(llm, mode, simulated is not None))


def peers(
    options: argparse.Namespace, precisions: Sequence[str], threads: int, stack: ExitStack
) -> Iterator[Entry]:
    """The other engines, loaded; their processes end with `stack`."""
    slots = max(options.concurrency)

    def start(
        precision: str, python: Path, script: str, model: Path, mode: str | None = None
    ) -> Entry:
        peer = Peer(python, script, model, threads, mode, slots)
        stack.callback(peer.close)
        return Entry(precision, peer)

    for name in with_environment(options.peers):
        if name.startswith("llamacpp"):
            mode = "wheel" if name == "llamacpp-wheel" else "native"
            for precision, file in gguf_files(options.gguf, precisions):
                yield start(precision, LLAMACPP / "python", "llamacpp.py", file, mode)
        elif "float32" in precisions:
            script, mode = (
                ("vllm_cpu.py", "compiled")
                if name == "vllm"
                else ("transformers_generate.py", None)
            )
            python = VLLM / "python" if name == "vllm" else Path(sys.executable)
            yield start("float32", python, script, options.model, mode)


def with_environment(names: Sequence[str]) -> list[str]:
    """The peers that can be started; the missing ones are named on stderr."""
    missing = [name for name in names if not NEEDED[name].exists()]
    for name in missing:
        print(f"no {NEEDED[name]}: {name} left out; `make peers` builds it", file=sys.stderr)
    return [name for name in names if name not in missing]


def gguf_files(source: Path, precisions: Sequence[str]) -> list[tuple[str, Path]]:
    """The model's file in each format that a precision is compared with; missing ones are
    written."""
    from benchmarks.gguf_weights import ensure  # needs the package gguf

    pairs = [(precision, kind) for precision in precisions for kind in PRECISIONS[precision]]
    files = ensure(source, [kind for _, kind in pairs], source.parent)
    return [(precision, files[kind]) for precision, kind in pairs]


def rounds(
    entries: Sequence[Entry], llm: LLM, concurrency: int, options: argparse.Namespace
) -> list[list[Run]]:
    """The runs of each entry, without the warm-up; every round has new prompts."""
    runs: list[list[Run]] = [[] for _ in entries]
    for seed in range(options.repeats + 1):
        requests = draw(llm, max(options.requests, 2 * concurrency), seed, options.tokens)
        for entry, laps in zip(entries, runs, strict=True):
            laps.append(entry.engine.run(requests, concurrency))
    return [laps[1:] for laps in runs]


def decoding_rate(run: Run, concurrency: int) -> float:
    """Tokens per second of all requests in flight, from each one's first token to its last."""
    return concurrency / fmean(request.tpot for request in run.served)


def equal_share(ours: Sequence[Run], theirs: Sequence[Run], eos: frozenset[int]) -> float:
    """The share of our tokens before the first difference.

    Our first end token and what follows are not counted: llama.cpp cannot give that token.
    """
    same = total = 0
    for run, other in zip(ours, theirs, strict=True):
        for mine, its in zip(run.served, other.served, strict=True):
            text = until(mine.token_ids, eos)
            pairs = list(zip(text, its.token_ids, strict=False))
            same += next((at for at, (a, b) in enumerate(pairs) if a != b), len(pairs))
            total += len(text)
    return same / total


def until(tokens: Sequence[int], eos: frozenset[int]) -> Sequence[int]:
    """The tokens before the first end token."""
    return tokens[: next((at for at, token in enumerate(tokens) if token in eos), len(tokens))]


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def row(
    entry: Entry, runs: Sequence[Run], ar: Sequence[Run], concurrency: int, eos: frozenset[int]
) -> dict[str, object]:
    """The figures of one engine; `over_our_ar` are ratios to our AR of the same precision and
    round.

    `peak_memory_mb` is that of the process; all of our engines run in one.
    """
    engine = entry.engine
    decoding = [decoding_rate(run, concurrency) for run in runs]
    base = [decoding_rate(run, concurrency) for run in ar]
    served = [request for run in runs for request in run.served]
    return {
        "precision": entry.precision,
        "engine": engine.engine,
        "mode": engine.mode,
        "simulated": engine.simulated,
        "concurrency": concurrency,
        "tokens_per_second": spread([run.tokens_per_second for run in runs]),
        "decode_tokens_per_second": spread(decoding),
        "tokens_per_cpu_second": spread([run.tokens / run.cpu_seconds for run in runs]),
        "over_our_ar": spread(
            [a.tokens_per_second / b.tokens_per_second for a, b in zip(runs, ar, strict=True)]
        ),
        "decode_over_our_ar": spread([a / b for a, b in zip(decoding, base, strict=True)]),
        "equal_tokens": None if engine.simulated else equal_share(ar, runs, eos),
        "ttft_ms": 1e3 * median(request.ttft for request in served),
        "tpot_ms": 1e3 * median(request.tpot for request in served),
        "peak_memory_mb": max(run.peak_memory_mb for run in runs),
        "requests": len(served),
        "tokens": sum(run.tokens for run in runs),
    }


def compare(
    entries: Sequence[Entry], concurrency: int, options: argparse.Namespace
) -> list[dict[str, object]]:
    """A row for each engine, over all rounds at one concurrency."""
    first = next(entry.engine for entry in entries if entry.is_ar)
    runs = rounds(entries, first.llm, concurrency, options)
    ar = {entry.precision: laps for entry, laps in zip(entries, runs, strict=True) if entry.is_ar}
    eos = first.llm.idlm.eos_ids
    return [
        row(entry, laps, ar[entry.precision], concurrency, eos)
        for entry, laps in zip(entries, runs, strict=True)
    ]


def costs(idlm: Idlm, threads: int, options: argparse.Namespace) -> list[dict[str, object]]:
    """The cost of a step of several rows over that of one row, by precision and batch size."""
    measured = []
    slots = max(options.concurrency)
    for name in options.precisions:
        llm = LLM(
            idlm,
            stride=4,
            branches="all",
            max_num_seqs=slots,
            kv_memory=KV_MEMORY,
            weights=name,
            threads=threads,
        )
        for batch in options.concurrency:
            seconds = step_costs(llm, batch, options.cost_repeats, PLANS)
            over = {
                str(plan.width): {"plan": plan.name, "over_ar": cost / seconds[AR]}
                for plan, cost in seconds.items()
            }
            measured.append(
                {"precision": name, "batch": batch, "ar_step_ms": 1e3 * seconds[AR], "rows": over}
            )
    return measured


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=MODEL, help="a folder in Hugging Face form")
    parser.add_argument("--gguf", type=Path, default=GGUF, help="the same model's GGUF file")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8])
    parser.add_argument(
        "--precisions", nargs="+", choices=tuple(PRECISIONS), default=list(PRECISIONS)
    )
    parser.add_argument(
        "--modes",
        nargs="+",
        choices=MODES,
        default=["ar"],
        help="of our engine; ar is always among them",
    )
    parser.add_argument("--stride", type=int, default=4)
    parser.add_argument(
        "--simulate-acceptance", type=float, nargs="+", default=[0.9], help="by depth"
    )
    parser.add_argument(
        "--peers", nargs="*", choices=tuple(NEEDED), default=["llamacpp", "vllm", "transformers"]
    )
    parser.add_argument(
        "--requests", type=int, default=4, help="a round; at least twice those in flight"
    )
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cost-repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.modes = list(dict.fromkeys(["ar", *options.modes]))
    return options


def show(
    threads: int, rows: Sequence[dict[str, object]], steps: Sequence[dict[str, object]]
) -> None:
    """Print the tables for one number of threads."""
    print(
        f"threads {threads}: tokens/s whole and decoding, median (min-max); "
        "ours/x: our AR over it, by round"
    )
    for row in rows:
        name = f"{row['precision']} {row['engine']} {row['mode']}"
        name += " (simulated)" if row["simulated"] else ""
        whole, decoding = (
            bounds(row[key]) for key in ("tokens_per_second", "decode_tokens_per_second")
        )
        faster = 1 / row["over_our_ar"]["median"]
        equal = "-" if row["equal_tokens"] is None else f"{row['equal_tokens']:.3f}"
        head = f"{row['concurrency']:3d}  {name:36} {whole:>20} {decoding:>20}"
        print(f"{head}  ours/x {faster:5.2f}  equal tokens {equal}")
    for step in steps:
        over = ", ".join(f"{rows}: {entry['over_ar']:.2f}" for rows, entry in step["rows"].items())
        print(
            f"steps of {step['precision']}, batch {step['batch']}: "
            f"AR {step['ar_step_ms']:.2f} ms; rows {over}"
        )


def bounds(figures: dict[str, float]) -> str:
    """A median with its range, as text."""
    return "{median:.1f} ({min:.1f}-{max:.1f})".format(**figures)


def main() -> None:
    """The file is written after each number of threads."""
    options = arguments()
    idlm = loaded(options.model)
    report: dict[str, object] = {"rows": [], "steps": [], "versions": {}}
    report["settings"] = {
        key: value for key, value in vars(options).items() if not isinstance(value, Path)
    }
    # each row has its own number of threads
    report["environment"] = {k: value for k, value in environment().items() if k != "threads"}
    for threads in options.threads:
        torch.set_num_threads(threads)
        with ExitStack() as stack:
            entries = [
                *ours(idlm, threads, options),
                *peers(options, options.precisions, threads, stack),
            ]
            keep_what_is_loaded()
            rows = [row for each in options.concurrency for row in compare(entries, each, options)]
        steps = costs(idlm, threads, options)
        show(threads, rows, steps)
        report["rows"] += [{"threads": threads} | row for row in rows]
        report["steps"] += [{"threads": threads} | step for step in steps]
        others = [entry.engine for entry in entries if isinstance(entry.engine, Peer)]
        report["versions"] |= {f"{peer.engine} {peer.mode}": peer.versions for peer in others}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""AR, chain, all outcomes, planner, transformers and vLLM under load, in turn: `make bench`.

    python -m benchmarks.serving [--model nano] [--stride 4] [--concurrency 1 8 32]
                                 [--peers transformers vllm] ...

All engines get the same greedy requests with the same output lengths, and the same weights. If the
model has an adapter, the peers get the base, whose tokens are the same. vLLM needs the environment
of `make vllm`. Prints a table and writes benchmarks/results/serving.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from pathlib import Path

import torch

from benchmarks.peers.process import Peer
from idlm.cli.bench import MODES, show
from idlm.cli.common import keep_what_is_loaded
from idlm.environment import environment
from idlm.evaluation.closed_loop import BenchEngine, bench_engines
from idlm.evaluation.serving_bench import bench
from idlm.evaluation.workload import workload
from idlm.models.loading import load
from idlm.models.sources import resolve

ROOT = Path(__file__).parent
VLLM = ROOT.parent / "build" / "vllm" / "bin" / "python"
RESULTS = ROOT / "results" / "serving.json"


def peers(names: list[str], vllm: Path, model: Path, threads: int, stack: ExitStack) -> list[Peer]:
    """The other engines, loaded; their processes end with `stack`."""
    started: list[Peer] = []
    if "transformers" in names:
        started.append(Peer(sys.executable, "transformers_generate.py", model, threads))
    if "vllm" in names and vllm.exists():
        started += [
            Peer(vllm, "vllm_cpu.py", model, threads, mode) for mode in ("eager", "compiled")
        ]
    elif "vllm" in names:
        print(f"no vLLM at {vllm}: left out; `make vllm` builds it", file=sys.stderr)
    for peer in started:
        stack.callback(peer.close)
    return started


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="nano")
    parser.add_argument("--adapter")
    parser.add_argument("--modes", nargs="*", choices=MODES, default=list(MODES))
    parser.add_argument(
        "--peers", nargs="*", choices=("transformers", "vllm"), default=["transformers", "vllm"]
    )
    parser.add_argument("--stride", type=int, default=4)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--vllm", type=Path, default=VLLM, help="the Python of vLLM's environment")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    with ExitStack() as stack:
        others = peers(
            options.peers, options.vllm, resolve(options.model)[0], options.threads, stack
        )
        idlm = load(options.model, adapter=options.adapter)
        ours = bench_engines(idlm, options.modes, options.stride, max(options.concurrency))
        keep_what_is_loaded()
        engines: list[BenchEngine] = [*ours, *others]
        rows = bench(
            engines, workload(idlm), options.concurrency, options.requests, options.repeats
        )
    settings = {key: value for key, value in vars(options).items() if key not in ("vllm", "output")}
    settings |= {
        "dtype": str(idlm.dtype).removeprefix("torch."),
        "device": str(idlm.device),
        "simulated_acceptance": None,
    }
    versions = {f"{peer.engine} {peer.mode}": peer.versions for peer in others}
    report = {"rows": rows, "environment": environment() | settings | {"peers": versions}}
    show(report)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Matrix products of few rows: every candidate, the machine's own peaks, and what an engine chooses.

    python -m benchmarks.kernels [--models nano SmolLM2 0.6B] [--rows 1 2 4 8 16 32 64] [--rounds 7]

The shapes are those of the models' linear layers, as many of each as a model has, used in turn as a
step does, so that what does not fit a cache comes from memory. One thread. Candidates take turns;
the least of the rounds counts. `IDLM_NATIVE` forces an instruction set; the peaks are measured with
the same one: multiply-adds between registers, and memory read and copied (benchmarks/peak.c).
Table on stdout, everything in benchmarks/results/kernels_<instruction set>.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor

from idlm.evaluation.environment import environment
from idlm.kernels import compiling, native
from idlm.kernels.choice import choose_linears
from idlm.kernels.linears import ALWAYS, Layer, Linears
from idlm.kernels.panels import FORMATS

ROOT = Path(__file__).parent
PEAK = ROOT / "peak.c"
Shape = tuple[int, int, int]
MODELS: dict[str, tuple[Shape, ...]] = {
    "nano": ((192, 192, 12), (192, 64, 12), (192, 512, 12), (512, 192, 6), (192, 640, 1)),
    "SmolLM2": ((576, 576, 60), (576, 192, 60), (576, 1536, 60), (1536, 576, 30), (576, 49152, 1)),
    "0.6B": (
        (1024, 2048, 28),
        (1024, 1024, 56),
        (2048, 1024, 28),
        (1024, 3072, 56),
        (3072, 1024, 28),
        (1024, 151936, 1),
    ),
}
"""Inputs, outputs and number of each shape of linear layer."""
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


def peaks() -> dict[str, float]:
    """GFLOP/s, and GB/s read and copied, of one core with the instruction set in use."""
    target = native.instruction_set()
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "peak"
        flags = ("-std=gnu11", "-O3", "-ffast-math", *target.flags, f"-I{compiling.SOURCES}")
        subprocess.run([compiling.compiler(), *flags, str(PEAK), "-o", str(made)], check=True)
        found = subprocess.run([str(made)], check=True, capture_output=True, text=True).stdout
    return dict(zip(("gflops", "read_gbps", "copy_gbps"), map(float, found.split()), strict=True))


def packed(weight: Tensor, rows: int) -> Callable[[Tensor], Tensor]:
    """oneDNN's product by a weight that it has laid out for so many rows."""
    made = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, made, None, "none", [], "")


def best(calls: dict[str, Callable[[], object]], number: int, rounds: int) -> dict[str, float]:
    """Seconds of one product, by candidate: each is called `number` times in a row, for the layers in turn."""
    found = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            started = perf_counter()
            for _ in range(number):
                call()
            found[name] = min(found[name], (perf_counter() - started) / number)
    return found


def candidates(
    weights: Sequence[Tensor], formats: dict[str, Linears], x: Tensor, limit: int
) -> dict[str, Callable[[], object]]:
    """Each as a call that multiplies `x` by the next layer's weight; "chosen" is what an engine runs."""

    def ours(turn: cycle[Layer], choice: int | None) -> Tensor:
        layer = next(turn)
        return Layer(layer.weight, layer.panels, None, layer.choice if choice is None else choice).multiply(x, None)

    made: dict[str, Callable[[], object]] = {}
    for name, linears in formats.items():
        made[f"C {name}"] = partial(ours, cycle(linears.layers.values()), ALWAYS)
    made["chosen"] = partial(ours, cycle(formats["float32"].layers.values()), None)
    turn = cycle(weights)
    made["torch"] = lambda: F.linear(x, next(turn))
    if sum(weight.nbytes for weight in weights) < limit:
        laid_out = cycle([packed(weight, len(x)) for weight in weights])
        made["oneDNN packed"] = lambda: next(laid_out)(x)
    return made


@torch.inference_mode()
def measure(model: str, shape: Shape, options: argparse.Namespace, peak: dict[str, float]) -> list[dict[str, object]]:
    """A row for every row count and candidate."""
    inner, out, number = shape
    weights = [torch.randn(out, inner) for _ in range(number)]
    formats = {name: Linears(weights, name) for name in FORMATS}
    choose_linears(formats["float32"])
    found: list[dict[str, object]] = []
    for rows in options.rows:
        calls = candidates(weights, formats, torch.randn(rows, inner), options.packed_limit)
        seconds = best(calls, number, options.rounds)
        float32 = min(seconds[name] for name in ("C float32", "torch", "oneDNN packed") if name in seconds)
        for name, each in seconds.items():
            size = BYTES.get(name.removeprefix("C "), 4) * inner * out
            gflops, gbps = 2e-9 * rows * inner * out / each, 1e-9 * size / each
            found.append(
                {
                    "model": model, "inputs": inner, "outputs": out, "rows": rows, "candidate": name,
                    "us": 1e6 * each, "gflops": gflops, "gbps": gbps,
                    "of_arithmetic": gflops / peak["gflops"], "of_bandwidth": gbps / peak["copy_gbps"],
                    "over_best_float32": each / float32,
                }
            )  # fmt: skip
    return found


def show(rows: Sequence[dict[str, object]]) -> None:
    """A line for each shape and row count."""
    keys = list(dict.fromkeys((row["model"], row["inputs"], row["outputs"], row["rows"]) for row in rows))
    for key in keys:
        same = [row for row in rows if (row["model"], row["inputs"], row["outputs"], row["rows"]) == key]
        cells = [
            f"{row['candidate']} {row['us']:.1f} us {row['gbps']:.0f} GB/s {row['gflops']:.0f} GFLOP/s"
            f" ({row['of_bandwidth']:.2f}, {row['of_arithmetic']:.2f})"
            for row in same
        ]
        print(f"{key[0]} {key[1]}x{key[2]}, {key[3]} rows: {'; '.join(cells)}")


def main() -> None:
    """Measure, print, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--packed-limit", type=int, default=1 << 30, help="bytes of weights that oneDNN lays out")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    target = native.instruction_set()
    if target is None or not native.loaded():
        parser.error("no C kernels to measure")
    torch.manual_seed(0)
    peak = peaks()
    print(f"{target.name}: {peak}")
    rows = [row for name in options.models for shape in MODELS[name] for row in measure(name, shape, options, peak)]
    show(rows)
    settings = {"instruction_set": target.name, "rounds": options.rounds, "peak": peak}
    output = options.output or ROOT / "results" / f"kernels_{target.name}.json"
    output.write_text(json.dumps({"rows": rows, "environment": environment() | settings}, indent=1) + "\n")


if __name__ == "__main__":
    main()

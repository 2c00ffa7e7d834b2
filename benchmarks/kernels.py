"""Matrix products of few rows: every candidate, the machine's peaks, and the engine's choice.

    python -m benchmarks.kernels [--models nano SmolLM2 0.6B] [--rows 1 2 4 8 16 32 64]
                                 [--rounds 30] [--packed-limit BYTES] [--output FILE]

The shapes are those of the products in a step, as many of each as a model has, run in turn and
recorded as in a step, so that weights larger than a cache come from memory. One thread; times are
its CPU time. Candidates take turns. A few products are timed at once, and the best round of each
few counts: so other processes disturb little. `IDLM_NATIVE` forces an instruction set, also for
the peaks: multiply-adds between registers, and memory read and copied (benchmarks/peak.c). They are
measured beside each shape, since the speed of a virtual machine moves. Prints a table and the worst
figures of what an engine chooses, and writes benchmarks/results/kernels_<instruction set>.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import thread_time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from idlm.environment import environment
from idlm.kernels import compiling, native
from idlm.kernels.choice import PARAMETERS, Recorded, choose_linears, recorded
from idlm.kernels.linears import ALWAYS, Layer, Linears
from idlm.kernels.panels import FORMATS
from idlm.kernels.prefetch import choose_prefetch

ROOT = Path(__file__).parent
PEAK = ROOT / "peak.c"
Shape = tuple[int, int, int]
Product = Callable[[Tensor], Tensor]
MODELS: dict[str, tuple[Shape, ...]] = {
    "nano": ((192, 320, 6), (192, 192, 6), (192, 1024, 6), (512, 192, 6), (192, 640, 1)),
    "SmolLM2": ((576, 960, 30), (576, 576, 30), (576, 3072, 30), (1536, 576, 30), (576, 49152, 1)),
    "0.6B": (
        (1024, 4096, 28),
        (2048, 1024, 28),
        (1024, 6144, 28),
        (3072, 1024, 28),
        (1024, 151936, 1),
    ),
}
"""Inputs, outputs and count of each shape: q with k and v, o, gate with up, down, the head."""
PACKED = "oneDNN packed"
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


def peaks() -> dict[str, float]:
    """GFLOP/s, and GB/s read and copied, of one core with the instruction set in use."""
    target = native.instruction_set()
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "peak"
        flags = ("-std=gnu11", "-O3", "-ffast-math", *target.flags, f"-I{compiling.SOURCES}")
        subprocess.run([compiling.compiler(), *flags, str(PEAK), "-o", str(program)], check=True)
        output = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    return dict(zip(("gflops", "read_gbps", "copy_gbps"), map(float, output.split()), strict=True))


def packed(weight: Tensor, rows: int) -> Product:
    """oneDNN's product by a weight in its layout for `rows` rows."""
    reordered = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, reordered, None, "none", [], "")


def best(calls: dict[str, list[Recorded]], x: Tensor, rounds: int) -> dict[str, float]:
    """The seconds of each candidate for `x`: the sum over its recordings of the fewest of each."""
    seconds = {name: [float("inf")] * len(recordings) for name, recordings in calls.items()}
    for round in range(rounds):
        # back and forth: what a candidate finds in the caches depends on the one before it
        for name in list(calls)[:: (-1) ** round]:
            for index, call in enumerate(calls[name]):
                started = thread_time()
                call(x)
                seconds[name][index] = min(seconds[name][index], thread_time() - started)
    return {name: sum(each) for name, each in seconds.items()}


def candidates(
    weights: Sequence[Tensor], formats: dict[str, Linears], rows: int, limit: int
) -> dict[str, list[Recorded]]:
    """Recordings of the products of `rows` rows by all weights, by implementation; "chosen" is what
    an engine runs."""

    def ours(layer: Layer, choice: int) -> Product:
        return partial(replace(layer, choice=choice).multiply, adapter=None)

    products_by_name = {
        f"C {name}": [ours(layer, ALWAYS) for layer in linears.layers]
        for name, linears in formats.items()
    }
    products_by_name["chosen"] = [ours(layer, layer.choice) for layer in formats["float32"].layers]
    products_by_name["torch"] = [partial(F.linear, weight=weight) for weight in weights]
    if sum(weight.nbytes for weight in weights) < limit:
        products_by_name[PACKED] = [packed(weight, rows) for weight in weights]
    few, inner = max(1, PARAMETERS // weights[0].numel()), weights[0].shape[1]
    return {
        name: [
            # weights in oneDNN's layout cannot be recorded
            eager(products[at : at + few])
            if name == PACKED
            else recorded(products[at : at + few], inner)
            for at in range(0, len(products), few)
        ]
        for name, products in products_by_name.items()
    }


def eager(products: Sequence[Product]) -> Recorded:
    """Products of the same rows, one call of Python each."""
    return lambda x: [product(x) for product in products]


@torch.inference_mode()
def measure(model: str, shape: Shape, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A result for every number of rows and every candidate."""
    inner, out, count = shape
    peak = peaks()
    weights = [torch.randn(out, inner) for _ in range(count)]
    formats = {name: Linears([[weight] for weight in weights], name) for name in FORMATS}
    for linears in formats.values():
        choose_prefetch(linears)
    choose_linears(formats["float32"])
    results: list[dict[str, Any]] = []
    for rows in options.rows:
        calls = candidates(weights, formats, rows, options.packed_limit)
        whole = best(calls, torch.randn(rows, inner), options.rounds)
        seconds = {name: each / count for name, each in whole.items()}
        float32 = min(seconds[name] for name in ("C float32", "torch", PACKED) if name in seconds)
        for name, each in seconds.items():
            size = BYTES.get(name.removeprefix("C "), 4) * inner * out
            gflops, gbps = 2e-9 * rows * inner * out / each, 1e-9 * size / each
            results.append(
                {
                    "model": model,
                    "inputs": inner,
                    "outputs": out,
                    "rows": rows,
                    "candidate": name,
                    "us": 1e6 * each,
                    "gflops": gflops,
                    "gbps": gbps,
                    "of_arithmetic": gflops / peak["gflops"],
                    "of_bandwidth": gbps / peak["copy_gbps"],
                    "over_best_float32": each / float32,
                    "peak": peak,
                }
            )
    return results


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print a line for each shape and number of rows."""
    keys = list(
        dict.fromkeys((row["model"], row["inputs"], row["outputs"], row["rows"]) for row in rows)
    )
    for key in keys:
        same = [
            row for row in rows if (row["model"], row["inputs"], row["outputs"], row["rows"]) == key
        ]
        cells = [
            f"{row['candidate']} {row['us']:.1f} us {row['gbps']:.0f} GB/s "
            f"{row['gflops']:.0f} GFLOP/s ({row['of_bandwidth']:.2f}, {row['of_arithmetic']:.2f})"
            for row in same
        ]
        print(f"{key[0]} {key[1]}x{key[2]}, {key[3]} rows: {'; '.join(cells)}")


def worst(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The worst figures of what an engine chooses, with the shape of each."""
    chosen = [row for row in rows if row["candidate"] == "chosen"]
    for key, sign, least, most, what in (
        ("of_bandwidth", 1, 1, 4, "least share of the bandwidth, 1 to 4 rows"),
        ("of_arithmetic", 1, 32, 1 << 30, "least share of the arithmetic, 32 rows and more"),
        ("over_best_float32", -1, 1, 1 << 30, "most over the best candidate"),
    ):
        within = [row for row in chosen if least <= row["rows"] <= most]
        if within:
            row = min(within, key=lambda row: sign * row[key])
            where = f"{row['model']} {row['inputs']}x{row['outputs']}, {row['rows']} rows"
            yield f"{what}: {row[key]:.2f} ({where})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument(
        "--packed-limit", type=int, default=1 << 30, help="bytes of weights that oneDNN lays out"
    )
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    target = native.instruction_set()
    if target is None or not native.loaded():
        parser.error("no C kernels to measure")
    torch.manual_seed(0)
    rows = [
        row
        for name in options.models
        for shape in MODELS[name]
        for row in measure(name, shape, options)
    ]
    show(rows)
    print(f"{target.name}: {rows[-1]['peak']}", *worst(rows), sep="\n")
    settings = {"instruction_set": target.name, "rounds": options.rounds}
    output = options.output or ROOT / "results" / f"kernels_{target.name}.json"
    output.write_text(
        json.dumps({"rows": rows, "environment": environment() | settings}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()

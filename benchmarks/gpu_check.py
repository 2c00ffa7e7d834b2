"""Everything that needs a GPU, in one go of less than ten minutes: `make gpu-check`.

    python -m benchmarks.gpu_check [--only tests bandwidth shape nano] [--output FILE]

1. the kernel and engine tests on CUDA
2. the measured copy bandwidth
3. the Qwen3-8B shape in bf16 with random weights: step costs, host synchronisation, the sweep at SIMULATED acceptance
4. the bundled model: the sweep at its own acceptance

Writes benchmarks/results/gpu.json after each part. Exit status 1 where a part fails or a bound does not hold, 2 without
a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

from benchmarks.shapes import random_model
from idlm import LLM
from idlm.decoding.plan import AR, Plan
from idlm.decoding.settings import Features
from idlm.engine.step import Kind
from idlm.evaluation.closed_loop import contestants
from idlm.evaluation.environment import environment
from idlm.evaluation.serving_bench import Row, bench
from idlm.evaluation.workload import workload
from idlm.models.idlm_model import Idlm
from idlm.models.loading import load

ROOT = Path(__file__).parent
RESULTS = ROOT / "results" / "gpu.json"
TEST_SECONDS = 240
ACCEPTANCE = (0.9, 0.88, 0.86)
PLANS = (AR, Plan(2, "all"), Plan(4, "chain"), Plan(4, "all"), Plan(8, "all"))
MODES = ("ar", "chain", "all", "planner")
SYNCHRONISING = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
"""Runtime calls in which the host waits; the trace names `cudaMemcpyAsync` apart from `cudaMemcpy`."""


def tests() -> dict[str, object]:
    """The tests of kernels and engine, which take the GPU where there is one."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-p",
        "no:cacheprovider",
        "tests/attention",
        "tests/kernels",
        "tests/engine",
    ]
    surroundings = os.environ | {"IDLM_TEST_DEVICE": "cuda"}
    done = subprocess.run(
        command, cwd=ROOT.parent, env=surroundings, capture_output=True, text=True, timeout=TEST_SECONDS, check=False
    )
    tail = done.stdout.splitlines()[-12:]
    return {"passed": done.returncode == 0, "tail": tail}


def copy_bandwidth(size: int = 2**31, repeats: int = 20) -> float:
    """Bytes per second that a device copy moves, those read and those written."""
    source = torch.empty(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return 2 * size / median(seconds)


def weight_bytes(idlm: Idlm) -> int:
    """Bytes of weights that a step of one row reads: all but the embedding, unless that is the head as well."""
    table: torch.Tensor = idlm.model.get_input_embeddings().weight  # type: ignore[assignment]
    head: torch.Tensor = idlm.model.get_output_embeddings().weight  # type: ignore[no-untyped-call]
    parameters = {parameter.data_ptr(): parameter for parameter in idlm.model.parameters()}
    total = sum(parameter.numel() * parameter.itemsize for parameter in parameters.values())
    return total if table.data_ptr() == head.data_ptr() else total - table.numel() * table.itemsize


def step_costs(llm: LLM, bandwidth: float) -> dict[str, object]:
    """Steps of every plan at several batch sizes, and AR's against the time its weights take to read."""
    measure = llm.engine.runner.measure
    turns = {batch: [{plan: measure(plan, batch) for plan in PLANS} for _ in range(10)] for batch in (1, 8, 64)}
    costs = {batch: {plan: median(turn[plan] for turn in row) for plan in PLANS} for batch, row in turns.items()}
    overhead = {batch: {str(plan.width): row[plan] / row[AR] for plan in PLANS} for batch, row in costs.items()}
    least = weight_bytes(llm.idlm) / bandwidth
    return {
        "ar_step_ms": {batch: 1e3 * row[AR] for batch, row in costs.items()},
        "overhead": overhead,
        "weights_over_bandwidth_ms": 1e3 * least,
        "bounds": {
            "AR step at 1 within 1.25 of bytes / bandwidth": [costs[1][AR] / least, costs[1][AR] <= 1.25 * least],
            "overhead(7) <= 1.10": [overhead[1]["7"], overhead[1]["7"] <= 1.10],
            "overhead(16) <= 1.20": [overhead[1]["16"], overhead[1]["16"] <= 1.20],
        },
    }


@torch.inference_mode()
def host_waits(llm: LLM, steps: int = 10) -> dict[str, object]:
    """Runtime calls in which the host waits, within launched steps, from the profiler's trace; none is allowed.

    The steps run on the spare slot, which no request sits in.
    """
    runner = llm.engine.runner
    kind, slots = Kind(llm.engine.planner.widest, Features()), [runner.slots.spare] * 8
    for _ in range(5):  # warm up and record
        runner.step(kind, slots, 256).read()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            with torch.profiler.record_function("idlm step"):
                launched = runner.step(kind, slots, 256)
            launched.read()
    events = profile.events() or []
    ranges = [event.time_range for event in events if event.name == "idlm step" and event.device_type.name == "CPU"]
    waits = [
        event.name
        for event in events
        if event.name in SYNCHRONISING
        and any(within.start <= event.time_range.start <= within.end for within in ranges)
    ]
    found = {name: waits.count(name) for name in sorted(set(waits))}
    return {"steps": len(ranges), "waits": found, "bounds": {"no host synchronisation": [len(waits), not waits]}}


def sweep(
    idlm: Idlm, concurrencies: list[int], kv_memory: str, acceptance: tuple[float, ...] | None
) -> dict[str, object]:
    """Every mode at every concurrency."""
    ours = contestants(idlm, MODES, 4, max(concurrencies), acceptance, kv_memory)
    rows = bench(ours, workload(idlm), concurrencies, number=16, repeats=2)
    bounds = {
        f"planner >= 1.0 x AR at {row['concurrency']}": [row["speedup_over_ar"], _at_least(row, 1.0)]
        for row in rows
        if row["mode"] == "planner"
    }
    return {"simulated_acceptance": acceptance, "rows": rows, "bounds": bounds}


def _at_least(row: Row, bound: float) -> bool:
    return float(str(row["speedup_over_ar"])) >= bound


def shape() -> dict[str, object]:
    """The Qwen3-8B shape."""
    idlm = random_model("8B", torch.bfloat16, "cuda")
    bandwidth = copy_bandwidth()
    llm = LLM(idlm, stride=8, branches="all", max_num_seqs=64, kv_memory="8GiB", simulate_acceptance=ACCEPTANCE)
    found: dict[str, object] = {"parameters": idlm.model.num_parameters(), "copy_bandwidth": bandwidth}
    found |= {"costs": step_costs(llm, bandwidth), "synchronisation": host_waits(llm)}
    return found | {"sweep": sweep(idlm, [1, 8, 64], "8GiB", ACCEPTANCE)}


def nano() -> dict[str, object]:
    """The bundled model, at its own acceptance."""
    return {"sweep": sweep(load("nano", device="cuda"), [1, 8, 64], "1GiB", None)}


PARTS: dict[str, Callable[[], dict[str, object]]] = {
    "tests": tests,
    "bandwidth": lambda: {"bytes_per_second": copy_bandwidth()},
    "shape": shape,
    "nano": nano,
}


def attempt(part: Callable[[], dict[str, object]]) -> dict[str, object]:
    """A part's figures and seconds; a failure is a figure too, so that the parts after it still run."""
    started = perf_counter()
    try:
        found = part()
    except Exception:  # whatever a kernel or a driver raises
        found = {"passed": False, "error": traceback.format_exc().splitlines()[-15:]}
    torch.cuda.empty_cache()
    return found | {"seconds": perf_counter() - started}


def failures(found: object, place: str = "") -> list[str]:
    """What failed, and every bound that does not hold, anywhere in a report."""
    if not isinstance(found, dict):
        return []
    bounds = found.get("bounds", {})
    failed = [f"{place}: {name}: {value}" for name, (value, holds) in bounds.items() if not holds]
    failed += [f"{place}: failed"] if found.get("passed") is False else []
    return failed + [line for key, value in found.items() for line in failures(value, f"{place}/{key}")]


def main() -> int:
    """Run the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: no CUDA device here; run gpu-check on a machine with one", file=sys.stderr)
        return 2
    report: dict[str, object] = {"environment": environment() | {"cuda": torch.version.cuda}}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        report[name] = attempt(PARTS[name])
        options.output.write_text(json.dumps(report, indent=1) + "\n")
        print(name, json.dumps(report[name]), flush=True)
    failed = failures(report)
    print("\n".join(failed) or "every bound holds")
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())

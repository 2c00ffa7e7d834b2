"""Everything that needs a GPU, in less than eight minutes: `make gpu-check`.

    python -m benchmarks.gpu_check [--only smoke costs tests sweep] [--seconds 450] [--output FILE]

    smoke   the bundled model's tokens are the same for every plan, batch, graph and device
    costs   steps of Qwen3-8B's shape in bf16 with random weights, kernel by kernel, against the
            measured bandwidth
    tests   those of kernels and engine that can run on a GPU, with Triton's attention in float32
    sweep   the 8B shape at SIMULATED acceptance, then the bundled model, by load and plan

Each part runs in a process of its own, since an illegal memory access ends all CUDA work of its
process. It has a share of the time and writes each figure as soon as it is known, so that the rest
runs after a failure. All figures go to benchmarks/results/gpu.json; each part's own file and the
printed output stay beside it. Exit status 1 if a part fails or a bound does not hold, 2 without a
GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter, time
from typing import Any

import torch

from benchmarks.gpu_costs import ACCEPTANCE, costs
from benchmarks.gpu_smoke import Figure, smoke
from benchmarks.shapes import random_model
from idlm.evaluation.closed_loop import bench_engines
from idlm.evaluation.environment import environment
from idlm.evaluation.serving_bench import bench
from idlm.evaluation.workload import workload
from idlm.models.idlm_model import Idlm
from idlm.models.loading import load

ROOT = Path(__file__).parent
RESULTS = ROOT / "results" / "gpu.json"
SECONDS = 450
TESTS = (
    "tests/attention",
    "tests/kernels/test_verification.py",
    "tests/kernels/test_batch_invariant.py",
    "tests/engine/test_decoder.py",
    "tests/engine/test_requests.py",
    "tests/engine/test_schedules.py",
    "tests/engine/test_guide.py",
)
CHOSEN = "qwen3 or not test_equals_the_reference"
"""One model family is enough: the engine treats all alike."""
TESTS_LEAVE = 15
"""Seconds of the tests' share that are reserved for their report."""
MODES = ("ar", "planner", "all", "chain")
LOADS = ((64, 64), (1, 4))
"""Requests in flight, and the least number of requests in a round."""


def tests(until: float) -> Iterator[Figure]:
    """The tests of kernels and engine."""
    yield "pytest", partial(run_tests, until)


def run_tests(until: float) -> dict[str, object]:
    """The outcome of pytest, which is interrupted before `until` and then reports what it has."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "--tb=short",
        "-vv",
        "-rfE",
        "--timeout",
        "90",
    ]
    command += ["-n", str(min(8, os.cpu_count() or 1)), "-k", CHOSEN, *TESTS]
    variables = {
        "IDLM_TEST_DEVICE": "cuda",
        "IDLM_TEST_DTYPE": "float32",
        "IDLM_SCHEDULE_STEPS": "300",
    }
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(
            command, cwd=ROOT.parent, env=os.environ | variables, stdout=log, stderr=log
        )
        try:
            status = child.wait(until - time() - TESTS_LEAVE)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGINT)
            status = -1
            with suppress(subprocess.TimeoutExpired):
                child.wait(TESTS_LEAVE / 2)
        log.seek(0)
        lines = log.read().decode(errors="replace").splitlines()
    return {"passed": status == 0, "status": status, **outcome(lines)}


def outcome(lines: list[str]) -> dict[str, object]:
    """Counts, failures and errors in the output of pytest."""
    passed = sum(" PASSED " in line for line in lines)
    failed = sorted(
        {
            line.partition("tests/")[2][:150]
            for line in lines
            if " FAILED " in line or " ERROR " in line
        }
    )
    errors = [line[:160] for line in lines if line.startswith("E   ")]
    return {
        "counts": passed,
        "failed": failed,
        "errors": errors[:60],
        "last": lines[-1:],
        "tail": lines[-80:],
    }


def sweep(until: float) -> Iterator[Figure]:
    """Every mode under load, one model at a time."""
    yield from Sweep(random_model("8B", torch.bfloat16, "cuda"), "12GiB", ACCEPTANCE).figures(until)
    yield from Sweep(load("nano", device="cuda"), "1GiB", None).figures(until)


@dataclass
class Sweep:
    """A model under load; `rates` are AR's tokens per second, by requests in flight."""

    idlm: Idlm
    kv_memory: str
    acceptance: tuple[float, ...] | None
    rates: dict[int, float] = field(default_factory=dict)

    def figures(self, until: float) -> Iterator[Figure]:
        """A figure for each load and mode; none begins after `until`."""
        for concurrency, count in LOADS:
            for mode in MODES:
                if time() < until:
                    yield (
                        f"{self.idlm.name} {mode} at {concurrency}",
                        partial(self.row, mode, concurrency, count),
                    )

    def row(self, mode: str, concurrency: int, count: int) -> dict[str, object]:
        """The figures of a mode; a round has at least `count` requests."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        (engine,) = bench_engines(self.idlm, (mode,), 4, 64, self.acceptance, self.kv_memory)
        (figures,) = bench([engine], workload(self.idlm), [concurrency], count, repeats=1)
        figures["graphs"] = len(engine.llm.engine.runner._steps._recordings)
        figures["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
        rate = float(str(figures["tokens_per_second"]))
        if mode == "ar":
            self.rates[concurrency] = rate
        over = rate / self.rates[concurrency] if concurrency in self.rates else None
        bounds = {"planner >= AR": [over, over >= 1.0]} if mode == "planner" and over else {}
        return figures | {"over_ar": over, "bounds": bounds}


PARTS: dict[str, tuple[Callable[[float], Iterator[Figure]], float]] = {
    "smoke": (lambda until: smoke(), 0.2),
    "costs": (lambda until: costs(), 0.28),
    "tests": (tests, 0.26),
    "sweep": (sweep, 0.26),
}
"""Each part: its figures, given the time by which it must end, and its share of the seconds. Time
that a part does not use goes to the parts after it."""


def attempt(part: Callable[[], dict[str, object]]) -> dict[str, object]:
    """A figure with its seconds; a failure is a figure too, so that the next ones still run."""
    started = perf_counter()
    try:
        figure = part()
    except Exception:  # kernels and drivers raise errors of many types
        figure = {"passed": False, "error": traceback.format_exc().splitlines()[-15:]}
    gc.collect()
    return figure | {"seconds": perf_counter() - started}


def run_part(name: str, until: float, output: Path) -> None:
    """The figures of one part, in this process; the file is written after each."""
    figures_by_label: dict[str, object] = {}
    figures = PARTS[name][0](until)

    def make() -> dict[str, object]:
        for label, figure in figures:
            figures_by_label[label] = attempt(figure)
            del figure  # it holds a model
            output.write_text(json.dumps(figures_by_label, indent=1) + "\n")
            torch.cuda.empty_cache()
        return {}

    figures_by_label["all"] = attempt(make)
    output.write_text(json.dumps(figures_by_label, indent=1) + "\n")


def start_part(name: str, seconds: float, output: Path) -> dict[str, Any]:
    """Run one part in a process of its own, which is killed after `seconds`; returns its
    figures."""
    file = output.with_name(f"{output.stem}.{name}.json")
    file.write_text("{}\n")
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu_check",
        "--part",
        name,
        "--until",
        str(time() + seconds),
    ]
    with output.with_suffix(".log").open("ab+") as log:
        begin = log.tell()
        child = subprocess.Popen(
            [*command, "--output", str(file)],
            stdout=log,
            stderr=log,
            cwd=ROOT.parent,
            start_new_session=True,
        )
        try:
            status: object = child.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            status = "time is up"
        log.seek(begin)
        tail = log.read().decode(errors="replace").splitlines()[-5:]
    figures: dict[str, Any] = json.loads(file.read_text())
    if status != 0:
        figures["process"] = {
            "passed": False,
            "status": status,
            "tail": [line[:300] for line in tail],
        }
    return figures


def failures(report: object, where: str = "") -> list[str]:
    """Every failure and every bound that does not hold, anywhere in a report."""
    if not isinstance(report, dict):
        return []
    bounds = report.get("bounds", {})
    failed = [f"{where}: {name}: {value}" for name, (value, holds) in bounds.items() if not holds]
    failed += [f"{where}: failed"] if report.get("passed") is False else []
    return failed + [
        line for key, value in report.items() for line in failures(value, f"{where}/{key}")
    ]


ROW = (
    *(
        "tokens_per_second",
        "over_ar",
        "tpf_decode",
        "ttft_ms",
        "tpot_ms",
        "worst_gap_ms",
        "host_share",
        "plans",
    ),
    *("graphs", "reserved_gib", "seconds"),
)
"""Keys of a row of the sweep that the summary shows."""
SUMMARY = 2_700
"""Characters of a part's summary."""


def summary(name: str, figures: dict[str, Any]) -> str:
    """A part's figures, one a line; of an error its place and its message."""
    lines = [f"## {name}"]
    for label, figure in figures.items():
        left_out = {"bounds", "tail"} | (
            set(figure) - set(ROW) if "tokens_per_second" in figure else set()
        )
        kept = {key: value for key, value in figure.items() if key not in left_out}
        if "error" in kept:
            kept["error"] = [line.strip() for line in kept["error"] if "^^" not in line][-4:]
        lines.append(f"{label}: {shorter(kept)}")
    return "\n".join(lines)[:SUMMARY]


def shorter(value: object) -> str:
    """JSON with numbers of four digits and without quotes."""
    text = json.dumps(value, separators=(",", ":"))
    text = re.sub(r"-?\d+\.\d+(e-?\d+)?", lambda match: f"{float(match[0]):.4g}", text)
    return text.replace('"', "")


def main() -> int:
    """Exit status 1 if a part fails or a bound does not hold, 2 without a GPU."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of all parts together")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: no CUDA device here; run gpu-check on a machine with one", file=sys.stderr)
        return 2
    if options.part:
        run_part(options.part, options.until, options.output)
        return 0
    return check(options.only, options.seconds, options.output)


def check(names: list[str], seconds: float, output: Path) -> int:
    """Run the parts one after the other; print their summaries and what failed."""
    until = perf_counter() + seconds
    report: dict[str, Any] = {"environment": environment() | {"cuda": torch.version.cuda}}
    output.parent.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(names):
        later = sum(PARTS[part][1] for part in names[index + 1 :])
        left = until - perf_counter()
        report[name] = start_part(name, left * PARTS[name][1] / (PARTS[name][1] + later), output)
        output.write_text(json.dumps(report, indent=1) + "\n")
        print(summary(name, report[name]), f"[{left - until + perf_counter():.0f} s]", flush=True)
    failed = failures(report)
    print("\n".join(["## failed", *failed])[:SUMMARY] if failed else "every bound holds")
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())

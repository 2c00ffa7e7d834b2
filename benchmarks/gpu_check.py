"""Everything that needs a GPU, in one go of five and a half minutes: `make gpu-check`.

    python -m benchmarks.gpu_check [--only smoke costs tests sweep] [--seconds 320] [--output FILE]

1. smoke: the bundled model's tokens, whatever the plan, the batch, the graph and the device
2. costs: steps of Qwen3-8B's shape in bf16 with random weights, kernel by kernel, against the
   measured bandwidth
3. tests: those of kernels and engine that take the GPU, with Triton's attention in float32
4. sweep: the 8B shape at SIMULATED acceptance, then the bundled model at its own, by load and plan

Every part is a process of its own, since an illegal access ends all CUDA work of its process; it
has its share of the time, and writes each figure when it is known, so that what follows a failure
still runs. The file, benchmarks/results/ gpu.json unless said otherwise, has them all, with the
commit and the date; each part's own file and what was printed stay beside it. Exit status 1 where a
part fails or a bound does not hold, 2 without a GPU.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter, time
from typing import Any

import torch

from benchmarks.gpu_costs import ACCEPTANCE, costs
from benchmarks.gpu_smoke import Figure, smoke
from benchmarks.shapes import random_model
from idlm.environment import environment
from idlm.evaluation.closed_loop import bench_engines
from idlm.evaluation.serving_bench import bench
from idlm.evaluation.workload import workload
from idlm.models.idlm_model import Idlm
from idlm.models.loading import load

ROOT = Path(__file__).parent
RESULTS = ROOT / "results" / "gpu.json"
SECONDS = 320
TESTS = (
    "tests/attention",
    "tests/kernels/test_verification.py",
    "tests/kernels/test_batch_invariant.py",
    "tests/kernels/test_layer_ops.py",
    "tests/engine/test_layers.py",
    "tests/engine/test_decoder.py",
    "tests/engine/test_requests.py",
    "tests/engine/test_deterministic.py",
    "tests/engine/test_device.py",
)
CHOSEN = (
    "(qwen3 or not (llama or mistral or qwen2)) and not double_loop and not bundled_model"
    " and not (test_equals_the_reference and -7])"
)
"""Of the families one is enough: the engine does not know them apart. The double loops are about
PyTorch's attention, which a GPU does not run, and launch a kernel for every key. The relaxed rule's
threshold is a matter of rounding in float32, on a CPU too."""
WORDS = ("passed", "skipped", "failed", "error")
TESTS_LEAVE = 12
"""Seconds of the tests' share that are kept to report what they have come to."""
MODES = ("ar", "planner", "all", "chain")
NANO_MODES = ("ar", "planner")
LOADS = ((64, 64), (1, 4))
"""Requests in flight, and how many a round has, at least."""


def tests(until: float) -> Iterator[Figure]:
    """The tests of kernels and engine."""
    yield "pytest", partial(run_tests, until)


def run_tests(until: float) -> dict[str, object]:
    """The outcome of pytest, which is interrupted before `until` and then reports what it has."""
    options = ["-p", "no:cacheprovider", "--tb=short", "-vv", "-rfE", "--timeout", "60"]
    options += ["-n", "4"] if find_spec("xdist") else []
    wishes = {
        "IDLM_TEST_DEVICE": "cuda",
        "IDLM_TEST_DTYPE": "float32",
        "PYTHONUNBUFFERED": "1",
    }
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, "-k", CHOSEN, *TESTS],
            cwd=ROOT.parent,
            env=os.environ | wishes,
            stdout=log,
            stderr=log,
        )
        status: object = waited(child, until - time() - TESTS_LEAVE)
        log.seek(0)
        lines = log.read().decode(errors="replace").splitlines()
    return {"passed": status == 0, "status": status, **outcome(lines)}


def waited(child: subprocess.Popen[bytes], seconds: float) -> object:
    """Its exit status; where the time ends first, it is interrupted, and has half of what is left
    to say what it has to."""
    try:
        return child.wait(seconds)
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            child.wait(TESTS_LEAVE / 2)
        return "time is up"


def outcome(lines: list[str]) -> dict[str, object]:
    """Counts, failures and errors in the output of pytest."""
    items = [found[1] for line in lines if (found := re.search(r"\b(\d+) items\b", line))]
    failed = {
        line.partition("tests/")[2][:150]
        for line in lines
        if " FAILED " in line or " ERROR " in line
    }
    return {
        "counts": {
            **{word: sum(f" {word.upper()} " in line for line in lines) for word in WORDS},
            "of": int(items[-1]) if items else None,
        },
        "failed": sorted(failed),
        "errors": [line[:160] for line in lines if line.startswith("E   ")][:60],
        "last": lines[-1:],
        "tail": lines[-80:],
    }


def sweep(until: float) -> Iterator[Figure]:
    """Every mode under load, one model at a time."""
    large = random_model("8B", torch.bfloat16, "cuda")
    yield from Sweep(large, "12GiB", ACCEPTANCE).figures(MODES, until)
    del large
    yield from Sweep(load("nano", device="cuda"), "1GiB", None).figures(NANO_MODES, until)


@dataclass
class Sweep:
    """A model under load; `rates` are AR's tokens per second, by requests in flight."""

    idlm: Idlm
    kv_memory: str
    acceptance: tuple[float, ...] | None
    rates: dict[int, float] = field(default_factory=dict)

    def figures(self, modes: Sequence[str], until: float) -> Iterator[Figure]:
        """A figure for each number of requests in flight and each mode; none is begun after
        `until`."""
        for concurrency, number in LOADS:
            for mode in modes:
                if time() < until:
                    yield (
                        f"{self.idlm.name} {mode} at {concurrency}",
                        partial(self.row, mode, concurrency, number),
                    )

    def row(self, mode: str, concurrency: int, number: int) -> dict[str, object]:
        """A mode's figures with so many requests in flight, and at least `number` of them in a
        round."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        (ours,) = bench_engines(self.idlm, (mode,), 4, 64, self.acceptance, self.kv_memory)
        (found,) = bench([ours], workload(self.idlm), [concurrency], number, repeats=1)
        found["graphs"] = len(ours.llm.engine.runner._steps._recordings)
        found["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
        rate = float(str(found["tokens_per_second"]))
        if mode == "ar":
            self.rates[concurrency] = rate
        over = rate / self.rates[concurrency] if concurrency in self.rates else None
        bounds = {"planner >= AR": [over, over >= 1.0]} if mode == "planner" and over else {}
        return found | {"over_ar": over, "bounds": bounds}


PARTS: dict[str, tuple[Callable[[float], Iterator[Figure]], float]] = {
    "smoke": (lambda until: smoke(), 0.22),
    "costs": (lambda until: costs(), 0.22),
    "tests": (tests, 0.22),
    "sweep": (sweep, 0.34),
}
"""Each part's figures, given when it has to end (as `time` has it), and its share of the time; what
one leaves, those after it have."""


def attempt(part: Callable[[], dict[str, object]]) -> dict[str, object]:
    """A figure and its seconds; a failure is a figure too, so that those after it still run."""
    started = perf_counter()
    try:
        found = part()
    except Exception:  # whatever a kernel or a driver raises
        found = {"passed": False, "error": traceback.format_exc().splitlines()[-15:]}
    gc.collect()
    return found | {"seconds": perf_counter() - started}


def run_part(name: str, until: float, output: Path) -> None:
    """The figures of one part, in this process, which is ended at `until`; the file is written
    after each."""
    found: dict[str, object] = {}
    figures = PARTS[name][0](until)

    def make() -> dict[str, object]:
        for label, figure in figures:
            found[label] = attempt(figure)
            del figure  # it holds a model
            output.write_text(json.dumps(found, indent=1) + "\n")
            torch.cuda.empty_cache()
        return {}

    found["all"] = attempt(make)
    output.write_text(json.dumps(found, indent=1) + "\n")


def start_part(name: str, seconds: float, output: Path) -> dict[str, Any]:
    """Run one part in a process of its own, and return its figures; it is ended when its time is
    up."""
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
            status = "time is up"
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # the tests' workers too
        child.wait()
        log.seek(begin)
        tail = log.read().decode(errors="replace").splitlines()[-5:]
    found: dict[str, Any] = json.loads(file.read_text())
    if status != 0:
        found["process"] = {
            "passed": False,
            "status": status,
            "tail": [line[:300] for line in tail],
        }
    return found


def failures(found: object, place: str = "") -> list[str]:
    """What failed, and every bound that does not hold, anywhere in a report."""
    if not isinstance(found, dict):
        return []
    bounds = found.get("bounds", {})
    failed = [f"{place}: {name}: {value}" for name, (value, holds) in bounds.items() if not holds]
    failed += [f"{place}: failed"] if found.get("passed") is False else []
    return failed + [
        line for key, value in found.items() for line in failures(value, f"{place}/{key}")
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
"""What the summary says of a row of the sweep."""
SUMMARY = 2_700
"""Characters of a part's summary."""


def summary(name: str, found: dict[str, Any]) -> str:
    """A part's figures in short, one a line; of an error its place and what it is."""
    lines = [f"## {name}"]
    for label, figure in found.items():
        left_out = {"bounds", "tail"} | (
            set(figure) - set(ROW) if "tokens_per_second" in figure else set()
        )
        kept = {key: value for key, value in figure.items() if key not in left_out}
        if "error" in kept:
            kept["error"] = [line.strip() for line in kept["error"] if "^^" not in line][-4:]
        lines.append(f"{label}: {shorter(kept)}")
    return "\n".join(lines)[:SUMMARY]


def shorter(value: object) -> str:
    """JSON with numbers of four digits and few signs."""
    text = json.dumps(value, separators=(",", ":"))
    text = re.sub(r"-?\d+\.\d+(e-?\d+)?", lambda number: f"{float(number[0]):.4g}", text)
    return text.replace('"', "")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of all parts together")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--commit", default=head(), help="what is checked, where git cannot say")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: no CUDA device here; run gpu-check on a machine with one", file=sys.stderr)
        return 2
    if options.part:
        run_part(options.part, options.until, options.output)
        return 0
    start = {"commit": options.commit, "date": datetime.now(UTC).isoformat(timespec="seconds")}
    return check(options.only, options.seconds, options.output, start)


def head() -> str | None:
    """The commit that is checked out; None where there is no git, or no repository."""
    with suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "rev-parse", "HEAD"]
        return subprocess.check_output(
            command, cwd=ROOT.parent, text=True, stderr=subprocess.DEVNULL
        ).strip()
    return None


def check(names: list[str], seconds: float, output: Path, start: dict[str, Any]) -> int:
    """Run the parts one after the other, print their summaries and what failed; the report begins
    with `start`."""
    until = perf_counter() + seconds
    report = start | {"environment": environment() | {"cuda": torch.version.cuda}}
    output.parent.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        later = sum(PARTS[one][1] for one in names[number + 1 :])
        left = until - perf_counter()
        report[name] = start_part(name, left * PARTS[name][1] / (PARTS[name][1] + later), output)
        output.write_text(json.dumps(report, indent=1) + "\n")
        print(summary(name, report[name]), f"[{left - until + perf_counter():.0f} s]", flush=True)
    failed = failures(report)
    print("\n".join(["## failed", *failed])[:SUMMARY] if failed else "every bound holds")
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())

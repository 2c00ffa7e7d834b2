"""The figures of the README, from the files of benchmarks/results."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.pages.benchmarks_page import RESULTS, is_earlier
from benchmarks.pages.tables import times


def render() -> str:
    """Three figures, each with a link to its section of docs/benchmarks.md."""
    pairs, problems, load = (
        _read(f"{n}.json") for n in ("same_bytes_random", "nano_2000", "serving_avx2")
    )
    run = problems["runs"]["nano N=8 all"]
    cells = {(row["engine"], row["mode"], row["concurrency"]): row for row in load["rows"]}
    faster = times(cells["idlm", "planner", 1]["speedup_over_ar"])
    peer = [times(1 / cells["vllm", "compiled", count]["speedup_over_ar"]) for count in (1, 32)]
    return "\n".join(
        (
            f"* **The same bytes**: {pairs['equal']:,} of {pairs['pairs']:,} pairs of a prompt "
            "and a setting, in float64, whatever the plan "
            f"([table](docs/benchmarks.md#same-bytes){age(pairs)}).",
            f"* **{run['tpf']:.2f} tokens per forward** at stride 8 "
            f"on {problems['problems']:,} held-out problems "
            f"([table](docs/benchmarks.md#tokens-per-forward){age(problems)}).",
            f"* **{faster} AR's speed** for one request on a CPU; "
            f"this AR is {peer[0]} vLLM's for one request, {peer[1]} for 32 "
            f"([table](docs/benchmarks.md#speed){age(load)}).",
        )
    )


def age(report: Any) -> str:
    """The mark of a file of an earlier engine."""
    return ", earlier engine" if is_earlier(report) else ""


def _read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())

"""schemathesis against the server's own OpenAPI document: `make server-fuzz`.

    python -m benchmarks.server_fuzz [--cases 10000] [--seed 1] [--out FILE]

Valid and invalid requests to every route. Every response must have a status and a shape that the
document declares; none may be 500; a request that breaks the schema must be refused; and ordinary
requests must be answered in the end. One check is left out: that every request that fits the schema
is accepted. JSON Schema cannot express all rules (ids of this vocabulary, JSON in strings, prompts
that fit the context). Exit status 1 on any failure.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.harness.client import ask_all
from benchmarks.harness.process import ServerProcess, idlm_serve
from benchmarks.harness.results import RESULTS, report
from benchmarks.harness.workload import COMPLETIONS, bodies

MAX_TOKENS = 16
"""Of a sample, so that valid cases are quick."""
LEFT_OUT = "positive_data_acceptance"


def fuzz(port: int, examples: int, seed: int) -> dict[str, Any]:
    """The report of schemathesis, with at most `examples` cases of its fuzzing phase for an
    operation."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "report.json"
        command = [
            *(str(Path(sys.executable).with_name("schemathesis")), "run"),
            f"http://127.0.0.1:{port}/openapi.json",
            *("--phases", "examples,coverage,fuzzing"),
            *("--exclude-checks", LEFT_OUT, "--continue-on-failure"),
            *("--max-examples", str(examples), "--seed", str(seed)),
            *("--generation-database", "none"),
            *("--request-timeout", "60", "--suppress-health-check", "all", "--no-color"),
            *("--report", "json", "--report-json-path", str(out)),
        ]
        subprocess.run(command, stdout=sys.stderr, cwd=folder, check=False)
        report: dict[str, Any] = json.loads(out.read_text())
        return report


def run(cases: int, seed: int) -> dict[str, Any]:
    """Rounds of schemathesis with new seeds until there were `cases`, then a check of the
    server."""
    total, rounds, failures = 0, 0, list[Any]()
    with ServerProcess(
        idlm_serve("nano", "--threads", "1", "--max-tokens", str(MAX_TOKENS))
    ) as server:
        while total < cases:
            # eight routes have endless inputs
            examples = max(1, (cases - total) // 8)
            outcome = fuzz(server.port, examples, seed + rounds)
            total, rounds = total + outcome["test_cases"]["generated"], rounds + 1
            failures += outcome["failures"] + outcome["errors"]
        after = asyncio.run(ask_all(server.port, COMPLETIONS, bodies("nano", 4, MAX_TOKENS), 4))
        _, left = server.wait_idle()
        bugs = server.get("/metrics")[1].count('status="500"')
    answered = sum(answer.finished and answer.error is None for answer in after)
    return {
        "holds": not failures and not left and not bugs and answered == len(after),
        "cases": total,
        "rounds": rounds,
        "failures": failures,
        "routes_with_a_500": bugs,
        "answered_afterwards": answered,
        "left_behind": left,
        "schemathesis": version("schemathesis"),
        "seed": seed,
    }


def main() -> int:
    """Exit status 1 on any failure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "server_fuzz.json")
    options = parser.parse_args()
    outcome = run(options.cases, options.seed)
    report(outcome, options.out)
    return 0 if outcome["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())

"""schemathesis against the server's own OpenAPI document: `make server-fuzz`.

    python -m benchmarks.server_fuzz [--cases 10000] [--seed 1] [--out FILE]

Valid and invalid requests to every route. Every answer has to be of a status and a shape that the
document declares, none may be a 500, what breaks the schema has to be refused, and an ordinary
request still has to be answered in the end. One check is left out: that whatever fits the schema is
accepted. JSON Schema cannot say all that a request has to hold to (ids of this vocabulary, JSON in
strings, what fits the context). Exit status 1 where something is found.
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
"""Of a sample; the cases that are valid are to be quick."""
LEFT_OUT = "positive_data_acceptance"


def fuzz(port: int, examples: int, seed: int) -> dict[str, Any]:
    """schemathesis' own report, with at most so many cases of its fuzzing phase for an operation."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "report.json"
        command = [
            *(
                str(Path(sys.executable).with_name("schemathesis")),
                "run",
                f"http://127.0.0.1:{port}/openapi.json",
            ),
            *(
                "--phases",
                "examples,coverage,fuzzing",
                "--exclude-checks",
                LEFT_OUT,
                "--continue-on-failure",
            ),
            *(
                "--max-examples",
                str(examples),
                "--seed",
                str(seed),
                "--generation-database",
                "none",
            ),
            *("--request-timeout", "60", "--suppress-health-check", "all", "--no-color"),
            *("--report", "json", "--report-json-path", str(out)),
        ]
        subprocess.run(command, stdout=sys.stderr, cwd=folder, check=False)
        found: dict[str, Any] = json.loads(out.read_text())
        return found


def run(cases: int, seed: int) -> dict[str, Any]:
    """Rounds of schemathesis with new seeds until there were so many cases, and a look at the
    server afterwards."""
    total, rounds, failures = 0, 0, list[Any]()
    with ServerProcess(
        idlm_serve("nano", "--threads", "1", "--max-tokens", str(MAX_TOKENS))
    ) as server:
        while total < cases:
            found = fuzz(
                server.port, max(1, (cases - total) // 5), seed + rounds
            )  # five routes have endless inputs
            total, rounds = total + found["test_cases"]["generated"], rounds + 1
            failures += found["failures"] + found["errors"]
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
    """Run and report; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "server_fuzz.json")
    options = parser.parse_args()
    found = run(options.cases, options.seed)
    report(found, options.out)
    return 0 if found["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())

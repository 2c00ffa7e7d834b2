"""The same bytes over HTTP as offline and as AR: `make server-bytes`.

    python -m benchmarks.server_bytes [--model nano] [--requests 64] [--concurrency 1 32]
                                      [--out FILE]

Half of the requests are greedy, half are seeded; half are streamed. Each goes to the model and to
the model without drafts, at each concurrency, first with a prefix cache that does not know its
prompt and then again. Text, tokens and finish reason must be those of `LLM.generate`, whose own
output must be that of AR. In float64, where all outputs are equal whatever runs beside them. Exit
status 1 if something differs.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import uvloop

from benchmarks.harness.client import Answer, ask_all
from benchmarks.harness.process import ServerProcess, idlm_serve
from benchmarks.harness.results import RESULTS, report
from benchmarks.harness.workload import COMPLETIONS
from idlm import LLM, SamplingParams
from idlm.evaluation.workload import Request, workload
from idlm.models.loading import load

MAX_TOKENS = 96


@dataclass(frozen=True)
class Output:
    """The parts of a response that must be equal."""

    text: str
    tokens: list[int]
    reason: str


def params(index: int) -> dict[str, Any]:
    """Greedy, seeded, greedy, seeded with filters and penalties, ..., by the request's index."""
    kinds: tuple[dict[str, Any], ...] = (
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 1000 + index},
        {"temperature": 0.0, "frequency_penalty": 0.3},
        {"temperature": 0.8, "seed": index, "top_p": 0.9, "top_k": 40, "presence_penalty": 0.2},
    )
    return {"max_tokens": MAX_TOKENS} | kinds[index % 4]


def body(model: str, prompt: Sequence[int], index: int) -> dict[str, Any]:
    """The body of request `index`; its trace reports the tokens."""
    stream = index // 4 % 2 == 1
    usage = {"stream_options": {"include_usage": True}} if stream else {}
    request = {"model": model, "prompt": list(prompt), "stream": stream, "idlm": {"trace": True}}
    return request | usage | params(index)


def output(answer: Answer) -> tuple[Output, int]:
    """The output in a response, and how many of its prompt tokens were in the prefix cache.

    Raises:
        RuntimeError: it is an error.
    """
    if not answer.finished or answer.error is not None:
        raise RuntimeError(f"status {answer.status}: {answer.error}")
    parts = answer.events() if "event-stream" in answer.headers["content-type"] else [answer.json()]
    choices = [choice for part in parts for choice in part["choices"]]
    traces = [choice.get("idlm", {}).get("trace", []) for choice in choices]
    tokens = [entry["id"] for trace in traces for entry in trace]
    reason = next(choice["finish_reason"] for choice in choices if choice["finish_reason"])
    cached = parts[-1]["usage"]["prompt_tokens_details"]["cached_tokens"]
    return Output("".join(choice["text"] for choice in choices), tokens, reason), cached


def offline(llm: LLM, prompts: Sequence[list[int]]) -> list[Output]:
    """The outputs of `LLM.generate` for the same requests."""
    results = llm.generate(
        prompts, [SamplingParams(**params(index)) for index in range(len(prompts))]
    )
    return [Output(result.text, result.token_ids, result.finish_reason) for result in results]


async def compare(
    port: int, name: str, prompts: Sequence[list[int]], expected: Iterable[Output], at: int
) -> list[Any]:
    """A row each for a cold and a warm prefix cache; the prompts must be new to the server."""
    rows = []
    for cache in ("cold", "warm"):
        bodies = [body(name, prompt, index) for index, prompt in enumerate(prompts)]
        got = [output(answer) for answer in await ask_all(port, COMPLETIONS, bodies, at)]
        same = sum(mine == theirs for (mine, _), theirs in zip(got, expected, strict=True))
        cached = sum(tokens for _, tokens in got)
        row = {"model": name, "concurrency": at, "cache": cache, "requests": len(got), "same": same}
        rows.append(
            row
            | {"tokens": sum(len(mine.tokens) for mine, _ in got), "cached_prompt_tokens": cached}
        )
        print(rows[-1], file=sys.stderr)
    return rows


def run(model: str, count: int, concurrencies: Sequence[int]) -> dict[str, Any]:
    """All rows, and whether everything is equal."""
    idlm = load(model, dtype="float64")
    ar, isd = LLM(idlm, stride=1), LLM(idlm, stride=4, branches="planner")
    rows, equal = [], True
    command = idlm_serve(model, "--dtype", "float64", "--threads", str(torch.get_num_threads()))
    with (
        ServerProcess(command) as server,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        for seed, (at, name) in enumerate(
            (at, name) for at in concurrencies for name in (model, f"{model}:ar")
        ):
            requests: list[Request] = workload(idlm)(count, 100 + seed)
            prompts = [request.prompt_token_ids for request in requests]
            expected = offline(ar, prompts)
            equal &= offline(isd, prompts) == expected
            rows += runner.run(compare(server.port, name, prompts, expected, at))
    warm = [row["cached_prompt_tokens"] for row in rows if row["cache"] == "warm"]
    same = all(row["same"] == row["requests"] for row in rows)
    return {"holds": equal and same and min(warm) > 0, "offline_isd_is_ar": equal, "rows": rows}


def main() -> int:
    """Exit status 1 if something differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="nano")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "server_bytes.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    outcome = run(options.model, options.requests, options.concurrency)
    report(outcome | {"served": options.model, "dtype": "float64"}, options.out)
    return 0 if outcome["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())

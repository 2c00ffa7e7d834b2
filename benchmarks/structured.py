"""Structured output: random JSON schemas of growing size, by AR and by ISD.

    python -m benchmarks.structured [MODEL] [--adapter FOLDER] [--schemas 500] [--max-tokens 200]
                                    [--out FILE]

Outputs that ended before max_tokens are validated with the `jsonschema` library; AR and ISD are
compared token by token (float64). The schemas are unrelated to the model, so the content of its
strings is meaningless.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import torch

from idlm import LLM, Guide, Idlm, Result, SamplingParams, load
from idlm.engine.guide import Guides
from idlm.environment import environment

Schema = dict[str, Any]
PROMPT = "Mia has 5 boxes."
NAMES = ("id", "name", "tags", "total", "items", "is_open", "größe", "a b", 'quo"te', "x")
PATTERNS = ("^[A-Z][a-z]{2,6}$", r"^\d{3}-\d{4}$", "^(red|green|blue)$", "^[^a-z]{1,4}$")
LARGEST = 30
PENALTY = {"frequency_penalty": 0.7}
"""Without it a model that was not trained on JSON writes most numbers without end."""
SETTINGS: list[dict[str, float]] = [
    {"temperature": 0.0, **PENALTY},
    {"temperature": 1.0},
    {"temperature": 1.0, "top_p": 0.95, **PENALTY},
    {"temperature": 1.5, "top_k": 50, **PENALTY},
]
FORMATS = ("date", "time", "uuid", "ipv4", "email")


def random_schema(chance: random.Random, size: int) -> Schema:
    """An object schema of about `size` subschemas; from 6 on it may have recursive definitions."""
    root = _object(chance, size)
    if size >= 6 and chance.random() < 0.5:
        root["$defs"] = {"node": _object(chance, size // 3)}
        root["$defs"]["node"]["properties"]["next"] = {
            "anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]
        }
        root["properties"]["chain"] = {"$ref": "#/$defs/node"}
    return root


def _schema(chance: random.Random, size: int) -> Schema:
    if size <= 1:
        return chance.choice([_string, _integer, _number, _choice, _plain])(chance)
    return chance.choice([_object, _object, _array, _tuple, _any])(chance, size - 1)


def _parts(chance: random.Random, size: int, most: int) -> list[Schema]:
    """Up to `most` schemas with about `size` subschemas together."""
    count = chance.randint(1, max(1, min(most, size)))
    return [_schema(chance, max(1, size // count)) for _ in range(count)]


def _object(chance: random.Random, size: int) -> Schema:
    parts = _parts(chance, size, len(NAMES))
    names = chance.sample(NAMES, len(parts))
    schema: Schema = {"type": "object", "properties": dict(zip(names, parts, strict=True))}
    schema["required"] = [name for name in names if chance.random() < 0.4]
    if chance.random() < 0.9:
        schema["additionalProperties"] = chance.choice(
            [False] * 8 + [{"type": "integer", "maximum": 99}]
        )
    return schema


def _array(chance: random.Random, size: int) -> Schema:
    schema: Schema = {
        "type": "array",
        "items": _schema(chance, size),
        "minItems": chance.randint(0, 2),
    }
    return schema if chance.random() < 0.1 else schema | {"maxItems": chance.randint(2, 4)}


def _tuple(chance: random.Random, size: int) -> Schema:
    parts = _parts(chance, size, 4)
    return {"type": "array", "prefixItems": parts, "items": False, "minItems": len(parts)}


def _any(chance: random.Random, size: int) -> Schema:
    return {"anyOf": _parts(chance, size, 3)}


def _string(chance: random.Random) -> Schema:
    if chance.random() < 0.1:
        return {"type": "string"}
    return chance.choice(
        [
            {"type": "string", "maxLength": chance.randint(0, 12)},
            {"type": "string", "minLength": 2, "maxLength": 5},
            {"type": "string", "pattern": chance.choice(PATTERNS)},
            {"type": "string", "format": chance.choice(FORMATS)},
        ]
    )


def _integer(chance: random.Random) -> Schema:
    low = chance.randint(-200, 100)
    bounds = chance.choice(
        [{"minimum": low, "exclusiveMaximum": low + 77}] * 4 + [{"minimum": low}, {}]
    )
    return bounds | {"type": "integer"}


def _number(chance: random.Random) -> Schema:
    stepped = {"minimum": -1.5, "maximum": 2.25, "multipleOf": 0.25}
    return chance.choice([stepped, stepped, {"exclusiveMinimum": 0}, {}]) | {"type": "number"}


def _choice(chance: random.Random) -> Schema:
    return chance.choice(
        [{"enum": ["on", "off", None, 7, {"k": [1]}]}, {"const": "größe 5"}, {"enum": [True]}]
    )


def _plain(chance: random.Random) -> Schema:
    return {"type": chance.choice(["boolean", "null", ["string", "null"]])}


def schemas(count: int) -> list[Schema]:
    """`count` schemas of growing size, from 1 to `LARGEST`."""
    return [
        random_schema(random.Random(seed), 1 + LARGEST * seed // count) for seed in range(count)
    ]


def params_for(schemas: Sequence[Schema], max_tokens: int) -> list[SamplingParams]:
    """Parameters for each schema; `SETTINGS` take turns."""
    return [
        SamplingParams(
            guide=Guide("json_schema", json.dumps(schema)),
            max_tokens=max_tokens,
            seed=index,
            **SETTINGS[index % len(SETTINGS)],
        )
        for index, schema in enumerate(schemas)
    ]


def fault(schema: Schema, result: Result) -> str | None:
    """What is wrong with an output, or None; one that was cut at max_tokens has no faults."""
    if result.finish_reason == "length":
        return None
    if result.finish_reason != "stop":
        return f"{result.finish_reason}: {result.stop_reason}"
    try:
        jsonschema.validate(json.loads(result.text), schema, jsonschema.Draft202012Validator)
    except (ValueError, jsonschema.ValidationError) as error:
        return f"{result.text!r}: {str(error).splitlines()[0]}"
    return None


def mask_times(
    idlm: Idlm, params: Sequence[SamplingParams], results: Sequence[Result]
) -> dict[str, float]:
    """Microseconds for the masks along the outputs, and milliseconds to compile a guide."""
    guides, masks, compiled = Guides(idlm), [], []
    guides.matcher(Guide("json_object"))
    for requested, result in zip(params, results, strict=True):
        assert requested.guide is not None
        started = time.perf_counter()
        matcher = guides.matcher(requested.guide)
        compiled.append(time.perf_counter() - started)
        for token in result.token_ids:
            started = time.perf_counter()
            matcher.allowed()
            masks.append(time.perf_counter() - started)
            matcher.advance([token])
    at = statistics.quantiles(masks, n=100)
    return {
        "mask_us_mean": statistics.mean(masks) * 1e6,
        "mask_us_p50": at[49] * 1e6,
        "mask_us_p99": at[98] * 1e6,
        "compile_ms_mean": statistics.mean(compiled) * 1e3,
        "compile_ms_worst": max(compiled) * 1e3,
    }


def compare(
    idlm: Idlm, count: int, max_tokens: int, plans: Sequence[tuple[int, str]]
) -> dict[str, Any]:
    """Run all schemas by each plan; the first plan is AR."""
    requested = schemas(count)
    params = params_for(requested, max_tokens)
    report: dict[str, Any] = {
        "schemas": count,
        "characters": [len(each.guide.text) for each in params if each.guide],
    }
    runs: list[list[Result]] = []
    for stride, branches in plans:
        llm = LLM(idlm, stride=stride, branches=branches)
        started = time.perf_counter()
        runs.append(llm.generate([PROMPT] * count, params))
        seconds = time.perf_counter() - started
        tokens, forwards = (
            sum(values)
            for values in zip(*((len(r.token_ids), r.forwards) for r in runs[-1]), strict=True)
        )
        report[f"stride {stride} {branches}"] = {
            "tokens": tokens,
            "tpf": tokens / forwards,
            "seconds": seconds,
        }
    report["ended"] = dict(Counter(result.finish_reason for result in runs[0]))
    faults = [fault(schema, result) for schema, result in zip(requested, runs[0], strict=True)]
    report["faults"] = [f"{index}: {text}" for index, text in enumerate(faults) if text is not None]
    report["differ"] = [
        index
        for index, (ar, *others) in enumerate(zip(*runs, strict=True))
        if any(other.token_ids != ar.token_ids for other in others)
    ]
    return report | mask_times(idlm, params, runs[0])


def main() -> int:
    """Exit status 1 if an output is invalid or ISD differs from AR."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="nano")
    parser.add_argument("--adapter")
    parser.add_argument("--schemas", type=int, default=500)
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    idlm = load(args.model, adapter=args.adapter, dtype="float64")
    report = {"model": idlm.name, "dtype": "float64", "environment": environment()}
    report |= compare(idlm, args.schemas, args.max_tokens, [(1, "all"), (4, "all"), (4, "chain")])
    sizes = report.pop("characters")
    report["characters"] = {
        "smallest": min(sizes),
        "median": statistics.median(sizes),
        "largest": max(sizes),
    }
    text = json.dumps(report, indent=1, ensure_ascii=False)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")
    return int(bool(report["faults"] or report["differ"]))


if __name__ == "__main__":
    raise SystemExit(main())

"""docs/families.md, from the result of `python -m benchmarks.families`."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.pages.benchmarks_page import RESULTS
from benchmarks.pages.tables import markdown

RESULT = "families.json"
HEAD = """# Families of models

Written by `make families`, which tries every causal language model of transformers {transformers} on a tiny random
checkpoint: {loads} of {all} families load. What decides is what a model needs, not its name:

* its layers ask transformers' attention interface for their attention, or compute it in a way that can be routed there;
* each layer writes its keys once, in order, and all layers have the same heads;
* a layer says its own sliding window, soft cap and sinks to the interface, and the window is that of the config;
* in float64 its logits are those of transformers' own attention, whatever its head does to them;
* up to the end of the context, what was computed once stays as it is: rotary embeddings that change with the length
  (`longrope`) need `--max-model-len`.

`idlm inspect MODEL` tries a small random model of the same config, so it says what `load` does, without reading the
weights.
"""
LOADED = """
## What loads

Greedy and seeded ISD give AR's tokens, and greedy AR those of transformers' `generate`, to the end of the context, in
float64. A gated LoRA on all linear layers (its targets) is trained for two steps, saved as a PEFT folder and loaded:
greedy and seeded, ISD and AR with it give the tokens of the base. Experts have no linear layers of their own in
transformers, so they stay as they are.
"""
FULL = "only with a window that is not below the context"
DETAILS = r" \(\w*experts \d+\)| by [\d.]+ of [\d.]+| in the order \[.*\]|^\(model_type '[\w-]+'\) "
"""Parts of a reason that are the model's own."""
REFUSED = """
## What is refused

With the reason that `load` gives.
"""


def render() -> str:
    return "\n".join(_page(json.loads((RESULTS / RESULT).read_text())))


def _page(report: Mapping[str, Any]) -> Iterator[str]:
    families = report["families"]
    good = [row for row in families if row.get("loads")]
    yield HEAD.format(
        transformers=report["environment"]["transformers"], loads=len(good), all=len(families)
    )
    yield LOADED
    rows = [
        (f"`{row['family']}`", f"`{row['class']}`", row["tokens"], _verdict(row), _adapter(row))
        for row in good
    ]
    yield from markdown(("family", "class", "tokens", "equal", "equal with a gated LoRA"), rows)
    yield REFUSED
    yield from markdown(
        ("reason", "families"),
        ((why, ", ".join(names)) for why, names in sorted(_reasons(families).items())),
    )
    yield ""


def _verdict(row: Mapping[str, Any]) -> str:
    verdict = _equal({key: value for key, value in row.items() if not key.startswith("lora")})
    return f"{verdict}; {FULL}" if "window" in row else verdict


def _adapter(row: Mapping[str, Any]) -> str:
    if "lora_reason" in row:
        return f"**not: {row['lora_reason']}**"
    verdict = _equal({key: value for key, value in row.items() if key.startswith("lora")})
    return f"{verdict}: {', '.join(row['lora_targets'])}"


def _equal(checks: Mapping[str, Any]) -> str:
    unequal = [
        key.replace("_", " ") for key, value in checks.items() if "_is_" in key and not value
    ]
    return f"**not: {', '.join(unequal)}**" if unequal else "yes"


def _reasons(families: list[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The families that do not load, by reason."""
    found = defaultdict(list)
    for row in families:
        if not row.get("loads"):
            reason = row["reason"].split("; ")[0].replace(f" {row['class']}", "")
            reason = re.sub(DETAILS, "", reason)
            found[" ".join(reason.split()).replace("|", "/")].append(f"`{row['family']}`")
    return found

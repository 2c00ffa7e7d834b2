"""The length of a run: stages of steps, epochs or tokens, in steps; and runs that are made longer.

An epoch is as many texts as there are, and tokens are those of whole texts, prompt and response. A
stage ends with the step that reaches its length.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

from idlm.errors import InputError
from idlm.training.config import StageConfig, TrainConfig
from idlm.training.plan import Step

LENGTHS = ("steps", "epochs", "tokens")
"""Keys of a stage, of which it has one."""


def in_steps(config: TrainConfig, documents: int, plan: Iterable[Step]) -> TrainConfig:
    """The config with the steps of each stage.

    Args:
        documents: of an epoch.
        plan: the steps in their order, without an end.
    """
    left = iter(plan)
    stages = [replace(stage, steps=_steps(stage, documents, left)) for stage in config.stages]
    return replace(config, stages=tuple(stages))


def _steps(stage: StageConfig, documents: int, plan: Iterator[Step]) -> int:
    if stage.steps is not None:
        return sum(1 for _ in islice(plan, stage.steps))
    steps = done = 0
    goal = stage.tokens or (stage.epochs or 0) * documents
    while done < goal:
        step = next(plan)
        done += step.tokens if stage.tokens else step.documents
        steps += 1
    return steps


def needs_texts(config: TrainConfig) -> bool:
    """Whether the number of steps depends on the texts."""
    return any(stage.steps is None for stage in config.stages)


def shown(config: TrainConfig) -> str:
    """The length of a run, for its log; `config` has steps."""
    parts = []
    for stage in config.stages:
        other = next(
            (f" ({getattr(stage, k):g} {k})" for k in LENGTHS[1:] if getattr(stage, k)), ""
        )
        parts.append(f"{stage.steps}{other}")
    total = f"{config.steps} steps"
    return total if len(parts) == 1 and "(" not in parts[0] else f"{total}: {' + '.join(parts)}"


def extended(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """What is longer in the config `new` of a run that goes on; None if its length is the same.

    Only the last stage can be longer. Both are plain values, as in YAML.

    Raises:
        InputError: the last stage is shorter, or its length has another unit.
    """
    before, after = ({k: tree["stages"][-1].get(k) for k in LENGTHS} for tree in (old, new))
    if len(old["stages"]) != len(new["stages"]) or before == after:
        return None  # other differences are refused elsewhere
    where = f"stages.{len(new['stages']) - 1}"
    key = next(k for k in LENGTHS if after[k] is not None)
    if before[key] is None or after[key] < before[key]:
        was = next(f"{k}: {v}" for k, v in before.items() if v is not None)
        raise InputError(
            f"cannot resume: {where} had {was}, now it has {key}: {after[key]}; "
            "a run that goes on may only be longer, in the same unit"
        )
    return f"{where}.{key} was {before[key]}, now it is {after[key]}"


def of_old_length(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`new` with the length of the last stage of `old`, to compare the rest."""
    *stages, last = new["stages"]
    lengths = {k: old["stages"][-1].get(k) for k in LENGTHS}
    return new | {"stages": [*stages, last | lengths]}


def refuse_endless(config: TrainConfig, endless: bool) -> None:
    """Refuse a length in texts where the source of texts has no end."""
    if endless and config.data.examples is None and needs_texts(config):
        raise InputError(
            f"data.examples is missing; data.source: {config.data.source} has no end, "
            "so a stage of epochs or tokens needs to know how many texts there are"
        )

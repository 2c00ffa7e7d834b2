"""Reads and checks a training config.

An unknown key is refused with the nearest known key, and a value of the wrong type with the type
expected. `--a.b=c` on the command line overrides the key b of section a; items of lists have
numbers: `--stages.0.steps=5`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from idlm.errors import InputError
from idlm.training.config import UNUSED, DataConfig, StageConfig, TrainConfig, WeightedPath
from idlm.training.ranges import check_ranges
from idlm.training.strict import as_tree, build, override_key, read_yaml


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> TrainConfig:
    """Read a YAML file and apply `--a.b=c` overrides.

    Raises:
        InputError: the file is missing or not YAML, or a key or value in it or in an override is
            wrong.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot read the config {str(path)!r} ({error}); give the path of a YAML file"
        ) from None
    tree = read_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise InputError(
            f"the config {str(path)!r} is a {type(tree).__name__}, not a mapping of keys; "
            "see configs/"
        )
    for override in overrides:
        override_key(tree, override)
    return parse_config(tree)


def parse_config(tree: dict[str, Any]) -> TrainConfig:
    """Convert plain values to a validated config.

    Raises:
        InputError: as in `load_config`.
    """
    config: TrainConfig = build(TrainConfig, tree, "")
    check_ranges(as_tree(config))
    _check(config)
    return config


def _check(config: TrainConfig) -> None:
    """Checks that concern several keys; each message names the key to change."""
    if not config.stages:
        raise InputError("stages is empty; it must have at least 1")
    for number, stage in enumerate(config.stages):
        _check_length(stage, f"stages.{number}")
        _check_loss(stage, f"stages.{number}")
    for key, text in (("output_dir", config.output_dir), ("model.path", config.model.path)):
        if text == "":
            raise InputError(f"{key} is empty; give the path of a folder")
    if config.lora.targets == ():
        raise InputError("lora.targets is empty; name linear layers, or write all-linear")
    if config.eval_decode and config.objective != "idlm":
        raise InputError(
            f"eval_decode is {config.eval_decode}; objective: {config.objective} has no drafts, "
            "leave it out"
        )
    if (config.model.path is None) == (config.model.architecture is None):
        raise InputError("model.path and model.architecture: give exactly one of the two")
    _check_data(config.data)
    if config.objective != "idlm" and config.head.kind != "none":
        raise InputError(
            f"head.kind is {config.head.kind!r}; objective: {config.objective} has no drafts, "
            "leave it out"
        )
    if config.objective != "idlm" and config.method == "lora":
        raise InputError(
            f"method is 'lora'; objective: {config.objective} trains all weights, set method: full"
        )
    if config.denoises:
        _check_diffusion(config)
    if config.method == "full" and config.model.dtype == "bfloat16":
        raise InputError(
            "model.dtype is 'bfloat16'; method: full trains the weights, which bfloat16 rounds "
            "away: set bf16: true, which computes in bfloat16 and keeps them in float32"
        )
    if config.method == "lora" and any(stage.lambda_ for stage in config.stages):
        raise InputError(
            "lambda has no effect with method: lora, whose clean rows are the frozen base; "
            "leave it out"
        )


def _check_diffusion(config: TrainConfig) -> None:
    """The noise of a baseline, and what it cannot do."""
    low, high = config.diffusion.noise
    if not 0 < low <= high <= 1:
        raise InputError(
            f"diffusion.noise is {[low, high]}; give two shares of 0 to 1, the smaller one first"
        )
    if config.packing:
        raise InputError(
            f"packing is true; objective: {config.objective} takes one text a row, leave it out"
        )


def _check_data(data: DataConfig) -> None:
    """The paths and settings of a source."""
    if data.source == "jsonl" and not data.path:
        raise InputError("data.path is missing; data.source: jsonl needs the file's path")
    if data.source != "jsonl" and data.path:
        raise InputError(
            f"data.path is for data.source: jsonl, and it is {data.source}; leave one of them out"
        )
    paths = data.path if isinstance(data.path, tuple) else ()
    weighted = [path for path in paths if isinstance(path, WeightedPath)]
    if weighted and len(weighted) < len(paths):
        raise InputError("data.path has paths with a weight and without; give each one, or none")


def _check_length(stage: StageConfig, where: str) -> None:
    """A stage has one length, and it is more than nothing."""
    given = {key: getattr(stage, key) for key in ("steps", "epochs", "tokens")}
    given = {key: value for key, value in given.items() if value is not None}
    if len(given) != 1:
        names = " and ".join(given) or "no length"
        raise InputError(
            f"{where} has {names}; give one of steps, epochs and tokens, and null for others"
        )


def _check_loss(stage: StageConfig, where: str) -> None:
    """The weights of the loss are numbers that make sense, and each has an effect."""
    for key in ("ce", "kl", "tv", "lk"):
        value = getattr(stage, key)
        numbers = value if isinstance(value, tuple) else (value or 0.0,)
        if not all(0 <= number < math.inf for number in numbers):
            raise InputError(f"{where}.{key} is {as_tree(value)}; weights are finite and 0 or more")
    if stage.lk is not None and (stage.kl in UNUSED or stage.tv in UNUSED):
        raise InputError(
            f"{where}.lk mixes KL and TV; give {where}.kl and {where}.tv weights, as 1"
        )
    if not 0 < stage.depth_gamma < math.inf:
        raise InputError(f"{where}.depth_gamma is {stage.depth_gamma}; it must be above 0")
    if not 0 < stage.dpace_alpha <= 1:
        raise InputError(
            f"{where}.dpace_alpha is {stage.dpace_alpha}; it must be above 0 and at most 1"
        )

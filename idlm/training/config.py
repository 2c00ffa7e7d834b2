"""The training config: YAML, read strictly into dataclasses.

An unknown key is refused with the nearest known key, and a value of the wrong type with the type
expected. `--a.b=c` on the command line overrides the key b of section a; items of lists have
numbers: `--stages.0.steps=5`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from idlm.errors import InputError
from idlm.training.losses import RowWeights
from idlm.training.strict import as_tree, build, override_key, read_yaml

__all__ = ["TrainConfig", "as_tree", "load_config", "parse_config"]


UNUSED = (0.0, (0.0, 0.0))
"""Weights of a term that a stage does not have."""


@dataclass(frozen=True)
class ModelConfig:
    """The model to train: a checkpoint (`path`: folder, hub id or bundled name), or a new model of
    an `architecture`, whose keys are those of a transformers config.

    `max_model_len` limits the context, which models with longrope need.
    """

    path: str | None = None
    architecture: dict[str, Any] | None = None
    tokenizer: str = "nano"
    dtype: Literal["float32", "float64"] = "float32"
    max_model_len: int | None = None


@dataclass(frozen=True)
class LoraConfig:
    """The gated LoRA of `method: lora`.

    `targets` are names of linear layers, or `all-linear`: all but the output head and the routers
    of experts.
    """

    rank: int = 32
    alpha: float = 64.0
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"


@dataclass(frozen=True)
class DataConfig:
    """The texts to train on.

    `source` is `jsonl`: rows {prompt | messages, response} of `path`, a file (.jsonl or .parquet),
    a folder of files as `idlm distill` writes, a dataset's name, or a list of them; or `self`:
    responses that the model generates before the training; or the name of a registered source, such
    as `nano`, the project's own problems. The prompts of `self` are `prompts`: `bos` (the empty
    prompt), a registered source, or {prompt | messages} of what `path` may be. They are sampled
    with the defaults of the model's generation config; `temperature` replaces its own. `examples`
    limits the rows; `skip_bad_rows` counts broken ones of `jsonl` instead of stopping at the first.
    Of `jsonl` and `self` the last `held_out` rows are held out. Of messages the last answer is
    trained on, or each of them if `answers` is `all`.
    """

    source: str = "nano"
    path: str | tuple[str, ...] | None = None
    prompts: str = "bos"
    examples: int | None = None
    held_out: int = 64
    seed: int = 0
    temperature: float | None = None
    max_tokens: int = 256
    max_length: int | None = None
    skip_bad_rows: bool = False
    answers: Literal["last", "all"] = "last"


@dataclass(frozen=True)
class StageConfig:
    """A stretch of the training: its length, the block size b and the weights of the loss.

    The loss of a MASK row with the law q is `ce` CE + `kl` KL(p || q) + `tv` TV(p, q), where p is
    the law of the clean row that predicts the same token. A weight is a number, or [start, end]: it
    changes linearly from the stage's first step to its last. With `lk` (LK losses, arXiv
    2602.23881, take 3) the weight of KL is times exp(-lk a) and that of TV times 1 - exp(-lk a),
    where a is the acceptance rate in the step before, 0 at first.

    The weight of a row at draft depth k is 1 (`uniform`), exp(-(k-1) / `depth_gamma`)
    (`exponential`), or that of D-PACE (`dpace`, arXiv 2605.18810), the sum over j >= k of the
    chance that all drafts up to j are accepted, smoothed by `dpace_alpha`.

    To this is added `lambda` CE_clean, a number or `auto` (CE / CE_clean of the step before, 1 at
    first). Its default is 0.2 for a full fine-tune, and 0 for a gated LoRA, whose clean rows are
    frozen.

    Attributes:
        steps: the length in optimizer steps.
        epochs: the length in passes over the training texts, instead of `steps`.
        tokens: the length in tokens of training texts, instead of `steps`.
    """

    steps: int | None = None
    epochs: float | None = None
    tokens: int | None = None
    block_size: int = 1
    ce: float | tuple[float, float] = 1.0
    kl: float | tuple[float, float] = 0.0
    tv: float | tuple[float, float] = 0.0
    lk: float | None = None
    depth_weights: Literal["uniform", "exponential", "dpace"] = "uniform"
    depth_gamma: float = 4.0
    dpace_alpha: float = 0.5
    lambda_: float | Literal["auto"] | None = None

    @property
    def soft(self) -> bool:
        """Whether the stage has KL or TV."""
        return self.kl not in UNUSED or self.tv not in UNUSED

    def row_weights(self, progress: float, acceptance: float) -> RowWeights:
        """The weights at `progress` (0 at the first step, 1 at the last), after a step with this
        acceptance rate."""
        ce, kl, tv = (
            weight if isinstance(weight, float) else weight[0] + progress * (weight[1] - weight[0])
            for weight in (self.ce, self.kl, self.tv)
        )
        if self.lk is not None:
            share = math.exp(-self.lk * acceptance)
            kl, tv = kl * share, tv * (1 - share)
        return RowWeights(ce, kl, tv, self.depth_weights, self.depth_gamma, self.dpace_alpha)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, or Muon for the hidden matrices and AdamW for the rest; one schedule over all stages.

    `wsd` warms up, stays constant, and falls linearly to 0 over the last share `decay` of the
    steps.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    schedule: Literal["linear", "cosine", "wsd"] = "cosine"
    decay: float = 0.6
    warmup: int = 50
    grad_clip: float = 1.0


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    `batch_size` counts sequences for each forward, `accumulation` forwards for each step and rank.
    `resume` continues from the newest checkpoint in `output_dir`, or starts from the beginning if
    there is none; the last stage may be longer than before.

    Attributes:
        warm_start: a folder to start from: an adapter of the same base and shape, or a full model
            for a full fine-tune.
        eval_decode: held-out prompts that each evaluation also decodes, with AR and with ISD.
        keep_checkpoints: how many of the newest checkpoints are kept; the best one is kept too.
        report_to: where the figures go besides the run's folder.
    """

    output_dir: str
    stages: tuple[StageConfig, ...]
    objective: Literal["idlm", "ar"] = "idlm"
    method: Literal["lora", "full"] = "lora"
    random_phase: bool = True
    seed: int = 0
    resume: bool = False
    device: Literal["auto", "cpu"] = "auto"
    threads: int | None = None
    bf16: bool = False
    batch_size: int = 16
    accumulation: int = 1
    log_steps: int = 10
    eval_steps: int = 100
    save_steps: int = 100
    warm_start: str | None = None
    eval_decode: int = 0
    keep_checkpoints: int = 2
    report_to: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run, whose stages have steps: see `training.length`."""
        return sum(stage.steps or 0 for stage in self.stages)

    def stage(self, step: int) -> StageConfig:
        """The stage of optimizer step `step`, counted from 0; after the end it is the last
        stage."""
        return self._place(step)[0]

    def row_weights(self, step: int, acceptance: float) -> RowWeights:
        """The weights of MASK rows at optimizer step `step`, after a step with this acceptance
        rate."""
        stage, done = self._place(step)
        return stage.row_weights(min(done / max((stage.steps or 0) - 1, 1), 1.0), acceptance)

    def _place(self, step: int) -> tuple[StageConfig, int]:
        """The stage of step `step`, and the steps that it has taken before."""
        for stage in self.stages:
            steps = stage.steps or 0
            if step < steps:
                return stage, step
            step -= steps
        return self.stages[-1], self.stages[-1].steps or 0

    def lambda_of(self, stage: StageConfig) -> float | Literal["auto"]:
        """The weight of CE_clean in a stage."""
        if stage.lambda_ is not None:
            return stage.lambda_
        return 0.2 if self.method == "full" else 0.0


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
    _check(config)
    return config


def _check(config: TrainConfig) -> None:
    """Checks that concern several keys; each message names the key to change."""
    positive = {
        "stages": len(config.stages),
        "stages.*.block_size": min((s.block_size for s in config.stages), default=0),
        "batch_size": config.batch_size,
        "accumulation": config.accumulation,
        "log_steps": config.log_steps,
        "eval_steps": config.eval_steps,
        "save_steps": config.save_steps,
        "keep_checkpoints": config.keep_checkpoints,
        "model.max_model_len": 1
        if config.model.max_model_len is None
        else config.model.max_model_len,
        "data.held_out": config.data.held_out,
        "data.max_tokens": config.data.max_tokens,
        "threads": 1 if config.threads is None else config.threads,
        "data.examples": 1 if config.data.examples is None else config.data.examples,
        "data.max_length": 2 if config.data.max_length is None else config.data.max_length - 1,
    }
    for number, stage in enumerate(config.stages):
        _check_length(stage, f"stages.{number}")
        _check_loss(stage, f"stages.{number}")
    for key, value in positive.items():
        if value < 1:
            raise InputError(
                f"{key} is too small; it must be at least {2 if key == 'data.max_length' else 1}"
            )
    if not (config.optimizer.lr > 0 and config.optimizer.lr < float("inf")):
        raise InputError(f"optimizer.lr is {config.optimizer.lr}; it must be a positive number")
    if not 0 < config.optimizer.decay <= 1:
        raise InputError(
            f"optimizer.decay is {config.optimizer.decay}; "
            "it is a share of the steps, above 0 and up to 1"
        )
    if config.eval_decode < 0 or (config.eval_decode and config.objective == "ar"):
        raise InputError(
            f"eval_decode is {config.eval_decode}; it must be 0 or more, and 0 with objective: ar"
        )
    if (config.model.path is None) == (config.model.architecture is None):
        raise InputError("model.path and model.architecture: give exactly one of the two")
    if config.data.source == "jsonl" and not config.data.path:
        raise InputError("data.path is missing; data.source: jsonl needs the file's path")
    if config.data.temperature is not None and config.data.temperature < 0:
        raise InputError(f"data.temperature is {config.data.temperature}; it must be 0 or more")
    if config.objective == "ar" and config.method == "lora":
        raise InputError("method is 'lora'; objective: ar trains all weights, set method: full")
    if config.method == "lora" and any(stage.lambda_ for stage in config.stages):
        raise InputError(
            "lambda has no effect with method: lora, whose clean rows are the frozen base; "
            "leave it out"
        )


def _check_length(stage: StageConfig, where: str) -> None:
    """A stage has one length, and it is more than nothing."""
    given = {key: getattr(stage, key) for key in ("steps", "epochs", "tokens")}
    given = {key: value for key, value in given.items() if value is not None}
    if len(given) != 1:
        names = " and ".join(given) or "no length"
        raise InputError(
            f"{where} has {names}; give one of steps, epochs and tokens, and null for others"
        )
    ((key, value),) = given.items()
    if not 0 < value < math.inf:
        raise InputError(f"{where}.{key} is {value}; it must be above 0")


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

"""The training config: its keys and what follows from them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from idlm.training.losses import RowWeights

UNUSED = (0.0, (0.0, 0.0))
"""Weights of a term that a stage does not have."""


@dataclass(frozen=True)
class ModelConfig:
    """The model to train: a checkpoint, or a new model of an architecture.

    Attributes:
        path: of a checkpoint: a folder, a hub id or a bundled name.
        architecture: of a new model instead: the keys of a transformers config.
        tokenizer: of a new model: a registered source's, such as `nano`, or a folder or hub id.
        dtype: of the weights in memory; bfloat16 is for a frozen base, whose adapter is trained in
            float32.
        max_model_len: limits the context, which models with longrope need.
    """

    path: str | None = None
    architecture: dict[str, Any] | None = None
    tokenizer: str = "nano"
    dtype: Literal["bfloat16", "float32", "float64"] = "float32"
    max_model_len: int | None = None


@dataclass(frozen=True)
class LoraConfig:
    """The gated LoRA of `method: lora`.

    Attributes:
        rank: of the update of each layer.
        alpha: the update is scaled by `alpha` / `rank`.
        rslora: scale it by `alpha` / sqrt(`rank`) instead (rank-stabilised LoRA, arXiv 2312.03732).
        targets: names of linear layers, such as `[q_proj, v_proj]`; or `all-linear`, all but the
            output head and the routers of experts.
        entry: the layer, from 0, that MASK rows enter at; lower layers do not compute them, and
            have no adapter.
    """

    rank: int = 32
    alpha: float = 64.0
    rslora: bool = False
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    entry: int = 0


@dataclass(frozen=True)
class DiffusionConfig:
    """The noise of the baselines `objective: sdar` and `objective: llada`.

    Attributes:
        noise: the share of an answer's tokens that are noise, from the least to the most; drawn for
            each text.
        weight: of a text's loss: `inverse`, one over that share, as in SDAR and LLaDA; or `none`,
            with `noise: [0.3, 0.8]` as in LLaDA-2.
        random: the share of the noise that are random tokens in the place of MASK, which teaches
            the editing of LLaDA-2.1.
        fill: of `llada`: texts are filled with the end token to at least this many tokens.
    """

    noise: tuple[float, float] = (0.001, 1.0)
    weight: Literal["inverse", "none"] = "inverse"
    random: float = 0.0
    fill: int = 0


@dataclass(frozen=True)
class WeightedPath:
    """A source of rows: what a path may be, and its share of the draws among the others'."""

    path: str
    weight: float


@dataclass(frozen=True)
class HeadConfig:
    """The draft head, which gives each MASK row the token before it; see docs/architecture.md.

    Attributes:
        kind: `markov`, `selector` or `mlp`.
        size: the inner size; of `markov` the rank.
        top: the number of candidates that it corrects for each draft.
    """

    kind: Literal["none", "markov", "selector", "mlp"] = "none"
    size: int = 256
    top: int = 64


@dataclass(frozen=True)
class DataConfig:
    """The texts to train on.

    Attributes:
        source: `jsonl`: the rows of `path`. `self`: responses that the model writes before the
            training. Or a registered source, such as `nano`, the project's own problems.
        path: of `jsonl`: a file (.jsonl or .parquet), a folder of files as `idlm distill` writes, a
            dataset's name, or a list of them. A list of {path, weight} draws from each by its
            weight, whatever its size.
        prompts: of `self`: `bos` (the empty prompt), a registered source, or what `path` may be.
        examples: the most rows; with weights, of each path.
        held_out: rows that are measured and not trained on; of `jsonl` and `self` the last ones,
            with weights the last of each path by its share.
        seed: of the problems of a registered source, and of the responses of `self`.
        temperature: of the responses of `self`, in the place of that of the model's generation
            config.
        max_tokens: of each response of `self`.
        max_length: the most tokens of a text, or with `packing` of a row of texts; a longer text is
            cut. null: 4096, or the model's context if that is shorter.
        skip_bad_rows: count broken rows instead of stopping at the first.
        answers: of messages: train on the last answer, or on all of them.
    """

    source: str = "nano"
    path: str | tuple[str | WeightedPath, ...] | None = None
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
        block_size: b, the MASK rows of a block; it serves strides up to b + 1.
        ce: the weight of cross entropy.
        kl: the weight of KL(p, q).
        tv: the weight of the total variation, which is 1 - the acceptance rate.
        lk: mixes KL and TV by the acceptance rate.
        depth_weights: how a row's weight depends on its draft depth.
        depth_gamma: of `exponential`.
        dpace_alpha: of `dpace`.
        lambda_: the weight of the AR loss on clean rows; full fine-tune only.
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
    """One optimizer and one schedule over all stages.

    Attributes:
        name: AdamW; or Muon for the hidden matrices and AdamW for the rest.
        lr: the learning rate after the warm-up; one for both.
        betas: of AdamW.
        weight_decay: of matrices; norms and biases have none.
        schedule: down to 0: `linear`, `cosine`, or `wsd`: constant, then linear at the end.
        decay: of `wsd`: the share of the steps in which it falls.
        warmup: steps in which the rate rises from 0.
        grad_clip: the largest norm of the gradient of a step.
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

    Attributes:
        output_dir: the folder of the run; the result is in its `final`.
        stages: one after the other.
        objective: convert to an I-DLM, train an AR model, or one of the baselines `sdar` and
            `llada` (docs/methods.md).
        method: a gated LoRA on the frozen model, or all weights.
        random_phase: each text's blocks begin at a random place, so that every position is trained
            at every depth.
        phases: how often the MASK rows of a text are computed, each time with other blocks, over
            one clean half; at most b.
        seed: of the order of the texts, the phases and the first weights.
        resume: go on from the newest checkpoint in `output_dir`, if there is one; the last stage
            may be longer than before.
        device: `auto` is a GPU if there is one.
        parallel: where a launcher starts several processes: each holds the whole model (`ddp`), or
            a part of every weight, gradient and optimizer state (`fsdp`); the arithmetic is the
            same, but for bfloat16.
        threads: of PyTorch on a CPU; null: its default.
        bf16: compute in bfloat16; the weights stay as `model.dtype` says. `fsdp` gathers them in
            bfloat16 and sums gradients in float32.
        activation_checkpointing: compute each layer again for its gradient, which takes less memory
            and a third more time.
        batch_size: the most rows of a forward; 16 if `batch_tokens` is null too.
        batch_tokens: the most tokens of a forward, with padding.
        packing: put several whole texts into a row; none sees another.
        accumulation: forwards of a step, on each rank.
        log_steps: steps between two lines of the log.
        eval_steps: steps between two measurements on held-out texts.
        save_steps: steps between two checkpoints.
        warm_start: a folder to start from: an adapter of the same base and shape, or a full model
            for a full fine-tune.
        eval_decode: held-out prompts that each evaluation also decodes, with AR and with ISD.
        keep_checkpoints: how many of the newest checkpoints are kept; the best one is kept too.
        report_to: where the figures go besides the run's folder.
        model: the model.
        lora: the adapter.
        head: the draft head.
        diffusion: the noise of `sdar` and `llada`.
        data: the texts.
        optimizer: the optimizer.
    """

    output_dir: str
    stages: tuple[StageConfig, ...]
    objective: Literal["idlm", "ar", "sdar", "llada"] = "idlm"
    method: Literal["lora", "full"] = "lora"
    random_phase: bool = True
    phases: int = 1
    seed: int = 0
    resume: bool = False
    device: Literal["auto", "cpu"] = "auto"
    parallel: Literal["ddp", "fsdp"] = "ddp"
    threads: int | None = None
    bf16: bool = False
    activation_checkpointing: bool = False
    batch_size: int | None = None
    batch_tokens: int | None = None
    packing: bool = False
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
    head: HeadConfig = field(default_factory=HeadConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    @property
    def denoises(self) -> bool:
        """Whether the objective is that of a baseline."""
        return self.objective in ("sdar", "llada")

    @property
    def batch_rows(self) -> int | None:
        """The most rows of a forward; None: no limit but that of the tokens."""
        return 16 if self.batch_size is None and self.batch_tokens is None else self.batch_size

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

"""The training run: `transformers.Trainer` with the objective, batches that resume exactly, and a stop at NaN."""

from __future__ import annotations

import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from idlm.errors import InputError
from idlm.training.callbacks import Report
from idlm.training.config import StageConfig, TrainConfig
from idlm.training.data import Corpus, Draws, as_texts, collate, corpus
from idlm.training.measure import measure
from idlm.training.objective import Objective, Terms, Wanted, clean_rows, mask_rows
from idlm.training.optimizer import MuonAdamW
from idlm.training.setup import STAGING, base_model, prepare_folder, trainee, training_arguments

WEIGHTS = "trainable.safetensors"
"""The file of a checkpoint that holds what is trained, and nothing frozen."""

KEPT_CHECKPOINTS = 2


class NotFinite(InputError):
    """The loss or the gradient became NaN or infinite; the weights are still those before the step."""


class IdlmTrainer(Trainer):
    """`Trainer` on `Objective`: its loop, schedules and checkpoints, our loss, batches and measurements."""

    objective: Objective
    loss_is_scaled_for_ga = True  # compute_loss divides by the tokens of the whole step

    def __init__(self, config: TrainConfig, args: TrainingArguments, objective: Objective, data: Corpus) -> None:
        self.config = config
        self.data = data
        self._writing: Path | None = None
        self.objective = objective
        self._examples: list[int] = []
        self._step_sums = torch.zeros(5, dtype=torch.float64)
        self._log_sums = torch.zeros(5, dtype=torch.float64)
        batch = config.batch_size * config.accumulation * args.world_size
        super().__init__(
            model=objective,
            args=args,
            data_collator=collate,
            train_dataset=Draws(data.training, config.steps * batch, batch, config.seed, config.random_phase),
            eval_dataset=data.held_out,
        )
        self.report = Report(Path(config.output_dir))
        self.remove_callback(PrinterCallback)
        self.add_callback(self.report)

    @property
    def current_stage(self) -> StageConfig:
        """The curriculum's stage of the running step."""
        return self.config.stage(self.state.global_step)

    # -- the loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        """Supervised MASK rows and clean rows of the whole step, over its micro-batches and all ranks: [2]."""
        counts = torch.zeros(2, device=device)
        for batch in batch_samples:
            _, is_row = mask_rows(batch["prompt"], batch["length"])
            rows = clean_rows(batch["prompt"], batch["length"], batch["tokens"].shape[1])
            counts += torch.stack([is_row.sum(), rows.sum()]).to(device)
        self._examples = [int(i) for batch in batch_samples for i in batch["example"]]
        return self.accelerator.reduce(counts)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a micro-batch as its share of the step's mean, so that the split does not change the gradient."""
        assert isinstance(num_items_in_batch, Tensor)
        stage = self.current_stage
        terms: Terms = model(as_texts(inputs), wanted(self.config, stage))
        noisy_rows, clean_rows_ = num_items_in_batch.clamp(min=1).unbind()
        weight = self.config.lambda_of(stage) if self.config.objective == "idlm" else 1.0
        factor = self.objective.balance if weight == "auto" else weight
        noisy = stage.hard * terms.noisy + stage.soft_weight * terms.soft
        loss = noisy / noisy_rows + factor * terms.clean / clean_rows_
        self._check(loss.detach(), "loss", [int(i) for i in inputs["example"]])
        self._step_sums[:3] += torch.stack(terms).detach().cpu()
        self._step_sums[3:] = num_items_in_batch.cpu() / self.args.world_size
        # data parallelism averages gradients over ranks, the division above already counted all of them
        return loss * self.args.world_size

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The Trainer's last call before the optimiser step: stop here if the gradient is not finite."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        self._check(grad_norm, "gradient norm", self._examples)
        self._finish_step()
        return grad_norm

    def _check(self, value: Any, what: str, examples: list[int]) -> None:
        """Raise NotFinite, naming the batch."""
        if math.isfinite(float(value)):
            return
        rows = ", ".join(self.data.training[i].row for i in examples)
        raise NotFinite(
            f"the {what} of step {self.state.global_step} is {float(value)} in the batch of examples {examples} "
            f"({rows}); the step was not taken: look at these rows or lower optimizer.lr"
        )

    def _finish_step(self) -> None:
        """Add the step's sums to the log's, and balance CE_clean against CE_noisy for the next step.

        The ratio is the last step's, over all its tokens: one taken per micro-batch would make the gradient depend on
        the split.
        """
        sums = self.accelerator.reduce(self._step_sums.to(self.args.device)).cpu()
        if sums[0] > 0 and sums[1] > 0:
            self.objective.balance.copy_((sums[0] / sums[3]) / (sums[1] / sums[4]))
        self._log_sums += sums
        self._step_sums.zero_()

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Add the terms of the loss to the Trainer's own entries."""
        if "loss" in logs and self._log_sums[4] > 0:
            rows = self._log_sums[[3, 4, 3]].clamp(min=1)
            means = (self._log_sums[:3] / rows).tolist()
            names = ("ce_noisy", "ce_clean", self.current_stage.soft)
            logs |= {name: mean for name, mean in zip(names, means, strict=True) if mean}
            self._log_sums.zero_()
        super().log(logs, start_time)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's AdamW, or Muon."""
        if self.config.optimizer.name == "muon" and self.optimizer is None:
            self.optimizer = MuonAdamW(model or self.objective, self.config.optimizer)
        return super().create_optimizer(model)

    # -- measurement

    def evaluate(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Held-out measurements at the running stage's block size, logged and returned."""
        metrics = measure(self.objective, self.data.held_out, self.config, self.state.global_step - 1)
        self.log({**metrics})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # -- checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._writing) if self._writing is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the checkpoint aside and rename it, so that one cut off by a kill never bears a checkpoint's name."""
        folder, name = Path(self.config.output_dir), f"checkpoint-{self.state.global_step}"
        self._writing = folder / STAGING
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._writing = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            shutil.rmtree(folder / name, ignore_errors=True)
            os.replace(folder / STAGING / name, folder / name)
            (folder / STAGING).rmdir()
            rotate_checkpoints(str(folder), KEPT_CHECKPOINTS)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save what is trained (a gated LoRA: its matrices and the MASK row) and the balance of the loss."""
        folder = Path(str(output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.detach().contiguous() for name, tensor in self._trained().items()}, folder / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Copy back what `_save` wrote."""
        saved, trained = load_file(Path(resume_from_checkpoint) / WEIGHTS), self._trained()
        if set(saved) != set(trained):
            raise InputError(f"checkpoint {resume_from_checkpoint!r} is of another model; name another output_dir")
        with torch.no_grad():
            for name, tensor in trained.items():
                tensor.copy_(saved[name])

    def _trained(self) -> dict[str, Tensor]:
        """Trained parameters and the loss's balance, by name."""
        trained = {name: p for name, p in self.objective.named_parameters() if p.requires_grad}
        return {**trained, "balance": self.objective.balance}


def wanted(config: TrainConfig, stage: StageConfig) -> Wanted:
    """The terms that a stage's loss has."""
    if config.objective == "ar":
        return Wanted(0, clean=True)
    return Wanted(stage.block_size, clean=config.lambda_of(stage) != 0, soft=stage.soft)


def train(config: TrainConfig) -> dict[str, Any]:
    """Run a config to its end and export the result to `output_dir/final`.

    Returns:
        what `idlm train --json` prints: the folder, steps, seconds, last loss, and the held-out measurements.

    Raises:
        InputError: bad config or data. NotFinite: the loss or gradient is NaN or infinite.
    """
    began = time.monotonic()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    args = training_arguments(config)
    folder = Path(config.output_dir)
    torch.manual_seed(config.seed)
    with args.main_process_first(local=False):
        checkpoint = prepare_folder(config)
        idlm = base_model(config.model)
        draws = config.steps * config.batch_size * config.accumulation * args.world_size
        data = corpus(config.data, idlm, draws, folder)
    student = trainee(config, idlm)
    plain = config.objective == "ar"
    trainer = IdlmTrainer(config, args, Objective(idlm, config.method == "full", emits_mask=plain), data)
    if data.cut:
        trainer.report.console.print(f"{data.cut} of {len(data.training)} responses were cut at the length limit")
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        trainer.report.close()
    if args.should_save:
        student.export(folder / "final", None if plain else config.stages[-1].block_size)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "output": str(folder / "final"),
        "steps": trainer.state.global_step,
        "seconds": round(time.monotonic() - began, 1),
        "loss": losses[-1] if losses else None,
        **measure(trainer.objective, data.held_out, config, config.steps),
    }

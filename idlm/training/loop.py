"""The training loop: `Trainer.train_step` is one optimizer step, from top to bottom.

Accelerate starts the processes, wraps the model for data parallelism and reduces over ranks. The
loss, the batches, the order of events and the checkpoints are here.
"""

from __future__ import annotations

import json
import math
import random
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from idlm.errors import InputError
from idlm.models.idlm_model import Idlm
from idlm.models.sources import read_json
from idlm.models.weights import whole
from idlm.training import checkpoint
from idlm.training.checkpoint import STATE, written_whole
from idlm.training.config import StageConfig, TrainConfig
from idlm.training.corpus import Corpus
from idlm.training.data import Batch, Phased
from idlm.training.decode import decode
from idlm.training.diffusion import DiffusionObjective
from idlm.training.keep import keep, score
from idlm.training.log import Log, Meter
from idlm.training.measure import measure
from idlm.training.objective import Objective, Terms, Wanted
from idlm.training.optimizer import learning_rate, optimizers
from idlm.training.processes import is_sharded, prepare, together, writing
from idlm.training.setup import Trainee
from idlm.training.state import Rows, State, Sums


class NotFinite(InputError):
    """The loss or the gradient is NaN or infinite; the weights are those before the step."""


class Trainer:
    """A run: the model, its data, and its state."""

    def __init__(
        self, config: TrainConfig, accelerator: Accelerator, student: Trainee, data: Corpus
    ) -> None:
        self.config, self.accelerator, self.student, self.data = config, accelerator, student, data
        self.folder = Path(config.output_dir)
        self.log = Log(self.folder, accelerator.is_main_process, accelerator.trackers)
        self.state = State()
        self.objective = objective(config, student.idlm).train()
        parts = optimizers(self.objective, config.optimizer)
        self.model, self.optimizers = prepare(accelerator, self.objective, parts)
        self.plan = data.plan(config, config.accumulation * accelerator.num_processes)
        self.texts = Phased(data.training, config.seed, config.random_phase)

    def run(self) -> dict[str, Any]:
        """Train to the last step; returns the held-out measurements."""
        config, state, measured = self.config, self.state, None
        meter = Meter(state.tokens)
        with self.log.running(state.step, config.steps) as show:
            while state.step < config.steps:
                began = perf_counter()
                figures = self.train_step()
                meter.seconds += perf_counter() - began
                show(state.step)
                if state.step % config.log_steps == 0:
                    self.report(figures, meter)
                last, better = state.step == config.steps, False
                if last or state.step % config.eval_steps == 0:
                    measured = self.evaluate()
                    better = state.improves(score(measured))
                if last or better or state.step % config.save_steps == 0:
                    self.save()
        return measured or self.measure()

    def train_step(self) -> dict[str, float]:
        """One optimizer step; returns its figures for the log.

        Raises:
            NotFinite: before the step is taken.
        """
        config, state, accelerator = self.config, self.state, self.accelerator
        stage = config.stage(state.step)
        # the seed is a function of the step, so that a resumed run has the same dropout
        torch.manual_seed(self.step_seed())

        # data: this rank's micro-batches, and the supervised rows of all ranks
        batches = self.micro_batches()
        rows = self.count(batches)

        # forward and backward. The losses of micro-batches and ranks add up to the loss of the
        # step, but data parallelism averages gradients over ranks: hence the factor
        losses, parts = [], []
        for i, batch in enumerate(batches):
            # whole gradients would not fit where the model is sharded: each forward's are reduced
            reduced = i == len(batches) - 1 or is_sharded(accelerator)
            with nullcontext() if reduced else accelerator.no_sync(self.model):
                with torch.autocast(accelerator.device.type, torch.bfloat16, config.bf16):
                    terms = self.model(batch.texts, wanted(config, state))
                loss = self.loss(terms, rows, stage)
                accelerator.backward(loss * accelerator.num_processes)
            losses.append(loss.detach())
            parts.append(Terms(*(term.detach().double() for term in terms)))

        # clip
        limit = config.optimizer.grad_clip if config.optimizer.grad_clip > 0 else math.inf
        norm = float(whole(accelerator.clip_grad_norm_(self.model.parameters(), limit)))

        # finite on all ranks, or stop
        mine = Terms(*(sum(part) for part in zip(*parts, strict=True)))
        total = accelerator.reduce(mine, reduction="sum")
        whole_loss = float(self.loss(total, rows, stage))
        if not (math.isfinite(whole_loss) and math.isfinite(norm)):
            raise self.not_finite(losses, norm, batches)

        # step
        rate = learning_rate(config.optimizer, state.step, config.steps)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()

        # log
        state.unreported.add(whole_loss, total, rows)
        state.count(self.plan.step(state.step))
        if total.ce > 0 and total.clean > 0:
            state.balance = float((total.ce / rows.noisy) / (total.clean / rows.clean))
        if total.tv > 0:
            state.acceptance = 1 - float(total.tv / rows.noisy)
        state.step += 1
        return {"grad_norm": norm, "learning_rate": rate}

    # -- the loss

    def loss(self, terms: Terms, rows: Rows, stage: StageConfig) -> Tensor:
        """The loss of a step, or for the terms of a micro-batch its part of that sum.

        `rows` are those of the whole step, over its micro-batches and all ranks. So the loss does
        not depend on the split.
        """
        weight = self.config.lambda_of(stage) if self.config.objective == "idlm" else 1.0
        clean = (self.state.balance if weight == "auto" else weight) * terms.clean
        return terms.noisy / max(rows.noisy, 1) + clean / max(rows.clean, 1)

    def not_finite(self, losses: list[Tensor], norm: float, batches: list[Batch]) -> NotFinite:
        """The error for a step: the first loss of a micro-batch that is not finite, or the norm of
        the gradient; the same on all ranks, which all call this."""
        bad = [
            (f"loss of step {self.state.step} is {float(loss)}", batch.indices)
            for loss, batch in zip(losses, batches, strict=True)
            if not math.isfinite(float(loss))
        ]
        bad = gather_object(bad)
        if not bad:
            mine = [index for batch in batches for index in batch.indices]
            bad = [(f"gradient norm of step {self.state.step} is {norm}", gather_object(mine))]
        what, examples = bad[0]
        rows = ", ".join(self.data.training[i].row for i in examples)
        return NotFinite(
            f"the {what} in the batch of examples {examples} ({rows}); the step was not taken: "
            "look at these rows or lower optimizer.lr"
        )

    # -- the batches

    def micro_batches(self) -> list[Batch]:
        """This rank's batches of the current step, on its device."""
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        mine = self.plan.step(self.state.step).batches[rank::ranks]
        return [send_to_device(self.texts.batch(rows), self.accelerator.device) for rows in mine]

    def count(self, batches: list[Batch]) -> Rows:
        """Supervised rows of the whole step, as its objective counts them."""
        terms = wanted(self.config, self.state)
        mine = torch.stack([self.objective.count(batch.texts, terms) for batch in batches]).sum(0)
        rows = self.accelerator.reduce(mine, reduction="sum")
        return Rows(*rows.tolist())

    def step_seed(self) -> int:
        """The seed of this rank's current step."""
        name = f"{self.config.seed}/step/{self.state.step}/{self.accelerator.process_index}"
        return random.Random(name).getrandbits(63)

    # -- reports and checkpoints

    @property
    def stage(self) -> StageConfig:
        """The stage of the last step that was taken."""
        return self.config.stage(max(self.state.step - 1, 0))

    def report(self, more: dict[str, float], meter: Meter) -> None:
        """Log the means since the last report, and `more`."""
        state, means = self.state, self.state.unreported.means()
        entry = {"step": state.step, "loss": means.pop("loss")}
        speed = meter.read(state.tokens, self.accelerator.device)
        self.log.write(entry | more | means | {"tokens": state.tokens} | speed)
        state.unreported = Sums()

    def measure(self) -> dict[str, Any]:
        """Held-out measurements at the block size of the current stage."""
        step = self.state.step - 1
        measured = measure(self.objective, self.data.held_out, self.config, step, self.accelerator)
        if isinstance(self.model, FSDPModule):
            self.model.reshard()  # a forward leaves the outermost weights whole for a backward
        return measured

    def evaluate(self) -> dict[str, Any]:
        """Measure on the held-out texts, decode some of their prompts, and log the figures."""
        measured, held_out = self.measure(), self.data.held_out
        examples = [held_out[at] for at in range(min(self.config.eval_decode, len(held_out)))]
        if examples:
            prompts = [example.tokens[: example.answers[0][0]] for example in examples]
            idlm, block_size = self.student.idlm, self.stage.block_size
            measured |= decode(idlm, prompts, block_size, self.accelerator)
        self.log.write({"step": self.state.step, **measured})
        return measured

    def save(self) -> None:
        """Write a checkpoint, and remove all but the newest ones and the best; all ranks take part.

        Raises:
            InputError: it cannot be written.
        """
        new = checkpoint.checkpoint_of(self.folder, self.state.step)
        with written_whole(new, self.accelerator) as folder:
            self.export(folder)
            checkpoint.save_optimizers(self.objective, self.optimizers, folder)
            with together(self.accelerator, str(new)):
                if self.accelerator.is_main_process:
                    state = json.dumps(asdict(self.state) | {"texts": self.plan.bounds.texts})
                    (folder / STATE).write_text(state, encoding="utf-8")
        self.keep()
        self.accelerator.wait_for_everyone()

    def load(self, folder: Path) -> None:
        """Restore the model, the optimizers and the state from a checkpoint.

        Raises:
            InputError: it is of another model, or its steps had another number of texts.
        """
        saved = read_json(folder / STATE)
        texts, now = saved.pop("texts"), self.plan.bounds.texts
        if texts != now:
            raise InputError(
                f"cannot resume: a step took {texts}, now it takes {now}; "
                "change batch_size, batch_tokens, accumulation or the number of processes"
            )
        self.student.load(folder)
        checkpoint.load_optimizers(self.objective, self.optimizers, folder)
        self.state = State(**saved | {"unreported": Sums(**saved["unreported"])})
        best = self.state.best_step
        if best is not None and not checkpoint.checkpoint_of(self.folder, best).exists():
            self.state.best = self.state.best_step = None
        self.keep()

    def keep(self) -> None:
        """Link the best and the newest checkpoint, and remove the others."""
        if self.accelerator.is_main_process:
            with writing(self.folder):
                keep(self.folder, self.state.best_step, self.config.keep_checkpoints)

    def export(self, folder: Path) -> None:
        """Write the adapter or the whole model in its current state; all ranks take part."""
        block_size = self.stage.block_size if self.config.objective == "idlm" else None
        self.student.export(folder, block_size, self.accelerator)


def objective(config: TrainConfig, idlm: Idlm) -> Objective | DiffusionObjective:
    """The model with the loss of its config."""
    if config.objective == "sdar" or config.objective == "llada":
        return DiffusionObjective(idlm, config.objective, config.diffusion)
    return Objective(idlm, config.method == "full", emits_mask=config.objective == "ar")


def wanted(config: TrainConfig, state: State) -> Wanted:
    """The terms in the loss of the next step."""
    if config.objective == "ar":
        return Wanted(0, clean=True)
    if config.denoises:
        return Wanted(config.stage(state.step).block_size, clean=True)
    stage, weights = config.stage(state.step), config.row_weights(state.step, state.acceptance)
    # FSDP gathers a layer for its backward when a gradient of its output comes. The clean half's
    # last layer gets gradients of its keys and values only, unless its output has a loss
    shown = config.method == "full" and config.parallel == "fsdp"
    clean = shown or config.lambda_of(stage) != 0
    return Wanted(stage.block_size, clean, stage.soft, weights, config.phases)

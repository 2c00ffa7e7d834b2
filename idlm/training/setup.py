"""Before and after the training: the model with what is trained on it, the output folder, the export."""

from __future__ import annotations

import difflib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from idlm.errors import InputError
from idlm.models import adapter
from idlm.models.attention import NAME
from idlm.models.gated_lora import LoraSpec, attach
from idlm.models.idlm_model import Idlm
from idlm.models.loading import ensure_mask_row, load, save_full
from idlm.models.sources import first_line
from idlm.nano.tokenizer import train_tokenizer
from idlm.training.config import ModelConfig, TrainConfig, as_tree

STAGING = ".writing"
"""Where a checkpoint is written before it gets its name: a folder named checkpoint-N is always complete."""

FREE_KEYS = ("resume", "device", "threads", "log_steps", "eval_steps", "save_steps")
"""Keys that a resumed run may change: they do not touch the weights (threads may, in the last bits)."""


@dataclass
class Trainee:
    """The model to train; `spec` and the base's `fingerprint` are set for a gated LoRA."""

    idlm: Idlm
    spec: LoraSpec | None = None
    fingerprint: str = ""

    def export(self, folder: Path, block_size: int | None) -> None:
        """Write the adapter, or the whole model with its tokenizer, so that `idlm.load` reads it."""
        shutil.rmtree(folder, ignore_errors=True)
        self.idlm.block_size = block_size
        if self.spec is not None:
            adapter.save(self.idlm, self.spec, folder, self.fingerprint, self.idlm.mask_id, block_size)
        else:
            save_full(self.idlm, folder, block_size)


def base_model(config: ModelConfig) -> Idlm:
    """The model as it is before training: loaded, or built from its architecture with fresh weights."""
    if config.architecture is not None:
        return _from_scratch(config)
    return load(str(config.path), dtype=getattr(torch, config.dtype))


def trainee(config: TrainConfig, idlm: Idlm) -> Trainee:
    """Attach the gated LoRA, or make room for the MASK row and free all weights."""
    if config.method == "lora":
        spec = LoraSpec(config.lora.rank, config.lora.alpha, config.lora.targets)
        base = adapter.fingerprint(idlm.model)
        idlm.gate = attach(idlm.model, spec, idlm.mask_id)
        return Trainee(idlm, spec, base)
    if config.objective == "idlm":
        ensure_mask_row(idlm)
    idlm.model.requires_grad_(True)
    return Trainee(idlm)


def _from_scratch(config: ModelConfig) -> Idlm:
    """A model with fresh weights from the keys of a transformers config, and its tokenizer."""
    keys = _architecture(config)
    tokenizer = _tokenizer(config.tokenizer)
    keys.setdefault("vocab_size", len(tokenizer))
    if keys["vocab_size"] < len(tokenizer):
        size = keys["vocab_size"]
        raise InputError(f"model.architecture.vocab_size is {size}; the tokenizer has {len(tokenizer)} tokens")
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    try:
        full = AutoConfig.for_model(**special, **keys, mask_token_id=tokenizer.mask_token_id)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            full, attn_implementation=NAME, dtype=getattr(torch, config.dtype)
        )
    except Exception as error:  # each family has its own checks
        raise InputError(f"model.architecture is refused: {first_line(error)}; see configs/nano-base.yaml") from error
    return Idlm(model, tokenizer, tokenizer.mask_token_id, name="from scratch")


def _architecture(config: ModelConfig) -> dict[str, Any]:
    """The keys of `model.architecture`, each known to its model_type."""
    keys = dict(config.architecture or {})
    try:
        known = [*AutoConfig.for_model(str(keys.get("model_type"))).to_dict(), "model_type", "rope_theta"]
    except ValueError:
        name = keys.get("model_type")
        raise InputError(f"model.architecture.model_type is {name!r}; name one of transformers', as qwen3") from None
    for key in keys:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise InputError(f"unknown key model.architecture.{key}; the nearest known key of it is {nearest}")
    return keys


def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The project's own tokenizer for "nano", else the one in a folder; it must have a mask token."""
    try:
        tokenizer = train_tokenizer() if name == "nano" else AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(f"model.tokenizer {name!r} cannot be loaded: {first_line(error)}; try nano") from None
    if tokenizer.mask_token_id is None:
        raise InputError(f"model.tokenizer {name!r} has no mask token; add one to it")
    return tokenizer


def training_arguments(config: TrainConfig) -> TrainingArguments:
    """The Trainer's own arguments: its sampler is sequential because `Draws` already is the order."""
    optimizer = config.optimizer
    falling = {"num_decay_steps": round(optimizer.decay * config.steps), "decay_type": "linear"}
    decay = falling if optimizer.schedule == "wsd" else None
    args = TrainingArguments(
        output_dir=config.output_dir,
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=optimizer.lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        max_grad_norm=optimizer.grad_clip,
        lr_scheduler_type="warmup_stable_decay" if optimizer.schedule == "wsd" else optimizer.schedule,
        lr_scheduler_kwargs=decay,
        warmup_steps=optimizer.warmup,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        logging_steps=config.log_steps,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=config.eval_steps,
        save_strategy="steps",
        save_steps=config.save_steps,
        seed=config.seed,
        bf16=config.bf16,
        use_cpu=config.device == "cpu" or not torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        report_to=[],
        disable_tqdm=True,
    )
    if args.n_gpu > 1:
        raise InputError(f"{args.n_gpu} GPUs for one process; start with torchrun, or set CUDA_VISIBLE_DEVICES")
    return args


def prepare_folder(config: TrainConfig) -> Path | None:
    """Make the output folder, keep the config in it, and return the newest checkpoint to resume from, if any.

    Raises:
        InputError: the folder holds a run and `resume` is not set, or that run had another config.
    """
    folder = Path(config.output_dir)
    checkpoint = newest_checkpoint(folder)
    if checkpoint is not None and not config.resume:
        held = f"output_dir {config.output_dir!r} holds {checkpoint.name}"
        raise InputError(f"{held}; set resume: true or name another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output_dir {config.output_dir!r} cannot be made: {error}; name another folder") from None
    shutil.rmtree(folder / STAGING, ignore_errors=True)
    kept = folder / "config.yaml"
    if checkpoint is not None and kept.exists():
        _same_config(yaml.safe_load(kept.read_text(encoding="utf-8")), as_tree(config), "")
    kept.write_text(yaml.safe_dump(as_tree(config), sort_keys=False), encoding="utf-8")
    return checkpoint


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint folder with the highest step; only complete ones bear the name."""
    found = [p for p in folder.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdecimal()]
    return max(found, key=lambda p: int(p.name.removeprefix("checkpoint-")), default=None)


def _same_config(old: Any, new: Any, where: str) -> None:
    """Refuse to resume a run under another config."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            if where or key not in FREE_KEYS:
                _same_config(old.get(key), new.get(key), f"{where}.{key}" if where else key)
    elif old != new:
        raise InputError(
            f"cannot resume: {where} was {old!r}, now it is {new!r}; restore it or name another output_dir"
        )

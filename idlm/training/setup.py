"""The model of a run: before training, with its trained parameters, and on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from idlm.errors import InputError
from idlm.models import adapter, experts
from idlm.models.check import check_adapter, check_architecture, prepare
from idlm.models.gated_lora import ALL_LINEAR, LoraSpec, adapter_parameters, all_linear, attach
from idlm.models.gguf_header import is_gguf
from idlm.models.heads import HeadSpec, head_tensors, new_head, refill_head
from idlm.models.idlm_model import Idlm
from idlm.models.loading import ensure_mask_row, load, save_full
from idlm.models.recomputation import recompute_layers
from idlm.models.routes import implementation
from idlm.models.sources import first_line, resolve
from idlm.models.weights import DTYPES, fill, model_tensors, whole
from idlm.training.config import HeadConfig, ModelConfig, TrainConfig
from idlm.training.data import SOURCES
from idlm.training.processes import is_sharded, together
from idlm.training.sharded import save_sharded
from idlm.training.strict import nearest


@dataclass
class Trainee:
    """The model to train; a gated LoRA has a `spec` and its base's `fingerprint`."""

    idlm: Idlm
    spec: LoraSpec | None = None
    fingerprint: str = ""

    def export(self, folder: Path, block_size: int | None, accelerator: Accelerator) -> None:
        """Write the adapter, or the whole model with its tokenizer, in the form that `idlm.load`
        reads; all ranks call it."""
        idlm, main = self.idlm, accelerator.is_main_process
        idlm.block_size = block_size
        if self.spec is None and is_sharded(accelerator):
            save_sharded(idlm, folder, block_size, accelerator)
            return
        with together(accelerator, str(folder)):
            if self.spec is None:
                if main:
                    save_full(idlm, folder, block_size)
            elif main:
                adapter.save(idlm, self.spec, folder, self.fingerprint, idlm.mask_id, block_size)
            else:  # takes part in gathering what the first rank writes
                for weight in adapter_parameters(idlm.model).values():
                    whole(weight)
                if (head := idlm.draft_heads.get(0)) is not None:
                    head_tensors(head)

    def load(self, folder: Path) -> None:
        """Load the weights that `export` wrote, into weights that may be sharded.

        Raises:
            InputError: they are of another model.
        """
        model = self.idlm.model
        if (head := self.idlm.draft_heads.get(0)) is not None:
            refill_head(model, head, folder)
        if self.spec is not None:
            adapter.refill(model, folder, self.fingerprint)
            return
        stored = load(folder, dtype=self.idlm.dtype, max_model_len=self.idlm.max_model_len)
        weights = dict(stored.model.named_parameters())
        shapes = {name: weight.shape for name, weight in weights.items()}
        if shapes != {name: weight.shape for name, weight in model.named_parameters()}:
            held = f"checkpoint {str(folder)!r} is of another model"
            raise InputError(f"{held}; name another output_dir")
        for name, weight in model.named_parameters():
            fill(weight, weights[name])


def warm_start(student: Trainee, folder: Path) -> None:
    """Take the weights of `warm_start`: an adapter of the same base, rank, alpha and targets; for a
    full fine-tune a whole model of the same shape.

    Raises:
        InputError: they are of another kind, base or shape, or not finite.
    """
    where = f"warm_start {str(folder)!r}"
    if student.spec is None and (folder / adapter.CONFIG).exists():
        raise InputError(f"{where} is an adapter; set method: lora, or give a whole model")
    if student.spec is not None:
        _same_shape(where, adapter.read(folder).spec, student.spec)
    try:
        student.load(folder)
    except InputError as error:
        raise InputError(f"{where} cannot be used: {error}") from None
    for name, weight in student.idlm.model.named_parameters():
        if not bool(weight.isfinite().all()):
            raise InputError(f"{where}: {name} is not finite; give other weights")


def _same_shape(where: str, given: LoraSpec, wanted: LoraSpec) -> None:
    for key in ("rank", "alpha", "targets", "entry"):
        theirs, ours = getattr(given, key), getattr(wanted, key)
        if key == "targets":
            theirs, ours = sorted(theirs), sorted(ours)
        if theirs != ours:
            raise InputError(
                f"{where} has {key} {theirs}, and lora.{key} is {ours}; set lora.{key} to its own"
            )


def base_model(
    config: ModelConfig, device: str | torch.device = "cpu", keep_narrow: bool = False
) -> Idlm:
    """The model before training: a checkpoint, or a new model of an architecture.

    Weights in 16 bits are mapped from their files and widened on the device, one after the other,
    if `config.dtype` is float32; or stay so (`keep_narrow`).
    """
    if config.architecture is not None:
        idlm = _from_scratch(config)
        idlm.model.to(device)  # type: ignore[arg-type]  # transformers' decorator hides it
        return idlm
    dtype = getattr(torch, config.dtype)
    narrow = _narrow(str(config.path)) if dtype == torch.float32 else None
    idlm = load(str(config.path), None, narrow or dtype, device, config.max_model_len)
    if narrow is not None and not keep_narrow:
        idlm.model.to(dtype)
    return idlm


def _narrow(path: str) -> torch.dtype | None:
    """The type of all weights of a checkpoint, if it has 16 bits."""
    folder = resolve(path)[0]
    try:
        stored = set() if is_gguf(folder) else {t.dtype for t in model_tensors(folder).values()}
    except InputError:  # `load` says what the folder is
        return None
    return DTYPES[stored.pop()] if stored in ({"BF16"}, {"F16"}) else None


def trainee(config: TrainConfig, idlm: Idlm) -> Trainee:
    """Attach the gated LoRA; or, for a full fine-tune, add the MASK row and make all weights
    trainable."""
    if config.method == "lora":
        lora = config.lora
        linear = all_linear(idlm.model, lora.entry) if lora.targets == ALL_LINEAR else lora.targets
        spec = LoraSpec(lora.rank, lora.alpha, tuple(linear), lora.rslora, lora.entry)
        base = adapter.fingerprint(idlm.model)
        idlm.gate = attach(idlm.model, spec, idlm.mask_id)
        check_adapter(idlm)
        for trained in adapter_parameters(idlm.model).values():  # a step is below bfloat16's
            trained.data = trained.data.to(torch.promote_types(trained.dtype, torch.float32))
        student = Trainee(idlm, spec, base)
    else:
        if config.objective != "ar":
            ensure_mask_row(idlm)
        idlm.model.requires_grad_(True)
        student = Trainee(idlm)
    _add_head(config.head, idlm)
    if config.activation_checkpointing:
        recompute_layers(idlm)
    return student


def _add_head(config: HeadConfig, idlm: Idlm) -> None:
    """Give the model the draft head to train: a new one, unless it has one of this kind."""
    spec = None if config.kind == "none" else HeadSpec(config.kind, config.size, config.top)
    old = idlm.draft_heads.pop(0, None)
    if spec is not None:
        fits = old is not None and old.spec == spec
        head = old if old is not None and fits else new_head(idlm.model, spec)
        head.to(torch.promote_types(idlm.dtype, torch.float32)).requires_grad_(True)
        idlm.draft_heads[0] = head


def _from_scratch(config: ModelConfig) -> Idlm:
    """A new model by the keys of a transformers config, with its tokenizer."""
    keys = _architecture(config)
    tokenizer = _tokenizer(config.tokenizer)
    keys.setdefault("vocab_size", len(tokenizer))
    if keys["vocab_size"] < len(tokenizer):
        size = keys["vocab_size"]
        raise InputError(
            f"model.architecture.vocab_size is {size}; the tokenizer has {len(tokenizer)} tokens"
        )
    special = {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    try:
        full = AutoConfig.for_model(**special, **keys, mask_token_id=tokenizer.mask_token_id)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            full,
            attn_implementation=implementation(full),
            experts_implementation=experts.NAME,
            dtype=getattr(torch, config.dtype),
        )
        prepare(model)
    except Exception as error:  # each family raises errors of its own
        raise InputError(
            f"model.architecture is refused: {first_line(error)}; see configs/nano-base.yaml"
        ) from error
    idlm = Idlm(model, tokenizer, tokenizer.mask_token_id, name="from scratch")
    check_architecture(idlm)
    return idlm if config.max_model_len is None else idlm.limited(config.max_model_len)


def _architecture(config: ModelConfig) -> dict[str, Any]:
    """The keys of `model.architecture`, checked against those of its model_type."""
    keys = dict(config.architecture or {})
    try:
        known = [
            *AutoConfig.for_model(str(keys.get("model_type"))).to_dict(),
            "model_type",
            "rope_theta",
        ]
    except ValueError:
        name = keys.get("model_type")
        raise InputError(
            f"model.architecture.model_type is {name!r}; name one of transformers', as qwen3"
        ) from None
    for key in keys:
        if key not in known:
            prefix = "model.architecture."
            raise InputError(f"unknown key {prefix}{key}; {nearest(key, known, prefix)}")
    return keys


def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a registered source or of a folder; it must have a mask token."""
    try:
        tokenizer = (
            SOURCES[name].tokenizer() if name in SOURCES else AutoTokenizer.from_pretrained(name)
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"model.tokenizer {name!r} cannot be loaded: {first_line(error)}; try nano"
        ) from None
    if tokenizer.mask_token_id is None:
        raise InputError(f"model.tokenizer {name!r} has no mask token; add one to it")
    return tokenizer

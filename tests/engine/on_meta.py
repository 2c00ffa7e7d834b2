"""A step on the `meta` device: what a GPU would be asked to run, without one."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen3Config, Qwen3ForCausalLM

from idlm.attention import triton
from idlm.attention.triton import TritonAttention
from idlm.decoding.plan import Plan
from idlm.decoding.settings import Features, Settings
from idlm.engine import layers as engine_layers
from idlm.engine.kv_cache import KVCache
from idlm.engine.layers import Layers
from idlm.engine.prefill import Chunk, PrefillBatch
from idlm.engine.products import Products
from idlm.engine.slots import Slots
from idlm.engine.step import ModelStep, StepKey
from idlm.kernels import keep, norms, prefill_attention_triton, window_attention_triton
from idlm.kernels.layer_ops import Heads, Turn, Update
from idlm.kernels.merged import Merged
from idlm.kernels.norms import Norms
from idlm.models import attention, standard
from idlm.models.gated_lora import LoraSpec, all_linear, attach, attach_more
from idlm.models.idlm_model import Idlm

META = torch.device("meta")
FREE = ("empty", "empty_like", "new_empty", "detach", "alias", "lift_fresh", "_unsafe_view")
"""Operators that launch nothing, beside views."""
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique", "item")
DEPTH = 7


class Watched(TorchDispatchMode):
    """Counts launches and bytes, and fails at what would wait for a GPU or could not be captured.

    Attributes:
        launches: by operator; peak: the most bytes of results that lived at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        result = func(*args, **(kwargs or {}))
        made = [one for one in tree_leaves(result) if isinstance(one, Tensor)]
        places = {one.device.type for one in [*given, *made]}
        assert places <= {"meta"}, f"{name} leaves the device: {places}"
        assert name not in WAITING, f"{name} waits for the device"
        by_mask = name.startswith("index") and any(one.dtype == torch.bool for one in given[1:])
        assert not by_mask or name in ("index_copy_", "index_select", "index_fill_"), name
        if not func.is_view and name not in FREE:
            self.launches[name] += 1
        taken = {one.untyped_storage()._cdata for one in given}
        for one in made:
            if one.untyped_storage()._cdata not in taken:
                self._count(one.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, key, storage.nbytes())

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class OneLaunch:
    """The functions of `idlm.kernels.layer_ops`, as one launch each."""

    @staticmethod
    def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        return torch.zeros_like(x)

    @staticmethod
    def add_norm(x: Tensor, more: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        return torch.empty_like(x), torch.zeros_like(x)

    @staticmethod
    def swiglu(x: Tensor) -> Tensor:
        return x.new_zeros(len(x), x.shape[1] // 2)

    @staticmethod
    def rotate(
        rows: Tensor, turn: Turn, heads: Heads, pages: Tensor, cache_rows: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        key = rows.new_empty(len(rows), heads.groups, pages.shape[-1])
        query = rows.new_zeros(len(rows), heads.queries, pages.shape[-1])
        return query, key, torch.empty_like(key)

    @staticmethod
    def update(y: Tensor, low: Tensor, of: Update, adapter: Tensor) -> None:
        y.add_(0)


@contextmanager
def kernels_on_meta() -> Iterator[None]:
    """Triton's kernels, and PyTorch's fused norm, as one launch each; attention with its join."""

    def attend(query: Tensor, *_: object) -> Tensor:
        return torch.zeros_like(query, memory_format=torch.contiguous_format).add_(0)

    def prefill(query: Tensor, *_: object) -> Tensor:
        return torch.zeros_like(query, memory_format=torch.contiguous_format)

    def chosen(scores: Tensor, *_: object) -> Tensor:
        return scores.new_zeros(scores.shape[:2], dtype=torch.int64)

    def filtered(scores: Tensor, *_: object) -> Tensor:
        return torch.zeros_like(scores)

    def norm(x: Tensor, *_: object) -> Tensor:
        return torch.zeros_like(x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(window_attention_triton, "attend", attend)
        patch.setattr(prefill_attention_triton, "attend", prefill)
        patch.setattr(keep, "filterer", lambda device: filtered)
        patch.setattr(keep, "chooser", lambda device: chosen)
        patch.setattr(norms.F, "rms_norm", norm)
        for module in (engine_layers, triton):
            patch.setattr(module, "ops_for", lambda like: OneLaunch)
        patch.setattr(standard, "_alike", lambda given, expected: given.shape == expected.shape)
        yield


def qwen(sizes: dict[str, int], layers: int, adapters: int) -> Idlm:
    """Qwen3 in bf16 on the meta device with gated LoRAs of rank 8 on all layers."""
    config = Qwen3Config(
        **sizes,
        num_hidden_layers=layers,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
        attn_implementation=attention.NAME,
        dtype=torch.bfloat16,
    )
    with META:
        model = Qwen3ForCausalLM(config).to(torch.bfloat16).eval()
        gate = None
        for number in range(adapters):
            spec = LoraSpec(8, 16.0, all_linear(model))
            if not number:
                names = {name for name, _ in Idlm(model, None, 0).linear_layers()}
                gate = attach(model, spec, sizes["vocab_size"] - 1)
                continue
            assert gate is not None
            tensors = {}
            for name in names:
                layer = model.get_submodule(f"model.{name}")
                tensors[f"model.{name}", "lora_A"] = torch.empty_like(layer.lora_A)
                tensors[f"model.{name}", "lora_B"] = torch.empty_like(layer.lora_B)
            spec = LoraSpec(8, 16.0, ("q_proj",))
            attach_more(model, gate, spec, tensors, torch.empty(sizes["hidden_size"]))
    return Idlm(model.requires_grad_(False), None, sizes["vocab_size"] - 1, gate)


def step_of(idlm: Idlm, slots: int, features: Features, few: bool) -> ModelStep:
    """The steps of an engine on the model with what a GPU runs. With `few` launches its layers are
    known to be of the usual kind."""
    config, rows = idlm.model.config, slots + 1
    heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    like = torch.empty(0, dtype=torch.bfloat16, device=META)
    cache = KVCache([heads] * config.num_hidden_layers, 64, 16, like)
    cache.backend = TritonAttention()
    settings = Settings.empty(rows, idlm.vocab_size, idlm.mask_id, META)
    table = torch.zeros(rows, idlm.vocab_size, device=META)
    settings.bias = table.double() if features.biased else None
    settings.stop = table.bool() if features.held else None
    if features.penalised:
        settings.seen, settings.counts = table.bool(), table.int()
    if features.worded:
        settings.words = torch.zeros(rows, 16, 8, dtype=torch.int64, device=META)
        settings.recent = torch.zeros(rows, 7, dtype=torch.int64, device=META)
    state = Slots(slots, DEPTH, cache.columns(2048), idlm.vocab_size, META)
    if features.ratio:
        state.log_q = torch.zeros(rows, DEPTH, idlm.vocab_size, dtype=torch.float64, device=META)
    plain = [m for m in idlm.model.modules() if type(m).__name__.endswith("RMSNorm")]
    merged, layers = Merged(idlm.same_input()), None
    if few:
        usual = standard.standard_layers(idlm, plain)
        layers = Layers(idlm, usual, merged, idlm.model.base_model.norm)
    products = Products(None, frozenset(), merged, Norms(plain), layers)
    return ModelStep(idlm, cache, state, settings, products)


def watch(
    idlm: Idlm,
    plan: Plan,
    batch: int,
    features: Features = Features(),  # noqa: B008 - it is frozen
    logprobs: int | None = None,
    chunks: Sequence[Chunk] = (),
    few: bool = True,
) -> Watched:
    """A step, or a prefill of chunks, after one that made what later ones share."""
    with torch.no_grad(), kernels_on_meta():
        step, key = step_of(idlm, batch, features, few), StepKey(plan, features, logprobs)
        rows = torch.zeros(batch, dtype=torch.int64, device=META)
        columns = torch.arange(32, device=META)
        prompts = (
            PrefillBatch.of(chunks, 16, lambda n: torch.tensor(n, device=META)) if chunks else None
        )
        windows = partial(step.step, key, rows, columns)
        run = windows if prompts is None else partial(step.prefill, prompts)
        run()
        with Watched() as watched:
            run()
        return watched

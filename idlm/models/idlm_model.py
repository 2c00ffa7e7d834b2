"""`Idlm`: a stock transformers model with its tokenizer, MASK token and gate.

Shapes: B batch, Q rows of a forward, S rows that they may see, D hidden size, V logit columns, T
rows of a text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from idlm.chat_template import PromptEncoder
from idlm.errors import InputError
from idlm.models import generation
from idlm.models.architecture import context_length
from idlm.models.attention import Cache, Visible
from idlm.models.entry import decoder_layers
from idlm.models.gate import NO_ROWS, Gate
from idlm.models.gated_lora import gated_layers
from idlm.models.head import head_of
from idlm.models.heads import DraftHead
from idlm.models.routes import routed
from idlm.params import SamplingParams

SAME_ROWS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of layers that have the same input, in the model families that have such layers."""


@dataclass
class Idlm:
    """A loaded model.

    Attributes:
        model: the model of transformers, whose attention is `idlm.models.attention`.
        tokenizer: its tokenizer; None if the folder has none.
        mask_id: the MASK token; `vocab_size` if only the adapter has a row for it.
        gate: the gate of the adapter; None without an adapter.
        draft_heads: the draft heads by the index of their adapter; a model without one is 0.
        block_size: the largest trained block size b, which serves strides up to b + 1. None: it was
            never trained to draft.
        name: the name or path that the user gave.
        stored: the type of the weights in the checkpoint, if it is known.
        max_model_len: the context, if it is not the model's own.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    mask_id: int
    gate: Gate | None = None
    block_size: int | None = None
    name: str = ""
    stored: torch.dtype | None = None
    max_model_len: int | None = None
    draft_heads: dict[int, DraftHead] = field(default_factory=dict)

    @property
    def vocab_size(self) -> int:
        """V, the columns of the logits; the tokenizer may have fewer tokens."""
        return int(self._output.weight.shape[0])

    @cached_property
    def encoder(self) -> PromptEncoder:
        """The encoder that turns texts and messages into token ids."""
        return PromptEncoder(self.tokenizer, self.name)

    @property
    def can_draft(self) -> bool:
        """Whether the base or an adapter has a MASK row."""
        return self.gate is not None or self.mask_id < self.vocab_size

    @property
    def entry(self) -> int:
        """The layer that MASK rows enter at, from 0."""
        return 0 if self.gate is None else self.gate.entry

    @property
    def context(self) -> int:
        """The most positions of a sequence, prompt and output together."""
        return context_length(self.model.config, self.max_model_len)

    def limited(self, max_model_len: int) -> Idlm:
        """The same model with a shorter context.

        Raises:
            InputError: it would be longer.
        """
        if max_model_len > self.context:
            raise InputError(
                f"model {self.name!r} has a context of {self.context}, "
                f"below max_model_len {max_model_len}; give at most {self.context}"
            )
        return replace(self, max_model_len=max_model_len)

    @property
    def device(self) -> torch.device:
        """The device of the weights, and of every forward."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights in memory; see `stored` for the checkpoint's."""
        return self.model.dtype

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """The tokens that end a sequence: those of `idlm.models.generation` that can come out."""
        return generation.end_tokens(self.model, self.tokenizer, self.vocab_size, self.name)

    def end_of(self, chat: bool) -> int | None:
        """The token that ends a text, or an answer in a chat; one of `eos_ids`, None if it has
        none."""
        named: list[int | None] = [min(self.eos_ids, default=None)]
        if self.tokenizer is not None:
            named.insert(0, generation.tokenizer_end(self.tokenizer))
            if chat:
                named.insert(0, generation.turn_end(self.tokenizer))
        return next((token for token in named if token in self.eos_ids), None)

    @cached_property
    def sampling_defaults(self) -> dict[str, Any]:
        """Fields of `SamplingParams` that the checkpoint's generation config gives."""
        return generation.sampling_defaults(self.model, self.eos_ids, self.vocab_size, self.name)

    def sampling(self, given: Mapping[str, Any], generation_config: str = "auto") -> SamplingParams:
        """The fields `given`, and for the others the checkpoint's defaults, unless
        `generation_config` is "none".

        Raises:
            InputError: a value is out of range.
        """
        defaults = self.sampling_defaults if generation_config == "auto" else {}
        try:
            return generation.with_defaults(given, defaults)
        except InputError as error:
            SamplingParams(**given)  # if that is in order, a default is at fault
            raise InputError(
                f"the generation config of {self.name!r} cannot be used: {error}. "
                "Or set generation_config to none"
            ) from None

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor,
        visible: Tensor | None,
        mask_rows: slice = NO_ROWS,
        cache: Cache | None = None,
    ) -> Tensor:
        """Hidden states [B, Q, D] of the rows `tokens` [B, Q] at `positions` [B, Q].

        `visible` is bool, broadcastable to [B, 1, Q, Q]: what is seen where no sliding window
        hides it; None if the cache decides what is seen.
        Positions past the context are clamped, since learned position embeddings would fail on
        them. Only MASK rows and drafts that are never committed have such positions.
        """
        gate = self.gate or Gate()
        seen = None if visible is None else Visible(visible, positions, positions)
        with gate.open(mask_rows, tokens.shape), routed(self.model, seen, cache):
            output = self.model.base_model(
                input_ids=tokens,
                position_ids=positions.clamp(max=self.context - 1),
                use_cache=False,
            )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D]."""
        flat = hidden.dim() < 3
        logits: Tensor = self._head(inputs_embeds=hidden[None] if flat else hidden).logits
        return logits[0] if flat else logits

    def head_parameters(self) -> list[nn.Parameter]:
        """The trained parameters of the head; a tied embedding is one of them."""
        return [weight for weight in self._head.parameters() if weight.requires_grad]

    @property
    def _head(self) -> PreTrainedModel:
        return head_of(self.model)  # made anew, since an adapter or a MASK row changes its layers

    @property
    def _output(self) -> nn.Linear:
        output: nn.Linear = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        return output

    def linear_layers(self) -> list[tuple[str, nn.Linear]]:
        """The backbone's linear layers with their names; the output head is not among them."""
        backbone: nn.Module = self.model.base_model
        return [
            (name, layer)
            for name, layer in backbone.named_modules()
            if isinstance(layer, nn.Linear)
        ]

    def same_input(self) -> list[list[nn.Linear]]:
        """The linear layers of the backbone, in groups with the same input.

        The layers of `SAME_ROWS` share a group; every other layer is a group of its own. A layer
        with a shared weight is listed once.
        """
        groups: dict[object, dict[int, nn.Linear]] = {}
        for name, layer in self.linear_layers():
            parent, _, last = name.removesuffix(".base").rpartition(".")
            key = (
                parent,
                next((names for names in SAME_ROWS if last in names), last),
                layer.in_features,
            )
            groups.setdefault(key, {})[id(layer.weight)] = layer
        return [list(group.values()) for group in groups.values()]

    def linear_groups(self) -> list[list[Tensor]]:
        """The weights [N, K] of `same_input`, and that of the head. The matrices of adapters are
        not included."""
        groups = [[layer.weight for layer in group] for group in self.same_input()]
        return [*groups, [self._output.weight]]

    def leave_file(self) -> None:
        """Copy all weights out of the memory-mapped checkpoint, which a single one would keep
        mapped."""
        for weight in self.model.parameters():
            weight.data = weight.data.clone()

    def mask_weights(self) -> Callable[[Tensor], list[Tensor]]:
        """A function from a linear layer's weight to the merged weight of each adapter.

        A weight that no adapter changes gives a list of itself alone, one that MASK rows do not
        meet none.
        """
        gated = {id(layer.base.weight): layer for layer in gated_layers(self.model)}
        lower = self.weights_below_entry()

        def merged(weight: Tensor) -> list[Tensor]:
            if id(weight) in gated:
                return gated[id(weight)].merged()
            return [] if id(weight) in lower else [weight]

        return merged

    def weights_below_entry(self) -> set[int]:
        """The ids of the weights of the layers that compute no MASK rows."""
        if not self.entry:
            return set()
        layers = decoder_layers(self.model)[1][: self.entry]
        return {id(weight) for weight in layers.parameters()}

    def adapter_weights(self) -> list[tuple[Tensor, list[Tensor]]]:
        """The weight of each adapted layer, with A [r, in] and B [out, r] of its adapters."""
        return [(layer.base.weight, layer.low_rank()) for layer in gated_layers(self.model)]

    @torch.inference_mode()
    def forward(self, tokens: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        """Logits [T, V] of the rows `tokens` [T] of a sequence under `visible` [T, T].

        This is the `forward` of `decoding.reference`. The result is on the device of `tokens`.

        Raises:
            InputError: the MASK rows are not contiguous.
        """
        return self.head(self.states(tokens, positions, visible)).to(tokens.device)

    @torch.inference_mode()
    def states(self, tokens: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        """The hidden states [T, D] of the rows of `forward`, on the model's device."""
        masks = torch.nonzero(tokens == self.mask_id).flatten().tolist()
        rows = slice(masks[0], masks[-1] + 1) if masks else NO_ROWS
        if rows.stop - rows.start != len(masks):
            raise InputError(f"the MASK rows {masks} are not one run; put them side by side")
        on_device = (positions[None].to(self.device), visible[None, None].to(self.device))
        return self.hidden(tokens[None].to(self.device), *on_device, rows)[0]

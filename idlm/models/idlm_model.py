"""`Idlm`: a stock transformers model, its MASK token and its gate, as one thing that can be asked
for rows.

Shapes: B batch, Q rows of this forward, S rows they may look at, D hidden size, V logit columns, T
rows of one text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from idlm.chat_template import PromptEncoder
from idlm.errors import InputError
from idlm.models.attention import Cache
from idlm.models.gated_lora import NO_ROWS, Gate, gated_layers

SAME_ROWS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of layers that multiply the same rows in the model families that have them."""


@dataclass
class Idlm:
    """A loaded model.

    Attributes:
        model: transformers' own model, whose attention is `idlm.models.attention`.
        tokenizer: its tokenizer, or None where the folder has none.
        mask_id: the MASK token; equals `vocab_size` where only the adapter has a row for it.
        gate: the adapter's gate; None for a plain or fully fine-tuned model.
        block_size: the largest block trained, b; strides up to b + 1 draft as trained. None: never
            trained to draft.
        name: what the user called it.
        stored: the type that the checkpoint holds the weights in, if it came from one.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    mask_id: int
    gate: Gate | None = None
    block_size: int | None = None
    name: str = ""
    stored: torch.dtype | None = None

    @property
    def vocab_size(self) -> int:
        """Columns of the logits, V."""
        return int(self._output.weight.shape[0])

    @cached_property
    def encoder(self) -> PromptEncoder:
        """Makes token ids of texts and messages."""
        return PromptEncoder(self.tokenizer, self.name)

    @property
    def can_draft(self) -> bool:
        """Whether there is a MASK row to draft with, the base's own or an adapter's."""
        return self.gate is not None or self.mask_id < self.vocab_size

    @property
    def context(self) -> int:
        """The most positions a sequence may have."""
        return int(self.model.config.max_position_embeddings)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' type."""
        return self.model.dtype

    @property
    def eos_ids(self) -> frozenset[int]:
        """The tokens that end a sequence, from the generation config or the model's own."""
        eos = self.model.generation_config.eos_token_id if self.model.generation_config else None
        eos = self.model.config.eos_token_id if eos is None else eos
        return frozenset([eos] if isinstance(eos, int) else eos or [])

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor,
        visible: Tensor | None,
        mask_rows: slice = NO_ROWS,
        cache: Cache | None = None,
    ) -> Tensor:
        """Hidden states [B, Q, D] of the rows `tokens` [B, Q] at `positions` [B, Q].

        `visible` is bool, broadcastable to [B, 1, Q, S]; None where a cache knows. Positions past
        the context are clamped: only masks and drafts that no sequence can hold have them; learned
        positions would fail on them.
        """
        gate = self.gate or Gate()
        with gate.open(mask_rows):
            output = self.model.base_model(
                input_ids=tokens,
                position_ids=positions.clamp(max=self.context - 1),
                visible=visible,
                cache=cache,
                use_cache=False,
            )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D]."""
        logits: Tensor = self._output(hidden)
        return logits

    @property
    def _output(self) -> nn.Linear:
        output: nn.Linear = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        return output

    def linear_layers(self) -> list[tuple[str, nn.Linear]]:
        """The backbone's linear layers and their names."""
        backbone: nn.Module = self.model.base_model
        return [
            (name, layer)
            for name, layer in backbone.named_modules()
            if isinstance(layer, nn.Linear)
        ]

    def linear_groups(self) -> list[list[Tensor]]:
        """The weights [N, K] of the linear layers, the head's too, once each; adapters' matrices
        are not among them.

        Layers of `SAME_ROWS` are one group, the others have one each.
        """
        groups: dict[object, dict[int, Tensor]] = {}
        for name, layer in self.linear_layers():
            parent, _, last = name.removesuffix(".base").rpartition(".")
            key = (
                parent,
                next((names for names in SAME_ROWS if last in names), last),
                layer.in_features,
            )
            groups.setdefault(key, {})[id(layer.weight)] = layer.weight
        return [*(list(group.values()) for group in groups.values()), [self._output.weight]]

    def leave_file(self) -> None:
        """Copy the weights that are there: one that still lies in a mapped file keeps the whole
        file in memory."""
        for weight in self.model.parameters():
            weight.data = weight.data.clone()

    def mask_weights(self) -> Callable[[Tensor], list[Tensor]]:
        """Says what MASK rows have in the place of a linear layer's weight, by adapter; one where
        none changes it."""
        gated = {id(layer.base.weight): layer for layer in gated_layers(self.model)}
        return lambda weight: gated[id(weight)].merged() if id(weight) in gated else [weight]

    def adapter_weights(self) -> list[tuple[Tensor, list[Tensor]]]:
        """Each adapted layer's weight, and the matrices A [r, in] and B [out, r] of its adapters."""
        return [(layer.base.weight, layer.low_rank()) for layer in gated_layers(self.model)]

    @torch.inference_mode()
    def forward(self, tokens: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        """Logits [T, V] of one sequence's rows [T] under `visible` [T, T]; the form
        `decoding.reference` asks for.

        They come back to the device that `tokens` are on.

        Raises:
            InputError: the MASK rows are not one run.
        """
        masks = torch.nonzero(tokens == self.mask_id).flatten().tolist()
        rows = slice(masks[0], masks[-1] + 1) if masks else NO_ROWS
        if rows.stop - rows.start != len(masks):
            raise InputError(f"the MASK rows {masks} are not one run; put them side by side")
        place, seen = positions[None].to(self.device), visible[None, None].to(self.device)
        return self.head(self.hidden(tokens[None].to(self.device), place, seen, rows))[0].to(
            tokens.device
        )

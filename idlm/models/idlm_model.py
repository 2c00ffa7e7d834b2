"""`Idlm`: a stock transformers model, its MASK token and its gate, as one thing that can be asked for rows.

Shapes: B batch, Q rows of this forward, S rows they may look at, D hidden size, V logit columns, T rows of one text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from idlm.chat_template import PromptEncoder
from idlm.errors import InputError
from idlm.models.attention import Cache
from idlm.models.gated_lora import NO_ROWS, Gate, GatedLinear, merged_weights


@dataclass
class Idlm:
    """A loaded model.

    Attributes:
        model: transformers' own model, whose attention is `idlm.models.attention`.
        tokenizer: its tokenizer, or None where the folder has none.
        mask_id: the MASK token; equals `vocab_size` where only the adapter has a row for it.
        gate: the adapter's gate; None for a plain or fully fine-tuned model.
        block_size: the largest block trained, b; strides up to b + 1 draft as trained. None: never trained to draft.
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

        `visible` is bool, broadcastable to [B, 1, Q, S]; None where a cache knows. Positions past the context are
        clamped: only masks and drafts that no sequence can hold have them; learned positions would fail on them.
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

    def linear_weights(self) -> list[Tensor]:
        """The weight [N, K] of each linear layer, the head's too, once each; adapters' matrices are not among them."""
        backbone: nn.Module = self.model.base_model
        layers = [layer for layer in backbone.modules() if isinstance(layer, nn.Linear)]
        return list({id(layer): layer.weight for layer in [*layers, self._output]}.values())

    def mask_weights(self) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Each linear layer's weight, the head's too, and what MASK rows have in its place, by adapter."""
        yield from merged_weights(self.model)
        yield self._output.weight, [self._output.weight]

    def adapter_weights(self) -> list[tuple[Tensor, list[Tensor]]]:
        """Each adapted layer's weight, and the matrices A [r, in] and B [out, r] of its adapters."""
        layers = [layer for layer in self.model.modules() if isinstance(layer, GatedLinear)]
        return [(layer.base.weight, layer.low_rank()) for layer in layers]

    @torch.inference_mode()
    def forward(self, tokens: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        """Logits [T, V] of one sequence's rows [T] under `visible` [T, T]; the form `decoding.reference` asks for.

        They come back to the device that `tokens` are on.

        Raises:
            InputError: the MASK rows are not one run.
        """
        masks = torch.nonzero(tokens == self.mask_id).flatten().tolist()
        rows = slice(masks[0], masks[-1] + 1) if masks else NO_ROWS
        if rows.stop - rows.start != len(masks):
            raise InputError(f"the MASK rows {masks} are not one run; put them side by side")
        place, seen = positions[None].to(self.device), visible[None, None].to(self.device)
        return self.head(self.hidden(tokens[None].to(self.device), place, seen, rows))[0].to(tokens.device)

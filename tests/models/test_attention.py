from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

from idlm.decoding.scores import Scores
from idlm.decoding.window import Window
from idlm.models import attention
from idlm.models.gated_lora import LoraSpec, adapter_parameters, attach
from idlm.models.idlm_model import Idlm
from tests.models import tiny

MASK = 3


def model_of(family: str) -> PreTrainedModel:
    model = tiny.tiny_model(family).double()
    model.set_attn_implementation(attention.NAME)
    return model


def slow_attention(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, constants: Scores
) -> Tensor:
    """Row by row: softmax over the visible keys of the query's group; [B, Q, H, E]."""
    batch, heads, rows, size = query.shape
    group = heads // key.shape[1]
    out = torch.zeros(batch, rows, heads, size, dtype=query.dtype)
    for b in range(batch):
        for h in range(heads):
            for i in range(rows):
                seen = visible[i].nonzero().flatten()
                scores = key[b, h // group, seen] @ query[b, h, i] * constants.scale
                if (cap := constants.softcap) is not None:
                    scores = cap * torch.tanh(scores / cap)
                if constants.sinks is not None:
                    scores = torch.cat([scores, constants.sinks[h : h + 1]])
                out[b, i, h] = scores.softmax(0)[: len(seen)] @ value[b, h // group, seen]
    return out


@settings(max_examples=30, deadline=None)
@given(
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]),
    rows=st.integers(1, 5),
    before=st.integers(0, 4),
    window=st.sampled_from([None, 1, 2]),
    softcap=st.sampled_from([None, 0.7]),
    sinks=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_attention_is_softmax_over_what_is_visible(
    heads: tuple[int, int],
    rows: int,
    before: int,
    window: int | None,
    softcap: float | None,
    sinks: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    query = torch.randn(2, heads[0], rows, 8, dtype=torch.float64)
    key, value = torch.randn(2, 2, heads[1], before + rows, 8, dtype=torch.float64)
    visible = torch.rand(rows, before + rows) < 0.5
    visible[torch.arange(rows), before + torch.arange(rows)] = True
    keys = torch.randint(4, (before + rows,))
    given = attention.Visible(visible[None, None], keys[None, before:], keys[None])
    mixed, _ = attention.attention(
        *(nn.Module(), query, key, value),
        scaling=0.3,
        visible=given,
        sliding_window=window,
        softcap=softcap,
        s_aux=torch.linspace(-1, 2, heads[0], dtype=torch.float64) if sinks else None,
    )
    if window is not None:
        visible &= keys[before:, None] - keys < window
    scores = Scores(0.3, None, softcap, torch.linspace(-1, 2, heads[0]).double() if sinks else None)
    torch.testing.assert_close(mixed, slow_attention(query, key, value, visible, scores))


@pytest.mark.parametrize(("rows", "window"), [(5, None), (5, 1), (5, 3), (2, 3), (1, 2)])
def test_no_mask_is_causal(rows: int, window: int | None) -> None:
    """The last rows of a text, as after a cache that transformers holds."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 5, 8, dtype=torch.float64)
    mixed, _ = attention.attention(
        nn.Module(), query[:, :, 5 - rows :], key, value, scaling=0.3, sliding_window=window
    )
    causal = torch.ones(5, 5, dtype=torch.bool).tril().triu(1 - (window or 5))[5 - rows :]
    slow = slow_attention(query[:, :, 5 - rows :], key, value, causal, Scores(0.3))
    torch.testing.assert_close(mixed, slow)


def window_rows(stride: int, branches: str, prefix: int) -> tuple[Tensor, Tensor, Tensor, range]:
    """A full window after `prefix` committed tokens, as one sequence: tokens, positions, visible,
    MASK rows."""
    layout = Window(stride, branches)
    first, total = prefix + layout.verify_rows, prefix + layout.width
    tokens = torch.cat([10 + 2 * torch.arange(first), torch.full((total - first,), MASK)])
    visible = torch.zeros(total, total, dtype=torch.bool)
    visible[:prefix, :prefix] = torch.ones(prefix, prefix).tril() > 0
    visible[prefix:, :prefix] = True
    visible[prefix:, prefix:] = layout.visible[-1][:, None] >> torch.arange(layout.width) & 1 > 0
    return (
        tokens,
        torch.cat([torch.arange(prefix), prefix + layout.offsets[-1]]),
        visible,
        range(first, total),
    )


def reaches(visible: Tensor) -> Tensor:
    """Which rows' tokens can move which rows' logits through any number of layers: the closure of
    `visible`."""
    reach = visible.clone()
    for _ in range(len(visible)):
        reach = (reach.int() @ reach.int()) > 0
    return reach


@pytest.mark.parametrize("branches", ["all", "chain"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_no_row_of_a_window_depends_on_what_it_may_not_see(family: str, branches: str) -> None:
    """Change each token of prefix and window: only rows that see it may change."""
    model = model_of(family)
    idlm = Idlm(model, None, MASK, attach(model, LoraSpec(4, 8.0, ("q_proj", "v_proj")), MASK))
    torch.manual_seed(0)
    for parameter in adapter_parameters(model).values():
        nn.init.normal_(parameter, std=0.3)
    tokens, positions, visible, masks = window_rows(stride=3, branches=branches, prefix=3)
    base = idlm.forward(tokens, positions, visible)
    reach = reaches(visible)
    for j in range(len(tokens)):
        if j in masks:
            continue
        changed = tokens.clone()
        changed[j] += 1
        moved = (idlm.forward(changed, positions, visible) - base).abs().amax(dim=-1) > 1e-12
        assert torch.equal(moved, reach[:, j])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_no_row_depends_on_a_mask_row_it_may_not_see(family: str) -> None:
    """The MASK rows are changed one at a time, by giving them an ordinary token's embedding."""
    idlm = Idlm(model_of(family), None, MASK)
    tokens, positions, visible, masks = window_rows(stride=3, branches="all", prefix=2)
    base, reach = idlm.forward(tokens, positions, visible), reaches(visible)
    for j in masks:
        changed = tokens.clone()
        changed[j] = 9
        moved = (plain_rows(idlm, changed, positions, visible) - base).abs().amax(dim=-1) > 1e-12
        assert torch.equal(moved, reach[:, j])


def plain_rows(idlm: Idlm, tokens: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
    with torch.inference_mode():
        return idlm.head(idlm.hidden(tokens[None], positions[None], visible[None, None]))[0]

"""Late entry in the engine against the oracle, against the layers run by hand, and against
training: same tokens, same drafts, same hidden states."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from idlm import LLM, Idlm, InputError, SamplingParams, load
from idlm.decoding import reference
from idlm.decoding.window import window
from idlm.engine import products
from idlm.engine.step import ModelStep
from idlm.models.attention import NAME
from idlm.models.gated_lora import LoraSpec, adapter_parameters, all_linear, attach
from idlm.models.heads import HeadSpec
from idlm.models.more_adapters import Loaded
from idlm.training.data import Draw, collate, exchange
from idlm.training.objective import Objective, Wanted
from tests.engine.test_adapters import adapter, ask, engine_of
from tests.engine.test_chain import PLANS, PROMPT, oracle
from tests.engine.test_decoder import PARAMS
from tests.engine.tiny import sliding_idlm, tiny_idlm
from tests.heads import random_head
from tests.training import tiny as trained

LAYERS = 4
ENTRIES = (1, 2, 3)
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


def late(entry: int) -> Idlm:
    """A random model with rotary embeddings, whose norms stay in float64, and a random adapter."""
    idlm = trained.family("starcoder2", {"num_hidden_layers": LAYERS})
    spec = LoraSpec(3, 6.0, all_linear(idlm.model, entry), entry=entry)
    idlm.gate, idlm.block_size = attach(idlm.model, spec, idlm.mask_id), 3
    for parameter in adapter_parameters(idlm.model).values():
        torch.nn.init.normal_(parameter, std=0.3)
    return idlm


@pytest.mark.parametrize("params", PARAMS, ids=range(len(PARAMS)))
@pytest.mark.parametrize("plan", PLANS)
def test_equals_the_oracle(params: SamplingParams, plan: tuple[int, str | tuple[int, ...]]) -> None:
    idlm = tiny_idlm("qwen3_moe", entry=1)
    idlm.draft_heads[0] = random_head(idlm.model, HeadSpec("mlp", 6, 7))
    expected = oracle(idlm, PROMPT, params, plan)
    llm = LLM(idlm, stride=plan[0], branches=plan[1], record=False)
    (result,) = llm.generate([PROMPT], params)
    assert result.token_ids == expected.tokens
    assert (result.reached, result.accepted) == (expected.reached, expected.accepted)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("record", [False, True])
def test_every_entry_gives_ar_and_the_oracles_drafts(entry: int, record: bool) -> None:
    idlm = late(entry)
    prompts = [[5, 9, 3], [7], [4, 8] * 6, [11, 2]]
    ar = LLM(idlm, stride=1).generate(prompts, GREEDY)
    llm = LLM(idlm, stride=4, branches="all", record=record, max_num_seqs=4)
    for prompt, one, isd in zip(prompts, ar, llm.generate(prompts, GREEDY), strict=True):
        request = reference.Request(prompt, GREEDY, idlm.mask_id)
        expected = reference.isd(idlm.forward, request, 4)
        assert isd.token_ids == one.token_ids == expected.tokens
        assert isd.accepted == expected.accepted and sum(isd.reached) > 0


@pytest.mark.parametrize("window", [3, 10])
@pytest.mark.parametrize("family", ["gemma3_text", "gpt_oss", "phi3"])
def test_sliding_windows_caps_and_sinks(family: str, window: int) -> None:
    idlm = sliding_idlm(family, window, entry=1)
    request = reference.Request(PROMPT, GREEDY, idlm.mask_id)
    expected = reference.isd(idlm.forward, request, 4)
    (result,) = LLM(idlm, stride=4, branches="all").generate([PROMPT], GREEDY)
    assert (result.token_ids, result.accepted) == (expected.tokens, expected.accepted)
    assert result.token_ids == reference.ar(idlm.forward, request).tokens


def by_hand(idlm: Idlm, tokens: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
    """Hidden states of the MASK rows, which are last: the lower layers on the rows before, the
    upper ones on all rows, each layer called by itself."""
    assert idlm.gate is not None
    model, gate = idlm.model.model, idlm.gate
    real = int((tokens != idlm.mask_id).sum())
    caught: list[Tensor] = []
    hook = model.layers[gate.entry].register_forward_pre_hook(
        lambda _, given: caught.append(given[0])
    )
    idlm.hidden(
        tokens[None, :real], positions[None, :real], visible[None, None, :real, :real]
    )  # no MASK rows: the base
    hook.remove()
    row = adapter_parameters(idlm.model)["model.embed_tokens.mask_row"]
    hidden = torch.cat([caught[0], row.expand(1, len(tokens) - real, -1)], dim=1)
    rotary = model.rotary_emb(hidden, positions[None])
    gate.rows, gate.shape = slice(real, len(tokens)), (1, len(tokens))
    model.config._attn_implementation = "sdpa"
    hidden_rows = torch.zeros_like(visible, dtype=hidden.dtype).masked_fill(~visible, -torch.inf)
    for layer in model.layers[gate.entry :]:
        hidden = type(layer).forward(
            layer, hidden, attention_mask=hidden_rows[None, None], position_embeddings=rotary
        )
    gate.rows, model.config._attn_implementation = slice(0, 0), NAME
    return model.norm(hidden)[0, real:]


@pytest.mark.parametrize("entry", ENTRIES)
def test_mask_rows_are_those_of_the_layers_run_by_hand(entry: int) -> None:
    idlm, layout = late(entry), window(4, "all")
    text = torch.tensor([5, 9, 3, 11, 7, 2, 8])
    prefix = 3
    offsets, words = layout.offsets[-1], layout.visible[-1]  # all drafts are valid
    masks = torch.full((len(offsets) - 4,), idlm.mask_id)
    tokens = torch.cat([text, masks])
    positions = torch.cat([torch.arange(prefix), prefix + offsets])
    inside = (words[:, None] >> torch.arange(len(offsets)) & 1).bool()
    visible = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
    visible[prefix:, prefix:] = inside
    with torch.inference_mode():
        expected = by_hand(idlm, tokens, positions, visible)
        found = idlm.states(tokens, positions, visible)[7:]
    assert found.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("record", [False, True])
def test_the_engines_mask_rows_are_those_of_training(
    entry: int, record: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first window of a prompt holds the block that training has after it."""
    idlm, prompt, block = late(entry), [5, 9, 3, 11, 7], 3
    text = exchange(prompt, [8, 4, 6, 10])  # a MASK row for all of its tokens but the last
    texts = collate([[Draw(0, text, -len(prompt) % block)]]).texts
    objective = Objective(idlm, trains_clean=False)
    with torch.no_grad():
        half, _ = objective.clean_half(texts)
        expected = objective.log_law(objective.noisy_rows(half, Wanted(block, False)).hidden)
    seen: list[Tensor] = []
    forward = ModelStep._forward

    def kept(*given: object) -> tuple[Tensor, Tensor]:
        found = forward(*given)  # type: ignore[arg-type]
        seen.append(found[1])
        return found

    monkeypatch.setattr(ModelStep, "_forward", kept)
    llm = LLM(idlm, stride=block + 1, branches="all", record=record, kv_memory="1MiB")
    llm.engine.add(prompt, GREEDY, 0)
    llm.engine.step()
    assert len(seen) == 1
    found = objective.log_law(seen[0].unflatten(0, (1, -1))[0, :block])
    assert found.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("deterministic", [False, True])
def test_float32_steps_recorded_and_eager_int8_and_deterministic(
    deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the C kernels with int8 weights of MASK rows, which the lower layers have none of."""
    monkeypatch.setattr(products, "drafts_pay", lambda *_: True)
    base = load("nano-base", dtype="float32")
    spec = LoraSpec(4, 8.0, all_linear(base.model, 2), entry=2)
    base.gate, base.block_size = attach(base.model, spec, base.mask_id), 3
    torch.manual_seed(0)
    for parameter in adapter_parameters(base.model).values():
        torch.nn.init.normal_(parameter, std=0.05)
    settings = {"kv_memory": "16MiB", "max_num_seqs": 2, "deterministic": deterministic}
    found = []
    for stride, record in ((1, True), (4, False), (4, True)):
        llm = LLM(base, stride=stride, branches="all", record=record, **settings)
        results = llm.generate(["Mia has 14 apples."] * 2, replace(GREEDY, max_tokens=40))
        found.append([(one.token_ids, one.accepted) for one in results])
    ar, eager, recorded = found
    assert eager == recorded and sum(eager[0][1]) > 0
    assert [tokens for tokens, _ in eager] == [tokens for tokens, _ in ar]
    linears = llm.engine.runner.model_step.products.linears
    if linears is not None:
        lower = base.weights_below_entry()
        with_masks = {id(layer.group[0]) in lower: layer.drafts for layer in linears.layers}
        assert with_masks[True] is None and with_masks[False] is not None


def late_adapter(seed: int, entry: int = 1) -> Loaded:
    loaded = adapter(seed)
    tensors = {at: t for at, t in loaded.tensors.items() if f".layers.{entry}." in at[0]}
    return loaded._replace(spec=replace(loaded.spec, entry=entry), tensors=tensors)


@pytest.mark.parametrize("record", [False, True])
def test_a_late_adapter_that_comes_to_an_ar_model(record: bool) -> None:
    """The first one decides where MASK rows enter; others must agree."""
    llm = engine_of(tiny_idlm("llama", adapter=False), record)
    ar, drawn = ask(llm)
    llm.engine.load_adapter("late", late_adapter(1))
    result, late_drawn = ask(llm, "late")
    assert result.token_ids == ar.token_ids and sum(result.reached) > 0
    assert ask(llm)[1] == drawn
    with pytest.raises(InputError, match="enter at layer 0, those of the first at layer 1"):
        llm.engine.load_adapter("early", adapter(2))
    llm.engine.load_adapter("second", late_adapter(3))
    assert ask(llm, "late")[1] == late_drawn != ask(llm, "second")[1]
    early = engine_of(tiny_idlm("llama"), record)
    with pytest.raises(InputError, match="enter at layer 1, those of the first at layer 0"):
        early.engine.load_adapter("late", late_adapter(1))
    assert ask(early)[0].token_ids == ar.token_ids

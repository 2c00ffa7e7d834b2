"""Products by panels in a model, and the weights of MASK rows, which must not change outputs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import idlm
from idlm.config import EngineConfig
from idlm.engine import products
from idlm.engine.build import build_engine
from idlm.engine.request import Result, Terms
from idlm.errors import InputError
from idlm.kernels import choice as choice_module
from idlm.kernels import native
from idlm.kernels.linears import ALWAYS, Layer, Linears, _shared
from idlm.kernels.panels import FORMATS, Panels, stacked
from idlm.models.gated_lora import GatedLinear
from idlm.models.idlm_model import Idlm
from idlm.nano.problems import held_out_problems
from idlm.params import SamplingParams
from tests.engine.tiny import tiny_idlm, with_second_adapter
from tests.kernels.checks import rounded, threads, uint8_twin

pytestmark = pytest.mark.skipif(
    not native.loaded(), reason="no C compiler: there is nothing to test"
)


DRAFTS = ("int8", "uint8")
"""What MASK rows' weights are held in, by the machine."""


def single(family: str = "qwen3") -> Idlm:
    model = tiny_idlm(family)
    model.model.float()
    return model


def rounded_rows(x: Tensor, format: str) -> Tensor:
    """Rows [M, K] as they are rounded for weights in a format, float64."""
    numbers, scales = rounded(x)
    return uint8_twin(x) if format == "uint8" else numbers * scales[:, None].double()


def exact(x: Tensor, weights: Tensor, adapter: Tensor, format: str) -> Tensor:
    """The MASK rows `x` [M, K] by the codes of their adapters' `weights` [A, N, K], in float64: [M,
    N]."""
    codes = torch.stack([Panels.of(weight, format).matrix() for weight in weights]).double()
    return torch.einsum("mk,mnk->mn", rounded_rows(x, format), codes.index_select(0, adapter))


@settings(max_examples=80, deadline=None)
@given(
    real=st.integers(0, 9),
    masks=st.integers(1, 20),
    inner=st.integers(1, 70),
    out=st.integers(1, 300),
    adapters=st.integers(1, 3),
    num_threads=st.integers(1, 2),
    choice=st.sampled_from([ALWAYS, 0]),
    format=st.sampled_from(list(FORMATS)),
    drafts=st.sampled_from(DRAFTS),
    seed=st.integers(0, 2**20),
)
def test_masks_by_their_adapters_codes_and_the_others_as_ever(
    real: int,
    masks: int,
    inner: int,
    out: int,
    adapters: int,
    num_threads: int,
    choice: int,
    format: str,
    drafts: str,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    weights, x = torch.randn(adapters, out, inner), torch.randn(1, real + masks, inner)
    adapter = torch.randint(adapters, (masks,))
    layer = Layer(weights[0], Panels.of(weights[0], format), stacked(list(weights), drafts), choice)
    with threads(num_threads):
        found = layer.multiply(x, adapter)[0]
        assert found.shape == (real + masks, out)
        if real:
            assert torch.equal(found[:real], layer.multiply(x[:, :real], None)[0])
    torch.testing.assert_close(
        found[real:].double(), exact(x[0, real:], weights, adapter, drafts), rtol=1e-5, atol=1e-5
    )


@settings(max_examples=40, deadline=None)
@given(
    inner=st.integers(1, 300),
    out=st.integers(1, 40),
    drafts=st.sampled_from(DRAFTS),
    seed=st.integers(0, 2**20),
)
def test_the_rounding_is_within_its_bound(inner: int, out: int, drafts: str, seed: int) -> None:
    """Half a step of each factor: |error| <= sum of s_x/2 |w| + s_w/2 |x| + s_x s_w / 4."""
    torch.manual_seed(seed)
    weight, x = torch.randn(out, inner), torch.randn(3, inner)
    layer = Layer(weight, Panels.of(weight, "float32"), stacked([weight], drafts))
    found = layer.multiply(x[None], torch.zeros(3, dtype=torch.int64))[0]
    rows, columns = (
        x.abs().amax(dim=1) / (254 if drafts == "uint8" else 65534),
        weight.abs().amax(dim=1) / 254,
    )
    bound = (
        rows[:, None] * weight.abs().sum(1)
        + columns * x.abs().sum(1)[:, None]
        + inner * rows[:, None] * columns
    )
    assert ((found - x @ weight.t()).abs() <= bound * (1 + 1e-4) + 1e-5).all()


@pytest.mark.parametrize("drafts", DRAFTS)
def test_a_row_of_zeros_and_a_column_of_zeros_stay_zero(drafts: str) -> None:
    weight = torch.randn(20, 8)
    weight[3] = 0
    x = torch.randn(1, 2, 8)
    x[0, 1] = 0
    layer = Layer(weight, Panels.of(weight, "float32"), stacked([weight], drafts))
    found = layer.multiply(x, torch.zeros(2, dtype=torch.int64))[0]
    assert found[1].eq(0).all()
    assert found[:, 3].eq(0).all()
    assert found[0].ne(0).sum() == 19


def test_rows_that_lie_apart_and_rows_of_several_sequences() -> None:
    weight, wide = torch.randn(40, 8), torch.randn(2, 3, 16)
    panels = Panels.of(weight, "float32")
    for choice in (ALWAYS, 0):
        layer = Layer(weight, panels, None, choice)
        for x in (
            wide[..., :8],
            wide[..., ::2],
            wide[0, :, :8],
            wide[0, 1, 8:],
            wide[:1, :, 8:],
            wide[:, 1:2, 3:11],
        ):
            torch.testing.assert_close(layer.multiply(x, None), F.linear(x, weight))
    assert layer.multiply(wide[:, :0, :8], None).shape == (2, 0, 40)


def other_panels(weight: Tensor) -> Panels:
    """Panels of another weight, so that one sees who multiplied."""
    return Panels.of(weight + 1, "float32")


@pytest.mark.parametrize("choice", [0, 0b1, 0b100, 0b1010, (1 << 62) - 1 & ~0b10, ALWAYS])
def test_each_number_of_rows_goes_where_the_choice_says(choice: int) -> None:
    weight = torch.randn(40, 8)
    panels = other_panels(weight)
    for rows in (*range(1, 19), 31, 32, 33, 64, 65):
        x = torch.randn(1, rows, 8)
        bit = (rows - 1).bit_length()
        expected = F.linear(x, weight + 1 if choice >> bit & 1 else weight)
        torch.testing.assert_close(Layer(weight, panels, None, choice).multiply(x, None), expected)
        masks = torch.zeros(3, dtype=torch.int64)  # they do not count
        split = Layer(weight, panels, stacked([weight], DRAFTS[0]), choice).multiply(
            torch.cat([x, x[:, :1].expand(1, 3, 8)], 1), masks
        )
        torch.testing.assert_close(split[:, :rows], expected)


def test_merged_weights_are_the_gated_update() -> None:
    """Rows of two adapters by the gated layers and by the merged weights, in float64."""
    tokens, positions = torch.full((1, 3), 24), torch.arange(3)[None]
    visible = torch.ones(3, 3, dtype=torch.bool).tril()[None, None]
    for index in range(2):
        gated, merged = (with_second_adapter(tiny_idlm("qwen3")) for _ in range(2))
        assert gated.gate is not None
        assert merged.gate is not None
        gated.gate.adapter = merged.gate.adapter = torch.full((3,), index)
        want = gated.hidden(tokens, positions, visible, slice(0, 3))
        weights, of = sum(merged.linear_groups(), []), merged.mask_weights()
        for weight, merged_weights in [(weight, of(weight)) for weight in weights]:
            weight.data = merged_weights[index] if len(merged_weights) == 2 else merged_weights[0]
        merged.gate.merged = True
        torch.testing.assert_close(merged.hidden(tokens, positions, visible, slice(0, 3)), want)


def int8_drafts(monkeypatch: pytest.MonkeyPatch, on: bool) -> None:
    """As if it had been measured so."""
    monkeypatch.setattr(products, "drafts_pay", lambda linears, ranks: on)


def results(model: Idlm, int8: bool, monkeypatch: pytest.MonkeyPatch, record: bool) -> list[Result]:
    """Greedy and sampled requests, of both adapters where there are two, side by side."""
    int8_drafts(monkeypatch, int8)
    adapters = ["one", "two"][: 1 if model.gate is None else model.gate.adapters]
    engine = build_engine(
        model, EngineConfig(4, "all", max_num_seqs=4, record=record), adapters=adapters
    )
    linears = engine.runner.model_step.products.linears
    assert linears is not None
    assert linears.drafts == int8
    for seed in range(8):
        params = SamplingParams(max_tokens=40, temperature=0.7 * (seed % 2), ignore_eos=True)
        engine.add([5, 6, 7 + seed], params, seed, Terms(adapters[seed // 4 % len(adapters)]))
    found = [update.result for update in engine.run() if update.result is not None]
    return sorted(found, key=lambda result: result.seed)


@pytest.mark.parametrize("record", [True, False], ids=["recorded", "eager"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])  # with biases and without
def test_the_output_stays_and_the_drafts_hardly_change(
    family: str, record: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_second_adapter(single(family))
    plain, int8 = (results(model, on, monkeypatch, record) for on in (False, True))
    assert [result.token_ids for result in int8] == [result.token_ids for result in plain]
    assert sum(result.forwards for result in int8) == pytest.approx(
        sum(result.forwards for result in plain), rel=0.05
    )


@pytest.mark.parametrize("int8", [True, False])
def test_recorded_and_eager_steps_draft_alike(int8: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded, eager = (results(single(), int8, monkeypatch, record) for record in (True, False))
    assert [(result.forwards, result.reached, result.accepted) for result in recorded] == [
        (result.forwards, result.reached, result.accepted) for result in eager
    ]


def test_acceptance_of_the_bundled_model_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    forwards, chats = (
        [],
        [[{"role": "user", "content": problem.question}] for problem in held_out_problems(8)],
    )
    for int8 in (False, True):
        int8_drafts(monkeypatch, int8)
        llm = idlm.LLM("nano", stride=4, branches="chain", max_num_seqs=8)
        forwards.append(
            sum(
                result.forwards
                for result in llm.chat(chats, SamplingParams(temperature=0, max_tokens=60))
            )
        )
    assert forwards[1] <= forwards[0] * 1.03


def test_other_users_of_the_model_keep_the_adapter_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The engine's int8 weights are its own: the model itself, between two steps, drafts as the
    oracle does."""
    int8_drafts(monkeypatch, True)
    model = single()
    tokens, visible = torch.tensor([5, 6, 24, 24]), torch.ones(4, 4, dtype=torch.bool).tril()
    before = model.forward(tokens, torch.arange(4), visible)
    engine = build_engine(model, EngineConfig(4, "all", max_num_seqs=2))
    engine.add([5, 6, 7], SamplingParams(max_tokens=30, temperature=0, ignore_eos=True), 0)
    for _ in range(3):
        engine.step()
    torch.testing.assert_close(model.forward(tokens, torch.arange(4), visible), before)


def test_weights_that_a_float64_model_has_are_left_alone() -> None:
    assert (
        build_engine(
            tiny_idlm("qwen3"), EngineConfig(4, "all", max_num_seqs=2)
        ).runner.model_step.products.linears
        is None
    )


def test_no_memory_for_them_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    int8_drafts(monkeypatch, True)
    monkeypatch.setattr(products, "DRAFT_SHARE", 0.0)
    with caplog.at_level("INFO", "idlm"):
        linears = build_engine(
            single(), EngineConfig(4, "all", max_num_seqs=2)
        ).runner.model_step.products.linears
    assert linears is not None
    assert not linears.drafts
    assert (
        "MASK rows: the model's weights and the adapter; int8 weights of their own would take"
        in caplog.text
    )


def test_no_memory_for_panels_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(products, "PANELS_SHARE", 0.0)
    with caplog.at_level("INFO", "idlm"):
        assert (
            build_engine(
                single(), EngineConfig(4, "all", max_num_seqs=2)
            ).runner.model_step.products.linears
            is None
        )
    assert "PyTorch multiplies: a copy of the weights for the C kernels would take" in caplog.text
    linears = build_engine(
        single(), EngineConfig(4, "all", max_num_seqs=2, weights="int8")
    ).runner.model_step.products.linears
    assert linears is not None  # since somebody asked for it
    assert linears.format == "int8"


def test_layers_that_are_not_known_are_left_alone() -> None:
    served, weight, x = torch.randn(5, 8), torch.randn(5, 8), torch.randn(1, 3, 8)
    linears = Linears([[served]], "int8")
    with linears.use():
        assert torch.equal(F.linear(x, weight), x @ weight.t())
        assert not torch.equal(F.linear(x, served), x @ served.t())
        with pytest.raises(RuntimeError, match="dtype"):
            F.linear(x.double(), served)


def test_a_bias_is_added() -> None:
    weight, bias, x = torch.randn(5, 8), torch.randn(5), torch.randn(1, 3, 8)
    with Linears([[weight]], "float32").use():
        torch.testing.assert_close(F.linear(x, weight, bias), x @ weight.t() + bias)
        torch.testing.assert_close(F.linear(x, weight, bias=bias), x @ weight.t() + bias)


@pytest.mark.parametrize("format", FORMATS)
def test_layers_of_the_same_rows_are_one_product(
    format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = group = [torch.randn(out, 70) for out in (40, 7, 33)]
    linears, calls = Linears([group], format), []
    multiply = Layer.multiply
    monkeypatch.setattr(
        Layer, "multiply", lambda *arguments: calls.append(1) or multiply(*arguments)
    )
    exact = [Panels.of(weight, format).matrix() for weight in group]
    x, other, bias = torch.randn(1, 3, 70), torch.randn(1, 5, 70), torch.randn(7)
    for choice in (ALWAYS, 0) if format == "float32" else (ALWAYS,):
        calls.clear()
        linears.layers[0].choose(choice)
        with linears.use():
            found = [F.linear(x, q), F.linear(x, k, bias), F.linear(x, v)]
            assert len(calls) == 1
            again = F.linear(x, q)  # each part is handed out once: who has it may write to it
            assert len(calls) == 2
            assert F.linear(other, v).shape == (1, 5, 33)
            assert len(calls) == 3
        want = [F.linear(x, exact[0]), F.linear(x, exact[1], bias), F.linear(x, exact[2])]
        tolerance = 1e-5 if format == "float32" else 1e-3
        for product, expected in zip([*found, again], [*want, want[0]], strict=True):
            torch.testing.assert_close(product, expected, rtol=tolerance, atol=tolerance)


def test_a_group_has_panels_of_its_own_until_one_of_it_is_trained_on() -> None:
    q, k = group = [torch.nn.Parameter(torch.randn(5, 8)) for _ in range(2)]
    panels, alone = _shared([group], "float32")[0], _shared([[k]], "float32")[0]
    assert alone.weights is not panels.weights
    assert torch.equal(_shared([group], "float32")[0].matrix(), torch.cat(group))
    with torch.no_grad():
        k += 1
    assert torch.equal(_shared([group], "float32")[0].matrix(), torch.cat(group))
    assert torch.equal(_shared([[k, q]], "float32")[0].matrix(), torch.cat([k, q]))


def test_a_model_has_one_product_for_qkv_and_one_for_gate_and_up() -> None:
    for model in (single(), with_second_adapter(single())):
        layers = model.model.config.num_hidden_layers
        assert [len(group) for group in model.linear_groups()] == [3, 1, 2, 1] * layers + [1]


def test_an_adapter_is_merged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    merges, merged = list[int](), GatedLinear.merged
    monkeypatch.setattr(
        GatedLinear, "merged", lambda layer: merges.append(id(layer)) or merged(layer)
    )
    monkeypatch.setattr(choice_module, "_time_drafts", lambda layer, ranks: (0.5, 1.0))
    linears = build_engine(
        single(), EngineConfig(4, "all", max_num_seqs=2)
    ).runner.model_step.products.linears
    assert linears is not None
    assert linears.drafts
    assert merges
    assert len(merges) == len(set(merges))


@pytest.mark.parametrize("format", FORMATS)
def test_an_engine_frees_the_weights_that_it_loaded(format: str) -> None:
    params = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True, prompt_logprobs=1)
    kept, freed = idlm.load("nano"), idlm.LLM("nano", stride=1, max_num_seqs=2, weights=format)
    want = idlm.LLM(kept, stride=1, max_num_seqs=2, weights=format).generate([[5, 6, 7]], params)[0]
    found = freed.generate([[5, 6, 7]], params)[0]
    assert (found.token_ids, found.prompt_logprobs) == (want.token_ids, want.prompt_logprobs)
    assert all(weight.numel() for weight in kept.model.parameters())
    assert not any(layer.weight.numel() for _, layer in freed.idlm.linear_layers())
    assert freed.idlm.model.get_input_embeddings().weight.numel()
    with pytest.raises(
        InputError, match="its weights are an engine's, which freed them; load it again"
    ):
        idlm.LLM(freed.idlm)
    with pytest.raises(RuntimeError, match="shape"):  # and nothing is made up
        freed.idlm.forward(
            torch.tensor([5, 6]), torch.arange(2), torch.ones(2, 2, dtype=torch.bool).tril()
        )


def test_engines_on_one_model_share_its_panels_until_it_is_trained_on() -> None:
    weight = torch.nn.Parameter(torch.randn(5, 8))
    panels = _shared([[weight]], "float32")[0]
    assert _shared([[weight]], "float32")[0].weights is panels.weights
    assert _shared([[weight]], "int8")[0].weights is not panels.weights
    with torch.no_grad():
        weight += 1
    assert torch.equal(_shared([[weight]], "float32")[0].matrix(), weight)


PLANS: tuple[tuple[int, str], ...] = ((2, "chain"), (4, "all"), (3, "chain"))


def greedy(model: Idlm, stride: int, branches: str, **options: object) -> Iterator[tuple[int, ...]]:
    engine = build_engine(model, EngineConfig(stride, branches, max_num_seqs=4, **options))  # type: ignore[arg-type]
    for seed in range(6):
        params = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
        engine.add([5, 6, 7 + seed, 3][: 2 + seed % 3], params, seed)
    found = [update.result for update in engine.run() if update.result is not None]
    yield from (tuple(result.token_ids) for result in sorted(found, key=lambda result: result.seed))


@pytest.mark.parametrize("int8", [True, False], ids=["int8-drafts", "own"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("format", FORMATS)
def test_drafting_changes_no_token_in_any_format(
    format: str, family: str, int8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    int8_drafts(monkeypatch, int8)
    model = single(family)
    ar = list(greedy(model, 1, "chain", weights=format))
    assert len(ar) == 6
    for stride, branches in PLANS:
        assert list(greedy(model, stride, branches, weights=format)) == ar


@pytest.mark.parametrize("format", FORMATS)
def test_each_format_is_the_models_own_rounding(format: str) -> None:
    """An engine with rounded weights writes what a model with those very weights writes; qwen2's
    head has its own."""
    model, copy = single("qwen2"), single("qwen2")
    with torch.no_grad():
        for weight in sum(copy.linear_groups(), []):
            weight.copy_(Panels.of(weight, format).matrix())
    assert list(greedy(model, 4, "all", weights=format)) == list(greedy(copy, 4, "all"))


def test_a_checkpoint_in_bfloat16_is_multiplied_in_bfloat16() -> None:
    model = single()
    for stored, format in (
        (torch.bfloat16, "bfloat16"),
        (None, "float32"),
        (torch.float16, "float32"),
    ):
        model.stored = stored
        linears = build_engine(
            model, EngineConfig(4, "all", max_num_seqs=2)
        ).runner.model_step.products.linears
        assert linears is not None
        assert linears.format == format


@pytest.mark.parametrize("format", FORMATS)
def test_formats_that_cannot_be_used_are_refused(
    format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        InputError, match=rf"weights='{format}' needs float32 activations, and the model is float64"
    ):
        build_engine(tiny_idlm("qwen3"), EngineConfig(4, "all", weights=format))
    with pytest.raises(
        InputError, match=rf"weights='{format}' does not go with deterministic=True"
    ):
        build_engine(single(), EngineConfig(4, "all", weights=format, deterministic=True))
    monkeypatch.setattr(
        products.native, "loaded", lambda: False
    )  # what IDLM_NATIVE=0 makes of it, see test_native.py
    with pytest.raises(
        InputError, match=rf"weights='{format}' needs the C kernels, which are not there"
    ):
        build_engine(single(), EngineConfig(4, "all", weights=format))


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(
        InputError, match="weights='int4' is unknown; use auto, float32, bfloat16, int8"
    ):
        build_engine(single(), EngineConfig(4, "all", weights="int4"))

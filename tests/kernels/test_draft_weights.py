"""int8 weights of MASK rows: the kernel against exact arithmetic, and what they may and may not change."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import idlm
from idlm.decoding.params import SamplingParams
from idlm.engine.build import build_engine
from idlm.engine.request import Result
from idlm.kernels import native
from idlm.kernels.draft_weights import Codes, DraftWeights, split_linear
from idlm.models.idlm_model import Idlm
from idlm.nano.problems import held_out_problems
from tests.engine.tiny import tiny_idlm, with_second_adapter

pytestmark = pytest.mark.skipif(not native.loaded(), reason="no C compiler: there is nothing to test")


def exact(x: Tensor, codes: Codes, adapter: Tensor, out: int) -> Tensor:
    """The MASK rows `x` [M, K] by the codes, as the kernel's head spells it, in float64: [M, out]."""
    scale = (x.abs().amax(dim=-1, keepdim=True) / 127).clamp(min=1e-30)
    found = torch.floor(x / scale + 0.5).double()  # the kernel adds 128 and cuts the fraction off
    weights = codes.codes.permute(0, 1, 3, 2).flatten(1, 2)[:, : x.shape[1], :out].double()
    weights = weights * codes.scales[:, None, :out].double()
    return torch.einsum("mk,mkn->mn", found * scale.double(), weights.index_select(0, adapter))


@settings(max_examples=80, deadline=None)
@given(
    real=st.integers(0, 9),
    masks=st.integers(1, 20),
    inner=st.integers(1, 70),
    out=st.integers(1, 300),
    adapters=st.integers(1, 3),
    threads=st.integers(1, 2),
    seed=st.integers(0, 2**20),
)
def test_masks_by_their_adapters_codes_and_the_others_as_ever(
    real: int, masks: int, inner: int, out: int, adapters: int, threads: int, seed: int
) -> None:
    torch.manual_seed(seed)
    weights, x = torch.randn(adapters, out, inner), torch.randn(1, real + masks, inner)
    adapter, codes = torch.randint(adapters, (masks,)), Codes.of(list(weights))
    laid_out, before = weights[0].t().contiguous().t(), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = split_linear(x, laid_out, codes, adapter)[0]
        assert torch.equal(found[:real], torch.ops.idlm.linear(x[:, :real], laid_out)[0])
    finally:
        torch.set_num_threads(before)
    want = exact(x[0, real:], codes, adapter, out)
    ties = (x[0, real:] / x[0, real:].abs().amax(-1, keepdim=True) * 127).frac().abs().sub(0.5).abs().amin(-1) < 1e-4
    torch.testing.assert_close(found[real:][~ties].double(), want[~ties], rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(inner=st.integers(1, 300), out=st.integers(1, 40), seed=st.integers(0, 2**20))
def test_the_rounding_is_within_its_bound(inner: int, out: int, seed: int) -> None:
    """Half a step of each factor: |error| <= sum of s_x/2 |w| + s_w/2 |x| + s_x s_w / 4."""
    torch.manual_seed(seed)
    weight, x = torch.randn(out, inner), torch.randn(3, inner)
    codes = Codes.of([weight])
    found = split_linear(x[None], weight.t().contiguous().t(), codes, torch.zeros(3, dtype=torch.int64))[0]
    rows, columns = x.abs().amax(dim=1) / 254, weight.abs().amax(dim=1) / 254
    bound = rows[:, None] * weight.abs().sum(1) + columns * x.abs().sum(1)[:, None] + inner * rows[:, None] * columns
    assert ((found - x @ weight.t()).abs() <= bound * (1 + 1e-4) + 1e-5).all()


def test_a_row_of_zeros_and_a_column_of_zeros_stay_zero() -> None:
    weight = torch.randn(20, 8)
    weight[3] = 0
    x = torch.randn(1, 2, 8)
    x[0, 1] = 0
    found = split_linear(x, weight.t().contiguous().t(), Codes.of([weight]), torch.zeros(2, dtype=torch.int64))[0]
    assert found[1].eq(0).all()
    assert found[:, 3].eq(0).all()
    assert found[0].ne(0).sum() == 19


def test_merged_weights_are_the_gated_update() -> None:
    """Rows of two adapters by the gated layers and by the merged weights, in float64."""
    tokens, positions = torch.full((1, 3), 24), torch.arange(3)[None]
    visible = torch.ones(3, 3, dtype=torch.bool).tril()[None, None]
    for number in range(2):
        gated, merged = (with_second_adapter(tiny_idlm("qwen3")) for _ in range(2))
        assert gated.gate is not None
        assert merged.gate is not None
        gated.gate.adapter = merged.gate.adapter = torch.full((3,), number)
        want = gated.hidden(tokens, positions, visible, slice(0, 3))
        for weight, own in list(merged.mask_weights()):
            weight.data = own[number] if len(own) == 2 else own[0]
        merged.gate.merged = True
        torch.testing.assert_close(merged.hidden(tokens, positions, visible, slice(0, 3)), want)


def results(model: Idlm, int8: bool, monkeypatch: pytest.MonkeyPatch, record: bool) -> list[Result]:
    """Greedy and sampled requests, of both adapters where there are two, side by side."""
    monkeypatch.setattr(native, "int8_pays", lambda: int8)
    adapters = ["one", "two"][: 1 if model.gate is None else model.gate.adapters]
    engine = build_engine(model, 4, "all", adapters, max_num_seqs=4, record=record)
    assert (engine.runner.core.draft_weights is not None) == int8
    for seed in range(8):
        params = SamplingParams(max_tokens=40, temperature=0.7 * (seed % 2), ignore_eos=True)
        engine.add([5, 6, 7 + seed], params, seed, adapters[seed // 4 % len(adapters)])
    found = [update.result for update in engine.run() if update.result is not None]
    return sorted(found, key=lambda one: one.seed)


@pytest.mark.parametrize("record", [True, False], ids=["recorded", "eager"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])  # with biases and without
def test_the_output_stays_and_the_drafts_hardly_change(
    family: str, record: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_idlm(family)
    model.model.float()
    with_second_adapter(model)
    plain, int8 = (results(model, on, monkeypatch, record) for on in (False, True))
    assert [one.token_ids for one in int8] == [one.token_ids for one in plain]
    assert sum(one.forwards for one in int8) == pytest.approx(sum(one.forwards for one in plain), rel=0.05)


def test_recorded_and_eager_steps_draft_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_idlm("qwen3")
    model.model.float()
    recorded, eager = (results(model, True, monkeypatch, record) for record in (True, False))
    assert [(one.forwards, one.reached, one.accepted) for one in recorded] == [
        (one.forwards, one.reached, one.accepted) for one in eager
    ]


def test_acceptance_of_the_bundled_model_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    forwards, chats = [], [[{"role": "user", "content": one.question}] for one in held_out_problems(8)]
    for int8 in (False, True):
        monkeypatch.setattr(native, "int8_pays", lambda on=int8: on)
        llm = idlm.LLM("nano", stride=4, branches="chain", max_num_seqs=8)
        forwards.append(sum(one.forwards for one in llm.chat(chats, SamplingParams(temperature=0, max_tokens=60))))
    assert forwards[1] <= forwards[0] * 1.03


def test_other_users_of_the_model_keep_the_adapter_as_it_is() -> None:
    """The engine's int8 weights are its own: the model itself, between two steps, drafts as the oracle does."""
    model = tiny_idlm("qwen3")
    model.model.float()
    tokens, visible = torch.tensor([5, 6, 24, 24]), torch.ones(4, 4, dtype=torch.bool).tril()
    before = model.forward(tokens, torch.arange(4), visible)
    engine = build_engine(model, 4, "all", max_num_seqs=2)
    engine.add([5, 6, 7], SamplingParams(max_tokens=30, temperature=0, ignore_eos=True), 0)
    for _ in range(3):
        engine.step()
    torch.testing.assert_close(model.forward(tokens, torch.arange(4), visible), before)


def test_weights_that_a_float64_model_has_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "int8_pays", lambda: True)
    assert build_engine(tiny_idlm("qwen3"), 4, "all", max_num_seqs=2).runner.core.draft_weights is None


def test_no_memory_for_them_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(native, "int8_pays", lambda: True)
    monkeypatch.setattr("idlm.engine.build.DRAFT_SHARE", 0.0)
    model = tiny_idlm("qwen3")
    model.model.float()
    with caplog.at_level("INFO", "idlm"):
        assert build_engine(model, 4, "all", max_num_seqs=2).runner.core.draft_weights is None
    assert "MASK rows run in float32" in caplog.text


def test_layers_that_are_not_known_are_left_alone() -> None:
    weight, x = torch.randn(5, 8), torch.randn(1, 3, 8)
    with DraftWeights([]).use(torch.zeros(3, dtype=torch.int64)):
        assert torch.equal(torch.nn.functional.linear(x, weight), x @ weight.t())

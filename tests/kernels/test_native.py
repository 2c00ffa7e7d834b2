"""The C kernels against the PyTorch twin and against what stock model code computes."""

from __future__ import annotations

import gc
import logging
import weakref
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from idlm.config import EngineConfig
from idlm.engine.build import build_engine
from idlm.engine.llm import LLM
from idlm.errors import InputError
from idlm.kernels import fused, native
from idlm.kernels.panels import FORMATS, Panels
from idlm.params import SamplingParams
from tests.attention.oracle import RATIOS, SHAPES, case
from tests.engine.tiny import tiny_idlm
from tests.kernels import checks
from tests.kernels.everywhere import Ops

pytestmark = pytest.mark.skipif(
    not native.loaded(), reason="no C compiler: there is nothing to test"
)


OPS = Ops()


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    width=st.integers(1, 24),
    heads=st.sampled_from(RATIOS),
    page=st.sampled_from([1, 3, 16]),
    size=st.sampled_from([2, 8, 20]),
    causal=st.booleans(),
    real=st.integers(1, 24),
    seed=st.integers(0, 2**20),
)
def test_attention_is_the_twin(
    lengths: list[int],
    width: int,
    heads: tuple[int, int],
    page: int,
    size: int,
    causal: bool,
    real: int,
    seed: int,
) -> None:
    example = case(lengths, width, *heads, size=size, page=page, causal=causal, seed=seed)
    checks.check_attention(OPS, example, min(real, width))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_attention_of_real_shapes(
    shape: tuple[list[int], int, int, int, int, int], causal: bool, dtype: torch.dtype
) -> None:
    tolerance = {} if dtype == torch.float64 else checks.SINGLE
    checks.check_attention(
        OPS, case(*shape, causal=causal).to(dtype), max(1, shape[1] // 2), **tolerance
    )


def test_attention_on_several_threads_is_bit_equal() -> None:
    checks.check_threads(OPS)


@settings(max_examples=40, deadline=None)
@given(
    pieces=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 50)), min_size=1, max_size=5),
    heads=st.sampled_from(RATIOS),
    page=st.sampled_from([1, 3, 16]),
    threads=st.integers(1, 2),
    seed=st.integers(0, 2**20),
)
def test_pieces_of_unequal_length_are_the_twins_one_by_one(
    pieces: list[tuple[int, int]], heads: tuple[int, int], page: int, threads: int, seed: int
) -> None:
    lengths, widths = [start for start, _ in pieces], [width for _, width in pieces]
    example = case(lengths, max(widths), *heads, size=8, page=page, causal=True, seed=seed)
    checks.check_pieces(OPS, example, widths, threads)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_row_does_not_depend_on_its_window(dtype: torch.dtype) -> None:
    checks.check_alone(OPS, dtype)


def test_a_row_that_sees_nothing_gets_zeros() -> None:
    checks.check_blind(OPS)


def test_scores_that_lie_far_apart() -> None:
    checks.check_far_scores(OPS)


@pytest.mark.skipif(not native.loaded(), reason="no C kernels here")
@pytest.mark.parametrize("recorded", [False, True])
def test_a_broken_precondition_is_an_exception_and_the_process_lives_on(recorded: bool) -> None:
    def norm(rows: Tensor) -> Tensor:
        return torch.ops.idlm.rms_norm(rows, torch.ones(4), 1e-6)  # type: ignore[no-any-return]

    call = torch.jit.trace(norm, torch.ones(2, 4)) if recorded else norm
    with pytest.raises(RuntimeError, match="idlm's C kernels: torch's C interface refused a call"):
        call(torch.ones(*[1] * 8, 4))  # nine dimensions, one more than the operator takes
    assert torch.equal(call(torch.zeros(3, 4)), torch.zeros(3, 4))


def test_the_fused_operations() -> None:
    torch.manual_seed(0)
    checks.check_row_operations(OPS, rows=5, size=37, heads=3)
    checks.check_extremes(OPS)


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 20),
    inner=st.integers(1, 70),
    out=st.integers(1, 300),
    threads=st.integers(1, 2),
    seed=st.integers(0, 2**20),
)
def test_products_of_few_rows(
    format: str, rows: int, inner: int, out: int, threads: int, seed: int
) -> None:
    torch.manual_seed(seed)
    checks.check_product(OPS, torch.randn(rows, inner), torch.randn(out, inner), format, threads)


@pytest.mark.parametrize("format", FORMATS)
def test_long_products_and_many_rows(format: str) -> None:
    """Sums over many blocks, and more rows than are multiplied at a time."""
    checks.check_product(OPS, torch.randn(17, 5000), torch.randn(300, 5000), format, 2)
    checks.check_product(OPS, torch.randn(300, 33), torch.randn(70, 33), format, 2)


@pytest.mark.parametrize("format", FORMATS)
def test_panels_stand_for_the_matrix(format: str) -> None:
    weight = torch.randn(70, 33) * torch.logspace(-20, 20, 70)[:, None]
    weight[7] = 0
    panels = Panels.of(weight, format)
    assert panels.weights.shape[::2] == (3, 32)
    assert panels.weights.dtype == FORMATS[format]
    if format == "int8":
        step = weight.abs().amax(dim=1, keepdim=True) / 127
        assert ((panels.matrix() - weight).abs() <= step * 0.5001).all()
        assert torch.equal(
            panels.weights.abs().amax(dim=(1, 3)).flatten()[:70].gt(0), weight.ne(0).any(dim=1)
        )
    else:
        assert torch.equal(panels.matrix(), weight.to(FORMATS[format]).float())


@pytest.mark.parametrize(
    ("family", "norms"), [("llama", 5), ("mistral", 5), ("qwen2", 5), ("qwen3", 9)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_recordings_use_them(
    family: str, norms: int, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    """Two layers: two norms each, two more of heads in Qwen3, and the last; in float64 nothing is
    touched."""
    fused._log_counts.cache_clear()
    caplog.set_level(logging.INFO, "idlm")
    idlm = tiny_idlm(family, adapter=False)
    idlm.model.to(dtype).requires_grad_(False)
    tokens = torch.arange(6)[None] % 20

    class Blind:
        """A cache that mixes nothing: what is fused lies around the attention."""

        def attend(
            self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float
        ) -> Tensor:
            return (query + key.sum() + value.sum()).transpose(1, 2)

    def hidden(tokens: Tensor) -> Tensor:
        return idlm.hidden(tokens, torch.arange(6)[None], None, cache=Blind())

    with torch.inference_mode():
        recorded = torch.jit.trace(hidden, (tokens,), check_trace=False)
        fused.fuse(recorded.graph, dtype)
        found = Counter(node.kind() for node in recorded.graph.nodes())
        expected = (norms, 4, 2) if dtype == torch.float32 else (0, 0, 0)
        assert (
            tuple(found[f"idlm::{name}"] for name in ("rms_norm", "rotate", "swiglu")) == expected
        )
        torch.testing.assert_close(recorded(tokens), hidden(tokens))
    message = f"a recorded step has fused operators: {norms} rms_norm, 4 rotate, 2 swiglu"
    assert [record.message for record in caplog.records] == (
        [message] if dtype == torch.float32 else []
    )


@pytest.mark.skipif(not native.loaded(), reason="no C kernels here")
def test_a_recording_dies_with_its_engine() -> None:
    """It holds the kernels' copy of the weights, which for a real model is most of the memory."""
    idlm = tiny_idlm("qwen3")
    idlm.model.float()
    engine = build_engine(idlm, EngineConfig(4, "all", max_num_seqs=4))
    engine.add([5, 6, 7], SamplingParams(max_tokens=40, ignore_eos=True), 0)
    assert list(engine.run())
    linears = engine.runner.model_step.products.linears
    assert linears is not None
    held = [weakref.ref(layer.panels.weights) for layer in linears.layers]
    assert all(reference() is not None for reference in held)
    del engine, linears, idlm
    gc.collect()
    assert all(reference() is None for reference in held)


def test_a_recording_drafts_as_the_step_it_was_made_from() -> None:
    """Adapters add to the linear layers' outputs in place: nothing that is fused may move across
    that."""
    found = []
    for record in (True, False):
        idlm = tiny_idlm("qwen3")
        idlm.model.float()
        engine = build_engine(idlm, EngineConfig(4, "all", max_num_seqs=4, record=record))
        for seed in range(4):
            engine.add(
                [5, 6, 7 + seed],
                SamplingParams(max_tokens=40, temperature=0.7, ignore_eos=True),
                seed,
            )
        results = [update.result for update in engine.run() if update.result is not None]
        found.append(
            sorted(
                (result.token_ids, result.forwards, result.reached, result.accepted)
                for result in results
            )
        )
    assert found[0] == found[1]


def test_without_a_compiler_the_twins_serve(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    idlm, prompt, greedy = tiny_idlm("qwen3"), [5, 6, 7], SamplingParams(temperature=0)
    with_kernels = LLM(idlm, max_num_seqs=2, branches="all").generate(prompt, greedy)[0].token_ids
    monkeypatch.setenv("CC", "/no/such/compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "idlm"):
            assert (
                LLM(idlm, max_num_seqs=2, branches="all").generate(prompt, greedy)[0].token_ids
                == with_kernels
            )
        assert "/no/such/compiler" in caplog.text
        assert not native.loaded()
    finally:
        monkeypatch.undo()
        native.library.cache_clear()
    assert native.loaded()  # again


@pytest.mark.parametrize(
    ("value", "platform", "said"), [("0", "x86_64", ""), ("auto", "sparc", "none for sparc")]
)
def test_without_kernels_pytorch_multiplies(
    value: str,
    platform: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Because somebody wants that, or since there are none for this platform."""
    idlm, prompt, greedy = tiny_idlm("qwen3"), [5, 6, 7], SamplingParams(temperature=0)
    idlm.model.float()
    with_kernels = LLM(idlm, max_num_seqs=2, branches="all").generate(prompt, greedy)[0].token_ids
    monkeypatch.setenv("IDLM_NATIVE", value)
    monkeypatch.setattr("platform.machine", lambda: platform)
    native.library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "idlm"):
            assert (
                LLM(idlm, max_num_seqs=2, branches="all").generate(prompt, greedy)[0].token_ids
                == with_kernels
            )
        assert build_engine(idlm, EngineConfig(4, "all")).runner.model_step.products.linears is None
        with pytest.raises(
            InputError, match="weights='int8' needs the C kernels, which are not there"
        ):
            build_engine(idlm, EngineConfig(4, "all", weights="int8"))
        assert said in caplog.text
        assert bool(caplog.text) == bool(said)
    finally:
        monkeypatch.undo()
        native.library.cache_clear()
    assert native.loaded()  # again


def test_an_instruction_set_that_is_unknown_stops_the_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    idlm = tiny_idlm("qwen3")
    monkeypatch.setenv("IDLM_NATIVE", "mmx")
    native.library.cache_clear()
    try:
        with pytest.raises(
            InputError, match="IDLM_NATIVE='mmx' is unknown; use auto, 0, or one of avx512_vnni"
        ):
            LLM(idlm, max_num_seqs=2, branches="all")
    finally:
        monkeypatch.undo()
        native.library.cache_clear()
    assert native.loaded()  # again

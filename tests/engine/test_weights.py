"""Weights in bfloat16 and int8: AR and ISD of the model that they make are each other's, and what
they cost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from idlm.cli import app
from idlm.engine.llm import LLM
from idlm.engine.weights_accuracy import weights_accuracy
from idlm.errors import InputError
from idlm.kernels import native
from idlm.models.idlm_model import Idlm
from idlm.params import SamplingParams
from tests.engine.tiny import tiny_idlm

pytestmark = pytest.mark.skipif(
    not native.loaded(), reason="no C compiler: there is nothing to test"
)

PLANS = ((2, "all"), (4, "chain"), (4, "all"), (4, "planner"))


def floats(family: str = "qwen3", adapter: bool = True) -> Idlm:
    model = tiny_idlm(family, adapter)
    model.model.float()
    return model


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_every_plan_gives_the_tokens_of_ar(family: str, weights: str) -> None:
    model, prompts = floats(family), [[5, 6, 7 + number] for number in range(6)]
    params = [
        SamplingParams(max_tokens=30, temperature=0.8 * (seed % 2), seed=seed, ignore_eos=True)
        for seed in range(6)
    ]
    ar = LLM(model, stride=1, max_num_seqs=4, weights=weights).generate(prompts, params)
    for stride, branches in PLANS:
        llm = LLM(model, stride=stride, branches=branches, max_num_seqs=4, weights=weights)
        assert llm.engine.runner.model_step.products.linears is not None
        assert llm.engine.runner.model_step.products.linears.format == weights
        assert [one.token_ids for one in llm.generate(prompts, params)] == [
            one.token_ids for one in ar
        ]


def test_a_model_stored_in_16_bits_holds_bfloat16_weights() -> None:
    model = replace(floats(), stored=torch.bfloat16)
    linears = LLM(model, stride=1, max_num_seqs=2).engine.runner.model_step.products.linears
    assert linears is not None and linears.format == "bfloat16"


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
def test_where_they_cannot_be_had_they_are_refused(
    weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=f"weights='{weights}' needs float32 activations"):
        LLM(tiny_idlm("qwen3"), weights=weights)
    with pytest.raises(InputError, match="deterministic"):
        LLM(floats(), weights=weights, deterministic=True)
    monkeypatch.setattr(native, "loaded", lambda: False)
    with pytest.raises(InputError, match=f"weights='{weights}' needs the C kernels"):
        LLM(floats(), weights=weights)


def test_what_a_format_does_to_the_logits() -> None:
    model = floats("llama", adapter=False)
    exact, half, coarse = (weights_accuracy(model, one) for one in ("float32", "bfloat16", "int8"))
    assert exact.logit_difference_worst < 1e-4 and exact.same_top == 1
    assert exact.kl_mean < 1e-9 < half.kl_mean < coarse.kl_worst < 0.1
    assert 0 < half.logit_difference_mean < half.logit_difference_worst
    with pytest.raises(InputError, match="float32 model on a CPU"):
        weights_accuracy(tiny_idlm("llama", adapter=False), "int8")


def test_inspect_reports_it(checkpoint: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", str(checkpoint / "base"), "--weights", "int8"])
    assert result.exit_code == 0
    for line in (
        "weights                 int8",
        "logit difference mean",
        "logit difference worst",
        "kl mean",
        "same top",
    ):
        assert line in result.stdout
    assert "kl mean" not in CliRunner().invoke(app, ["inspect", str(checkpoint / "base")]).stdout

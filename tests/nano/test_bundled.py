"""The bundled checkpoints: small, right, and drafting."""

from pathlib import Path

import pytest

import idlm.nano
from idlm import LLM, Idlm, SamplingParams, load
from idlm.evaluation.accuracy import evaluate
from idlm.evaluation.metrics import summary
from idlm.models.checkpoint import inspect_checkpoint
from idlm.nano.problems import held_out_problems
from idlm.nano.tokenizer import train_tokenizer

WEIGHTS = Path(idlm.nano.__file__).parent / "weights"
GREEDY = SamplingParams(temperature=0, max_tokens=256)


@pytest.fixture(scope="module")
def nano() -> Idlm:
    return load("nano", dtype="float64")


def test_the_weights_take_at_most_30_mb() -> None:
    assert sum(file.stat().st_size for file in WEIGHTS.rglob("*")) <= 30e6


def test_the_tokenizer_can_be_made_again() -> None:
    stored = load("nano-base").tokenizer
    assert stored is not None and stored.get_vocab() == train_tokenizer().get_vocab()


@pytest.mark.parametrize(
    "stride, branches, least", [(4, "all", 3.0), (4, "chain", 2.5), (8, "all", 4.0)]
)
def test_same_bytes_as_the_base_in_fewer_forwards(
    nano: Idlm, stride: int, branches: str, least: float
) -> None:
    """In float64; the TPF bounds leave room for 4 problems where the model card has 2,000."""
    problems = held_out_problems(4)
    base = evaluate(LLM(load("nano-base", dtype="float64"), stride=1), problems, GREEDY)
    ours = evaluate(LLM(nano, stride=stride, branches=branches), problems, GREEDY)
    assert [one.token_ids for one in ours.results] == [one.token_ids for one in base.results]
    assert base.share >= 0.75
    assert summary(ours.results)["tpf"] >= least


def test_seeded_sampling_gives_the_bases_tokens(nano: Idlm) -> None:
    params = SamplingParams(
        seed=4, temperature=1.3, top_p=0.95, presence_penalty=0.3, max_tokens=60
    )
    question = [{"role": "user", "content": held_out_problems(1)[0].question}]
    base = LLM(load("nano-base", dtype="float64"), stride=1).chat(question, params)
    assert LLM(nano, stride=4, branches="all").chat(question, params).token_ids == base.token_ids


def test_the_full_fine_tune_answers_and_drafts() -> None:
    full = evaluate(LLM(load("nano-full"), stride=4, branches="all"), held_out_problems(8), GREEDY)
    assert full.share >= 0.75
    assert summary(full.results)["tpf"] >= 3.0


def test_inspect_says_that_nano_can_decode() -> None:
    found = inspect_checkpoint(str(WEIGHTS / "lora"))
    assert found.can_decode_isd and found.max_stride == 8

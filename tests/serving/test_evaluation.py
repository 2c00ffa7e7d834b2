"""Evaluations over HTTP: our model of a server, and the harness's own, against the engine."""

from __future__ import annotations

from typing import Any

import pytest

from idlm.errors import InputError
from tests.serving.conftest import KEY, Running

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI  # noqa: E402

from idlm.evaluation.engine_model import EngineModel  # noqa: E402
from idlm.evaluation.url_model import UrlModel  # noqa: E402

QUESTIONS = ["Mia has 3 apples and buys 4 more.", "Sam has 12 pens. He loses 5."]
OPTIONS = {"max_gen_toks": 20, "do_sample": False, "until": ["\n\n"]}
PAIRS = [(text, end) for text in QUESTIONS for end in (" The answer is 7.", " Then")]


def asks(kind: str, arguments: list[Any]) -> list[Instance]:
    return [Instance(kind, {}, one, at) for at, one in enumerate(arguments)]


@pytest.fixture(scope="module")
def engine() -> EngineModel:
    return EngineModel("nano-base", dtype="float64", stride=1, max_num_seqs=4, threads=1)


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def test_completions(served: Running, engine: EngineModel) -> None:
    """Texts, likelihoods, and likelihoods of whole texts: ours, the harness's, the engine's."""
    model = UrlModel(served.url, "nano", chat=False, concurrency=4)
    theirs = LocalCompletionsAPI(
        base_url=f"{served.url}/completions",
        model="nano",
        tokenizer_backend="remote",
        auth_token=KEY,
    )
    texts = asks("generate_until", [(text, dict(OPTIONS)) for text in QUESTIONS])
    expected = engine.generate_until(texts)
    assert model.generate_until(texts) == expected and any(expected)
    assert theirs.generate_until(texts) == expected
    scores = engine.loglikelihood(asks("loglikelihood", PAIRS))
    for found in (
        model.loglikelihood(asks("loglikelihood", PAIRS)),
        theirs.loglikelihood(asks("loglikelihood", PAIRS)),
    ):
        for (left, greedy), (right, also) in zip(scores, found, strict=True):
            assert right == pytest.approx(left, abs=1e-6) and greedy == also
    whole = model.loglikelihood_rolling(asks("loglikelihood_rolling", [(QUESTIONS[0],)]))
    assert whole[0] < 0


def test_chat(served: Running, engine: EngineModel) -> None:
    model = UrlModel(served.url, "nano", chat=True)
    theirs = LocalChatCompletion(
        base_url=f"{served.url}/chat/completions", model="nano", num_concurrent=1
    )
    talks = [[{"role": "user", "content": text}] for text in QUESTIONS]

    def texts(one: Any) -> list[Instance]:
        prompts = [one.apply_chat_template(talk) for talk in talks]
        return asks("generate_until", [(prompt, dict(OPTIONS)) for prompt in prompts])

    expected = engine.generate_until(texts(engine))
    assert model.generate_until(texts(model)) == expected and any(expected)
    assert theirs.generate_until(texts(theirs)) == expected


def test_a_server_that_refuses(served: Running) -> None:
    model = UrlModel(served.url, "another", chat=True)
    with pytest.raises(InputError, match="does not answer as it should.*another"):
        model.generate_until(asks("generate_until", [("Mia", dict(OPTIONS))]))
    with pytest.raises(InputError, match="begins the model's answer"):
        model.apply_chat_template([{"role": "assistant", "content": "So"}], False)

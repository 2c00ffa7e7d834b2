"""dspy."""

from typing import Literal

import dspy
from features import KEY, MODEL, QUESTION, URL, check, feature

lm = dspy.LM(
    f"openai/{MODEL}", api_base=URL, api_key=KEY, max_tokens=96, cache=False, num_retries=0
)


class Answer(dspy.Signature):
    """Answer the question."""

    question: str = dspy.InputField()
    answer: Literal["yes", "no"] = dspy.OutputField()


@feature("chat, n, text mode")
def plain() -> None:
    assert lm(QUESTION, max_tokens=8)
    assert len(lm(QUESTION, n=3, temperature=1.0, max_tokens=4)) == 3
    text = dspy.LM(
        f"openai/{MODEL}", api_base=URL, api_key=KEY, model_type="text", max_tokens=4, cache=False
    )
    assert text("One two")


@feature("responses")
def responses() -> None:
    via = dspy.LM(
        f"openai/{MODEL}",
        api_base=URL,
        api_key=KEY,
        model_type="responses",
        max_tokens=16,
        cache=False,
    )
    assert via(QUESTION)


@feature("Predict with JSONAdapter (json_schema)")
def predict() -> None:
    with dspy.context(lm=lm, adapter=dspy.JSONAdapter()):
        assert dspy.Predict(Answer)(question="Is it?").answer in ("yes", "no")


check("dspy")

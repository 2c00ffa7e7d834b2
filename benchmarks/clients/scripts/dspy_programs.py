"""dspy."""

import dspy
from features import KEY, MODEL, QUESTION, URL, Trip, check, feature

lm = dspy.LM(
    f"openai/{MODEL}", api_base=URL, api_key=KEY, max_tokens=96, cache=False, num_retries=0
)


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


@feature("a response_format with a nested model")
def structured() -> None:
    Trip.model_validate_json(lm(QUESTION, response_format=Trip)[0])


check("dspy")

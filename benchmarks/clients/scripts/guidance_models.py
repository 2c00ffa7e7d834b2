"""guidance."""

from features import KEY, MODEL, URL, Trip, check, feature
from guidance import assistant, gen, json, models, select, user


@feature("OpenAI: gen, json")
def openai() -> None:
    model = models.OpenAI(MODEL, base_url=URL, api_key=KEY)
    with user():
        model += "Say hello."
    with assistant():
        answer = model + gen("a", max_tokens=8)
        assert answer["a"]
        Trip.model_validate_json((model + json("t", schema=Trip, max_tokens=96))["t"])


@feature("VLLMModel: gen, regex, select, json")
def vllm() -> None:
    from guidance.models.experimental import VLLMModel

    model = VLLMModel(MODEL, base_url=URL, api_key=KEY)
    with user():
        model += "Say hello."
    with assistant():
        assert (model + gen("a", max_tokens=8))["a"]
        assert (model + gen("n", regex="[0-9]{3}", max_tokens=8))["n"].isdigit()
        assert (model + select(["yes", "no"], name="s"))["s"] in ("yes", "no")
        Trip.model_validate_json((model + json("t", schema=Trip, max_tokens=96))["t"])


check("guidance")

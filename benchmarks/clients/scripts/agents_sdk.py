"""OpenAI's Agents SDK."""

from dataclasses import dataclass
from typing import Any

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    RunContextWrapper,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from features import KEY, MODEL, QUESTION, URL, City, Trip, check, feature
from openai import AsyncOpenAI

set_tracing_disabled(True)
client = AsyncOpenAI(base_url=URL, api_key=KEY, max_retries=0, timeout=300)
MODELS: list[Any] = [
    OpenAIChatCompletionsModel(MODEL, client),
    OpenAIResponsesModel(MODEL, client),
]
SETTINGS = ModelSettings(max_tokens=96, parallel_tool_calls=False)
FORCED = ModelSettings(max_tokens=96, parallel_tool_calls=False, tool_choice="required")


@dataclass
class Done:
    """Whether the tool was called."""

    called: bool = False


@function_tool(is_enabled=lambda context, agent: not context.context.called)
def book(context: RunContextWrapper[Done], city: City) -> str:
    """Books; offered once, as this model would call it again and again."""
    context.context.called = True
    return f"booked {city.name}"


def agent(model: Any) -> Agent:
    """Must call a tool, and then answer with a Trip, which is short."""
    return Agent(name="a", model=model, tools=[book], output_type=Trip, model_settings=FORCED)


@feature("chat, responses: a forced tool, then an answer; parallel_tool_calls=False")
async def loop() -> None:
    for model in MODELS:
        result = await Runner.run(agent(model), QUESTION, context=Done(), max_turns=3)
        assert "booked" in str([item.to_input_item() for item in result.new_items])
        assert isinstance(result.final_output, Trip)


@feature("chat, responses: streamed tool loop")
async def streamed() -> None:
    for model in MODELS:
        result = Runner.run_streamed(agent(model), QUESTION, context=Done(), max_turns=3)
        assert [event async for event in result.stream_events()]
        assert isinstance(result.final_output, Trip)


@feature("chat, responses: output_type with a nested model")
async def output() -> None:
    for model in MODELS:
        plain = Agent(name="a", model=model, output_type=Trip, model_settings=SETTINGS)
        assert isinstance((await Runner.run(plain, QUESTION)).final_output, Trip)


check("openai-agents")

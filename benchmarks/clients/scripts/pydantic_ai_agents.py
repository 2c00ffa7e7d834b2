"""pydantic-ai."""

from typing import Any

from features import HOST, KEY, MODEL, QUESTION, URL, City, Trip, check, feature
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.direct import model_request
from pydantic_ai.messages import ModelRequest, ToolCallPart, ToolReturnPart, UserPromptPart
from pydantic_ai.models import ModelRequestParameters
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.tools import ToolDefinition

provider = OpenAIProvider(base_url=URL, api_key=KEY)
MODELS: list[Any] = [
    OpenAIChatModel(MODEL, provider=provider),
    OpenAIResponsesModel(MODEL, provider=provider),
    AnthropicModel(MODEL, provider=AnthropicProvider(base_url=HOST, api_key=KEY)),
]
SHORT: Any = {"max_tokens": 16}
LONG: Any = {"max_tokens": 96, "parallel_tool_calls": False}


@feature("chat, responses, messages: run, stream, history")
async def run() -> None:
    for model in MODELS:
        agent = Agent(model, model_settings=SHORT)
        first = await agent.run(QUESTION)
        async with agent.run_stream(QUESTION, message_history=first.all_messages()) as stream:
            assert await stream.get_output()


@feature("chat, responses, messages: output_type with a nested model")
async def output() -> None:
    for model in MODELS:
        answer = await Agent(model, output_type=Trip, model_settings=LONG).run(QUESTION)
        assert isinstance(answer.output, Trip)


@feature("chat, responses: NativeOutput")
async def native() -> None:
    for model in MODELS[:2]:
        agent = Agent(model, output_type=NativeOutput(Trip), model_settings=LONG)
        assert isinstance((await agent.run(QUESTION)).output, Trip)


@feature("chat, responses: a tool that is forced, and its result sent back")
async def tools() -> None:
    request = ModelRequest([UserPromptPart(QUESTION)])
    parameters = City.model_json_schema()
    tool = ToolDefinition(name="book", parameters_json_schema=parameters)
    offered = ModelRequestParameters(function_tools=[tool], allow_text_output=True)
    for model in MODELS[:2]:
        forced: Any = LONG | {"tool_choice": "required"}
        response = await model_request(
            model, [request], model_settings=forced, model_request_parameters=offered
        )
        call = next(part for part in response.parts if isinstance(part, ToolCallPart))
        City.model_validate(call.args_as_dict())
        part = ToolReturnPart("book", "done", tool_call_id=call.tool_call_id)
        history = [request, response, ModelRequest([part])]
        answer = await model_request(
            model, history, model_settings=SHORT, model_request_parameters=offered
        )
        assert answer.parts


check("pydantic-ai-slim")

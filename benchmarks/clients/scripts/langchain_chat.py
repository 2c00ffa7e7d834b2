"""LangChain with langchain-openai and langchain-anthropic."""

from typing import Any

from features import HOST, KEY, MODEL, QUESTION, URL, City, Trip, check, feature
from langchain_anthropic import ChatAnthropic
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI


def model(**fields: Any) -> ChatOpenAI:
    """A chat model."""
    fields = {"max_tokens": 96} | fields
    return ChatOpenAI(model=MODEL, base_url=URL, api_key=KEY, max_retries=0, timeout=300, **fields)


@tool
def book(city: City) -> str:
    """Books."""
    return f"booked {city.name}"


@feature("invoke, stream with usage, abatch, completions")
async def plain() -> None:
    assert model(max_tokens=8).invoke(QUESTION).content
    chunks = list(model(max_tokens=8, stream_usage=True).stream(QUESTION))
    assert any(chunk.usage_metadata for chunk in chunks)
    assert len(await model(max_tokens=4).abatch([QUESTION, QUESTION])) == 2
    assert OpenAI(model=MODEL, base_url=URL, api_key=KEY, max_tokens=4).invoke("One")


@feature("with_structured_output: json_schema, function_calling, responses")
def structured() -> None:
    for method in ("json_schema", "function_calling"):
        assert isinstance(
            model().with_structured_output(Trip, method=method).invoke(QUESTION), Trip
        )
    via = model(use_responses_api=True).with_structured_output(Trip, method="json_schema")
    assert isinstance(via.invoke(QUESTION), Trip)


@feature("bind_tools: any, parallel_tool_calls=False, loop, streamed")
def tools() -> None:
    bound = model().bind_tools([book], tool_choice="any", parallel_tool_calls=False)
    answer = bound.invoke(QUESTION)
    call = answer.tool_calls[0]
    result = ToolMessage(book.invoke(call["args"]), tool_call_id=call["id"])
    history = [HumanMessage(QUESTION), answer, result]
    assert model(max_tokens=8).bind_tools([book]).invoke(history).content
    whole: Any = None
    for chunk in bound.stream(QUESTION):
        whole = chunk if whole is None else whole + chunk
    assert book.invoke(whole.tool_calls[0]["args"])


@feature("reasoning_effort; responses: invoke, stream, tools")
def responses() -> None:
    assert model(max_tokens=8, reasoning_effort="low").invoke(QUESTION).content
    via = model(max_tokens=16, use_responses_api=True)
    assert via.invoke(QUESTION).content and list(via.stream(QUESTION))
    bound = model(use_responses_api=True).bind_tools(
        [book], tool_choice="any", parallel_tool_calls=False
    )
    assert bound.invoke(QUESTION).tool_calls


@feature("ChatAnthropic: invoke, stream, with_structured_output")
def anthropic() -> None:
    claude = ChatAnthropic(
        model=MODEL, base_url=HOST, api_key=KEY, max_tokens=96, timeout=300, max_retries=0
    )
    assert claude.invoke(QUESTION, max_tokens=8).content
    assert list(claude.stream(QUESTION, max_tokens=8))
    assert isinstance(claude.with_structured_output(Trip).invoke(QUESTION), Trip)


check("langchain-openai")

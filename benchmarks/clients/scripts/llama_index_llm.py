"""LlamaIndex's OpenAILike."""

from typing import Any

from features import KEY, MODEL, QUESTION, URL, Trip, check, feature
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike


def model(**fields: Any) -> OpenAILike:
    """A model."""
    fields = {"is_chat_model": True, "max_tokens": 96} | fields
    return OpenAILike(model=MODEL, api_base=URL, api_key=KEY, timeout=300, max_retries=0, **fields)


@feature("complete, chat, stream, completion mode")
def plain() -> None:
    llm = model(max_tokens=8)
    messages = [ChatMessage(role="user", content=QUESTION)]
    assert llm.complete(QUESTION).text and llm.chat(messages).message.content
    assert list(llm.stream_chat(messages))
    assert model(is_chat_model=False, max_tokens=8).complete("One two").text


@feature("structured outputs")
def structured() -> None:
    llm = model(should_use_structured_outputs=True)
    assert isinstance(llm.structured_predict(Trip, PromptTemplate(QUESTION)), Trip)


@feature("function calling: structured_predict, predict_and_call")
def functions() -> None:
    llm = model(is_function_calling_model=True)
    assert isinstance(llm.structured_predict(Trip, PromptTemplate(QUESTION)), Trip)
    book = FunctionTool.from_defaults(lambda city, days: "done", name="book", fn_schema=Trip)
    assert str(llm.predict_and_call([book], QUESTION, tool_required=True)) == "done"


check("llama-index-llms-openai-like")

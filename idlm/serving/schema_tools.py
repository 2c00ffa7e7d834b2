"""The tools of a chat request, and the choice among them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field

from idlm.serving.errors import ApiError
from idlm.serving.strict import Strict


class Function(Strict):
    """The function of a tool; `parameters` is a JSON schema."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    """The name of a function in `tool_choice`."""

    name: str


class NamedTool(Strict):
    """The tool that the model must call."""

    type: Literal["function"]
    function: NamedFunction


class AllowedSet(Strict):
    """Some of the tools, and whether one of them must be called."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, fail_fast=True)]


class AllowedTools(Strict):
    """The tools that the model may call; the prompt has them all."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedSet

    @property
    def names(self) -> list[str]:
        return [tool.function.name for tool in self.allowed_tools.tools]


ToolChoice = (
    Literal["none", "auto", "required"] | Annotated[NamedTool | AllowedTools, Discriminator("type")]
)


def arguments_schema(name: str, parameters: dict[str, Any] | None) -> dict[str, Any]:
    """The schema of a tool's arguments, which are an object whether `parameters` says so or not;
    without `parameters` an empty one.

    Raises:
        ApiError: 400: they are no object.
    """
    if parameters is None:
        return {"type": "object", "additionalProperties": False}
    kind = parameters.get("type", "object")
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        raise ApiError(
            400, f"the parameters of tool {name!r} have the type {kind!r}; give an object", "tools"
        )
    return {**parameters, "type": "object"}

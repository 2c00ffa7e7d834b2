"""idlm: ordinary language models that decode several tokens per forward pass, with unchanged
output."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from idlm.engine.llm import LLM, Result
    from idlm.errors import InputError
    from idlm.models.idlm_model import Idlm
    from idlm.models.loading import load
    from idlm.params import Guide, SamplingParams, Thinking

__version__ = "0.1.0"
__all__ = ["LLM", "Guide", "Idlm", "InputError", "Result", "SamplingParams", "Thinking", "load"]

_HOMES = {
    "LLM": "engine.llm",
    "Result": "engine.llm",
    "SamplingParams": "params",
    "Guide": "params",
    "Thinking": "params",
    "InputError": "errors",
    "Idlm": "models.idlm_model",
    "load": "models.loading",
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used, so that the command line starts before torch
    does."""
    if name not in _HOMES:
        raise AttributeError(f"module 'idlm' has no attribute {name!r}")
    return getattr(import_module(f"idlm.{_HOMES[name]}"), name)

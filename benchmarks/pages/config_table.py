"""docs/config.md: the keys of a training config, from its dataclasses."""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Iterator
from inspect import getdoc
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from benchmarks.pages.tables import markdown
from idlm.training.config import TrainConfig
from idlm.training.strict import as_tree

NAMES = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true or false",
    dict: "mapping",
    type(None): "null",
}


HEAD = """# Keys of a training config

Written by `make pages` from the program. A config is a YAML file for `idlm train`; `configs/` has
examples with a comment beside each key, [converting.md](converting.md) the way from a model to a
converted one. Any key can be set on the command line: `--optimizer.lr=0.001 --stages.0.steps=50`.
An unknown key is refused with the nearest known one, a wrong value with the type expected. `null`
leaves the choice to the program.
"""
ATTRIBUTE = re.compile(r"^    (\w+): (.+(?:\n     +.+)*)", re.MULTILINE)


def render() -> str:
    """The page, from the top of the config down."""
    return "\n".join([HEAD, *_section(TrainConfig, "The top")]).rstrip() + "\n"


def _section(config: type, title: str) -> Iterator[str]:
    """A dataclass: its docstring, its keys, then the sections in it."""
    hints = get_type_hints(config)
    fields = dataclasses.fields(config)
    sections = [(f, _dataclass_in(hints[f.name])) for f in fields]
    text, meanings = _described(config)
    yield f"## {title}\n"
    yield text + "\n"
    rows = [
        (f"`{_key(f)}`", _type(hints[f.name]), _default(f), meanings[f.name].replace("|", "\\|"))
        for f, inner in sections
        if inner is None
    ]
    yield from markdown(("key", "value", "default", "meaning"), rows)
    yield ""
    for field, inner in sections:
        if inner is not None:
            several = get_origin(hints[field.name]) is tuple
            yield from _section(inner, f"`{_key(field)}`" + (", a list of" if several else ""))


def _described(config: type) -> tuple[str, dict[str, str]]:
    """The docstring without its list of attributes, and that list by name.

    Raises:
        ValueError: the list does not have just the fields.
    """
    text, _, listed = (getdoc(config) or "").partition("Attributes:\n")
    meanings = {name: " ".join(said.split()) for name, said in ATTRIBUTE.findall(listed)}
    names = {field.name for field in dataclasses.fields(config)}
    if differs := names ^ meanings.keys():
        raise ValueError(f"the docstring of {config.__name__} and its fields differ in {differs}")
    return text.strip(), meanings


def _key(field: dataclasses.Field[Any]) -> str:
    """The YAML key; `lambda` is a keyword of Python, so its field ends in an underscore."""
    return field.name.rstrip("_")


def _dataclass_in(hint: Any) -> type | None:
    """The dataclass of a hint, or of the items of a tuple."""
    inner = next(iter(get_args(hint)), None) if get_origin(hint) is tuple else hint
    return inner if isinstance(inner, type) and dataclasses.is_dataclass(inner) else None


def _type(hint: Any) -> str:
    """The name of a type for readers of YAML."""
    if get_origin(hint) is Literal:
        return ", ".join(f"`{option}`" for option in get_args(hint))
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_type(option) for option in get_args(hint))
    if get_origin(hint) is tuple:
        options = get_args(hint)
        return "list" if options[-1] is Ellipsis else f"list of {len(options)}"
    return NAMES[get_origin(hint) or hint]


def _default(field: dataclasses.Field[Any]) -> str:
    """The default in YAML; a key without one is required."""
    if field.default is dataclasses.MISSING:
        return "required"
    value = as_tree(field.default)
    words = {None: "null", True: "true", False: "false"}
    return (
        f"`{words[value]}`"
        if value is None or isinstance(value, bool)
        else f"`{value}`".replace("'", "")
    )

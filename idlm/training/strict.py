"""Strict conversion of plain values (YAML, JSON) to dataclasses, with overrides from a command
line.

The fields of a dataclass are the keys, its annotations the types; which dataclass does not matter.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Iterable
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from idlm.errors import InputError


def read_yaml(text: str, name: str) -> Any:
    """The plain values of a YAML text; an InputError refers to the text as `name`."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        line = str(error).replace("\n", " ")
        raise InputError(f"{name!r} is not YAML: {line}") from None


def override_key(tree: dict[str, Any], override: str) -> None:
    """Write one `--a.b=c` into the tree."""
    path, equals, value = override.removeprefix("--").partition("=")
    if not override.startswith("--") or not equals or not path:
        raise InputError(
            f"{override!r} is not an override; write --key=value, such as --optimizer.lr=0.001"
        )
    node: Any = tree
    *parents, last = path.split(".")
    for parent in parents:
        node = _child(node, parent, path)
    if isinstance(node, dict):
        node[last] = read_yaml(value, override)
    else:
        _child(node, last, path)
        node[int(last)] = read_yaml(value, override)


def _child(node: Any, name: str, path: str) -> Any:
    """The item `name` of a section (made if it is missing) or of a list."""
    if isinstance(node, dict):
        child = node.setdefault(name, {})
        if child is None:
            child = node[name] = {}
        return child
    if not isinstance(node, list):
        raise InputError(
            f"--{path}: {name!r} is inside a value, not a section; see configs/ for the keys"
        )
    if not name.isdecimal() or int(name) >= len(node):
        raise InputError(
            f"--{path}: {name!r} is not the number of one of its {len(node)} items; count from 0"
        )
    return node[int(name)]


def _key(attribute: dataclasses.Field[Any]) -> str:
    """The YAML key of a field; `lambda` is a keyword of Python, so its field ends in an
    underscore."""
    return attribute.name.rstrip("_")


def nearest(key: str, known: Iterable[str], prefix: str = "") -> str:
    """The known key that `key` may stand for; all of them if none is like it."""
    known = list(known)
    if close := difflib.get_close_matches(key, known, n=1):
        return f"the nearest known key is {prefix}{close[0]}"
    return f"the known keys are {', '.join(known)}"


def build(cls: type, tree: Any, where: str) -> Any:
    """Fill the dataclass `cls` from a mapping; `where` is its own key, "" at the top."""
    if not isinstance(tree, dict):
        raise InputError(f"{where} is {tree!r}; it must be a section with keys")
    fields = {_key(f): f for f in dataclasses.fields(cls)}
    hints = get_type_hints(cls)
    prefix = f"{where}." if where else ""
    for key in tree:
        if key not in fields:
            raise InputError(f"unknown key {prefix}{key}; {nearest(str(key), fields, prefix)}")
    for key, f in fields.items():
        if (
            key not in tree
            and f.default is dataclasses.MISSING
            and f.default_factory is dataclasses.MISSING
        ):
            raise InputError(f"the key {prefix}{key} is missing; add it to the config")
    names = {key: f.name for key, f in fields.items()}
    return cls(
        **{
            names[key]: _convert(value, hints[names[key]], prefix + key)
            for key, value in tree.items()
        }
    )


def _convert(value: Any, hint: Any, key: str) -> Any:
    """`value` as the type `hint`, or an InputError that names the key, the value and the type."""
    if dataclasses.is_dataclass(hint):
        return build(hint, value, key)  # type: ignore[arg-type]
    if get_origin(hint) is tuple:
        return _convert_list(value, get_args(hint), key)
    if get_origin(hint) in (Union, types.UnionType):
        for option in get_args(hint):
            try:
                return _convert(value, option, key)
            except InputError:
                if _like(value, option):  # the error is of an item or a key in it
                    raise
    elif get_origin(hint) is Literal:
        if any(value == option and type(value) is type(option) for option in get_args(hint)):
            return value
    elif hint is float:
        if (number := _number(value)) is not None:
            return number
    elif isinstance(value, get_origin(hint) or hint) and not (
        hint is int and isinstance(value, bool)
    ):
        return value
    raise InputError(f"{key} is {value!r}; expected {_name(hint)}")


def _like(value: Any, hint: Any) -> bool:
    """Whether a value is a list or a mapping, and the type is one for those."""
    is_list = get_origin(hint) is tuple and isinstance(value, list | tuple)
    return is_list or (dataclasses.is_dataclass(hint) and isinstance(value, dict))


def _convert_list(value: Any, options: tuple[Any, ...], key: str) -> tuple[Any, ...]:
    """A list as a tuple: of any length if the hint is `tuple[T, ...]`, else of the hint's
    length."""
    any_length = options[-1] is Ellipsis
    if not isinstance(value, list | tuple) or not (any_length or len(value) == len(options)):
        raise InputError(
            f"{key} is {value!r}; expected a list" + ("" if any_length else f" of {len(options)}")
        )
    return tuple(
        _convert(item, options[0] if any_length else options[i], f"{key}.{i}")
        for i, item in enumerate(value)
    )


def _number(value: Any) -> float | None:
    """A float, also from text: YAML 1.1 reads 1e-3 as text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def _name(hint: Any) -> str:
    """The name of a type in error messages."""
    if hint is type(None):
        return "null"
    if get_origin(hint) is tuple:
        return "a list"
    if dataclasses.is_dataclass(hint):
        return "a mapping"
    if get_origin(hint) in (Union, types.UnionType, Literal):
        return " or ".join(_name(option) for option in get_args(hint))
    return hint.__name__ if isinstance(hint, type) else str(hint)


def as_tree(config: Any) -> Any:
    """The plain values of a config, as in YAML; `parse_config` reads them back."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {_key(f): as_tree(getattr(config, f.name)) for f in dataclasses.fields(config)}
    return [as_tree(item) for item in config] if isinstance(config, tuple) else config

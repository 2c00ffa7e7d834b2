"""The house rules: imports run one way, files and functions stay readable."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import idlm

ROOT = Path(idlm.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
EVERYWHERE = {
    "chat_template",
    "environment",
    "errors",
    "extras",
    "guides",
    "inputs",
    "messages",
    "params",
    "plots",
    "progress",
    "__version__",
}
"""Modules at the package's top that every package may use."""
MAY_IMPORT = {
    "decoding": set(),
    "models": {"decoding"},
    "kernels": {"decoding"},
    "attention": {"decoding", "kernels"},
    "engine": {"config", "decoding", "models", "kernels", "attention"},
    "baselines": {"decoding", "models"},
    "nano": {"decoding", "models", "engine", "evaluation", "training"},
    "training": {"config", "decoding", "models", "engine"},
    "evaluation": {"baselines", "config", "decoding", "models", "engine", "nano"},
    "serving": {"config", "decoding", "models", "engine"},
    "ui": {"decoding", "models", "engine"},
    "integrations": {"config", "serving"},
    "cli": {
        "config",
        "decoding",
        "models",
        "engine",
        "nano",
        "training",
        "evaluation",
        "baselines",
        "serving",
        "ui",
    },
}


def imports(file: Path) -> set[str]:
    """Full names of the modules that `file` imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize(
    "file", [file for file in FILES if file.parent != ROOT], ids=lambda f: str(f.relative_to(ROOT))
)
def test_imports_run_one_way(file: Path) -> None:
    package = file.relative_to(ROOT).parts[0]
    ours = (
        {name.split(".")[1] for name in imports(file) if name.startswith("idlm.")}
        - {package}
        - EVERYWHERE
    )
    assert ours <= MAY_IMPORT[package], f"{file} imports {ours - MAY_IMPORT[package]}"


def test_no_module_imports_itself_through_others() -> None:
    """Imports within functions count: a circle that is only hidden is one."""
    modules = {
        ".".join(file.relative_to(ROOT.parent).with_suffix("").parts): file for file in FILES
    }
    graph = {name: imports(file) & (modules.keys() - {name}) for name, file in modules.items()}
    for start in graph:
        reached, waiting = set(), [start]
        while waiting:
            new = graph[waiting.pop()] - reached
            reached |= new
            waiting += new
        assert start not in reached, f"{start} imports itself through {sorted(reached)}"


def test_what_every_package_uses_imports_no_package() -> None:
    for name in EVERYWHERE - {"__version__"}:
        assert {
            module.split(".")[1]
            for module in imports(ROOT / f"{name}.py")
            if module.startswith("idlm.")
        } <= EVERYWHERE


def test_the_mathematics_import_torch_and_nothing_else() -> None:
    allowed = {
        "torch",
        "idlm",
        "__future__",
        "collections",
        "dataclasses",
        "enum",
        "functools",
        "math",
        "typing",
    }
    for file in (ROOT / "decoding").glob("*.py"):
        assert {name.split(".")[0] for name in imports(file)} <= allowed, file


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_files_and_functions_stay_short(file: Path) -> None:
    text = file.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            documented = ast.get_docstring(node) is not None
            body = node.body[documented:]  # the options of a command take a line each
            lines = (node.end_lineno or 0) - body[0].lineno if body else 0
            assert lines < 60, f"{file}: {node.name}"


MOST_PARAMETERS = 8


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    given = function.args
    named = [one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return [*named[named[:1] in (["self"], ["cls"]) :], *(["*"] if given.vararg else [])]


def is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether it is compiled by Triton, which takes pointers and sizes one by one."""
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_functions_have_few_parameters(file: Path) -> None:
    """Those of the CLI have one for each option of a command."""
    if file.is_relative_to(ROOT / "cli"):
        return
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not is_kernel(node):
            assert len(parameters(node)) <= MOST_PARAMETERS, f"{file}: {node.name}"

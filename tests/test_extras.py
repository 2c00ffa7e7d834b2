"""The library alone needs none of the extras' packages; what needs one says so in one line."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from idlm.extras import MODULES
from tests.waiting import HANG_SECONDS

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
PACKAGES = {"yaml": "pyyaml", "fastapi_offline": "fastapi-offline", "lm_eval": "lm-eval"}
"""Packages that are not called as their module is."""
NEEDED = {"yaml", "httpx2"}
LIBRARY = sorted({module for modules in MODULES.values() for module in modules} - NEEDED)
"""Modules that must not be needed; transformers itself needs yaml, huggingface_hub httpx2."""


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[>=;]", requirement)[0] for requirement in requirements}


def run(code: str, without: list[str]) -> subprocess.CompletedProcess[str]:
    """A new Python that cannot import the modules `without`."""
    block = f"import sys; sys.modules.update(dict.fromkeys({without!r}))\n"
    command = [sys.executable, "-c", block + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS)


def run_command(words: list[str], without: list[str]) -> subprocess.CompletedProcess[str]:
    return run(f"from idlm.cli import app; app({words!r})", without)


@pytest.mark.parametrize("extra", MODULES)
def test_an_extra_brings_what_is_imported(extra: str) -> None:
    brought = names(PROJECT["optional-dependencies"][extra]) - names(PROJECT["dependencies"])
    assert brought == {PACKAGES.get(module, module) for module in MODULES[extra]}


def test_all_is_all_but_those_that_bring_dozens_of_packages() -> None:
    (requirement,) = PROJECT["optional-dependencies"]["all"]
    assert set(requirement.removeprefix("idlm[").removesuffix("]").split(",")) == set(MODULES) - {
        "eval",
        "wandb",
        "mlflow",
        "ray",
    }


@pytest.mark.parametrize(
    ("words", "extra"),
    [
        (["serve", "nano"], "serve"),
        (["train", "configs/nano-lora.yaml"], "train"),
        (["distill", "nano", "prompts.jsonl", "-o", "rows"], "train"),
        (["report", "runs/mine"], "report"),
        (["chat", "--url", "http://127.0.0.1:1/v1"], "chat"),
        (["eval", "--list"], "eval"),
    ],
    ids=["serve", "train", "distill", "report", "chat", "eval"],
)
def test_a_missing_extra_is_one_line(words: list[str], extra: str) -> None:
    for module in MODULES[extra]:
        done = run_command(words, [module])
        command = " ".join(["idlm", words[0], *(["--url"] if extra == "chat" else [])])
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr == (
            f"error: {command} needs the package {module}; "
            f"install it with pip install 'idlm[{extra}]'\n"
        )


@pytest.mark.parametrize("name", ["a.parquet", "owner/dataset"])
def test_tables_say_which_package_they_need(name: str) -> None:
    code = (
        "from idlm.training.tables import Tables\n"
        f"try: list(Tables(({name!r},)).rows())\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    (module,) = run(code, ["datasets", "pyarrow"]).stdout.splitlines()
    assert re.fullmatch(
        f"InputError .*{name}.* needs the package datasets; "
        r"install it with pip install 'idlm\[data\]'",
        module,
    )


def test_the_library_and_its_commands_need_none() -> None:
    code = (
        "from idlm import LLM, SamplingParams\n"
        "params = SamplingParams(temperature=0, max_tokens=4)\n"
        "print(len(LLM('nano', max_num_seqs=1).generate('Mia has', params)[0].token_ids))"
    )
    done = run(code, LIBRARY)
    assert done.stdout == "4\n", done.stderr
    done = run_command(["generate", "nano", "Mia has", "--max-tokens", "4", "--raw"], LIBRARY)
    assert done.returncode == 0, done.stderr

"""Every block of commands in the documents is run by a test, or says above it why not. Run or not,
its commands exist, with their options."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from typer import Context
from typer.exceptions import TyperException
from typer.main import get_command

from idlm.cli import app
from idlm.errors import InputError
from idlm.training.read_config import load_config
from tests.docs.shell import ROOT, SHELL, all_blocks, blocks

GENERATED = {"cli.md"}
"""Shows the usage of each command; a test compares it with the program."""
PAGES = sorted(
    page
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    if page.name not in GENERATED
)
RUN = {
    "README.md": "test_readme.py",
    "converting.md": "test_converting.py",
    "tour.md": "test_tour.py",
}
"""The pages whose `idlm` commands a test of this folder runs."""
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COMMANDS = get_command(app).commands


def fault(words: list[str]) -> str | None:
    """What is wrong with a command, without running it; None: nothing that can be seen."""
    program, *rest = words
    if program == "idlm":
        return unknown(rest)
    if program == "make":
        return None if rest[:1] and rest[0] in TARGETS else "there is no such target"
    if program == "pip":
        extras = {extra for word in rest for extra in extras_of(word)}
        missing = extras - PROJECT["optional-dependencies"].keys()
        return f"there is no extra {missing}" if missing else None
    return None


def unknown(words: list[str]) -> str | None:
    """What the program's own parser says of a command."""
    try:
        context: Context = COMMANDS[words[0]].make_context(words[0], words[1:])
        if words[0] == "train":
            load_config(ROOT / context.params["config"], context.args)
    except KeyError:
        return "there is no such command"
    except (TyperException, InputError) as error:
        return str(error)
    return None


def extras_of(word: str) -> list[str]:
    """The extras of this project that a requirement names."""
    found = re.search(r"(?:idlm|\.|\.whl\))\[([\w,]+)\]$", word)
    return found[1].split(",") if found else []


def faults(name: str, page: str) -> list[str]:
    """What is wrong with the blocks of a page."""
    found = []
    for block in all_blocks(page):
        if block.language not in SHELL:
            continue
        for words in block.commands:
            line, wrong = " ".join(words), fault(words)
            checked = words[0] in ("make", "pip") or (words[0] == "idlm" and name in RUN)
            if wrong:
                found.append(f"{line}: {wrong}")
            elif not checked and not block.reason:
                found.append(f"{line}: no test runs it, and no comment says why")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_exists_and_is_run_or_says_why_not(page: Path) -> None:
    assert faults(page.name, page.read_text()) == []


@pytest.mark.parametrize(
    ("block", "wrong"),
    [
        ("```sh\ncurl http://127.0.0.1:8000\n```", "no test runs it"),
        ("```bash\nidlm generate nano Hello\n```", "no test runs it"),
        ("```console\n$ idlm generate nano Hello\nHi\n```", "no test runs it"),
        ("<!-- not run: -->\n```sh\nidlm generate nano Hello\n```", "no test runs it"),
        ("<!-- not run: slow -->\n```sh\nidlm generates nano\n```", "no such command"),
        ("<!-- not run: slow -->\n```sh\nidlm generate nano --strid 8\n```", "--strid"),
        ("<!-- not run: slow -->\n```sh\nidlm generate nano \\\n    --stride\n```", "--stride"),
        (
            "<!-- not run: slow -->\n```sh\nidlm train configs/nano-lora.yaml --lora.rnk=1\n```",
            "rnk",
        ),
        ("```sh\nmake everything\n```", "no such target"),
        ("```sh\npip install '.[nothing]'\n```", "no extra {'nothing'}"),
    ],
)
def test_what_is_wrong_is_found(block: str, wrong: str) -> None:
    (found,) = faults("page.md", f"Text.\n\n{block}\n")
    assert wrong in found


def test_a_reason_and_a_test_are_enough() -> None:
    block = "```sh\nidlm generate nano Hello  # as it is\n```\n"
    assert faults("page.md", f"<!-- not run: slow -->\n{block}") == []
    assert faults("README.md", block) == []


def test_the_tests_that_run_pages_are_there() -> None:
    for page, test in RUN.items():
        assert page in (Path(__file__).parent / test).read_text()


PROGRAMS = [
    pytest.param(block, id=f"{page.name}: {block.splitlines()[0]}")
    for page in PAGES
    if page.name != "README.md"  # test_readme.py runs its own
    for block in blocks(page.read_text(), "python")
]


@pytest.mark.parametrize("block", PROGRAMS)
def test_programs_run(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "block", "exec"), {})
    assert capsys.readouterr().out

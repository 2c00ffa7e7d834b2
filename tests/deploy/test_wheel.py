"""What a wheel and a source distribution have in them, by what the compiler can do; a fake one, so
it is quick."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from idlm.kernels.instruction_sets import INSTRUCTION_SETS, machine
from tests.waiting import HANG_SECONDS

ROOT = Path(__file__).parents[2]
HERE = [one.name for one in INSTRUCTION_SETS.values() if one.machine == machine()]
pytestmark = pytest.mark.skipif(not HERE, reason="there are no C kernels for this platform")
FILES = (
    "setup.py",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "idlm/__init__.py",
    "idlm/kernels/__init__.py",
)
COMPILER = """#!/bin/sh
case " $* " in *" $REFUSED "*) echo "cc: error: unrecognized option '$REFUSED'" >&2; exit 1;; esac
while [ $# -gt 0 ]; do [ "$1" = -o ] && echo compiled > "$2"; shift; done
"""
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])('dist')"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A checkout with the kernels and nothing else of the package."""
    for name in (*FILES, "idlm/kernels/compiling.py", "idlm/kernels/instruction_sets.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "idlm/kernels/csrc", tmp_path / "idlm/kernels/csrc")
    (tmp_path / "cc").write_text(COMPILER)
    (tmp_path / "cc").chmod(0o755)
    return tmp_path


def build(tree: Path, what: str, compiler: str = "", refused: str = "-no-such") -> tuple[Path, str]:
    """Run a hook of the build backend, as pip does; what it made, and what it said."""
    environment = {**os.environ, "CC": compiler or str(tree / "cc"), "REFUSED": refused}
    run = [sys.executable, "-c", BUILD, what]
    result = subprocess.run(
        run, cwd=tree, env=environment, capture_output=True, text=True, timeout=HANG_SECONDS
    )
    assert result.returncode == 0, result.stderr
    (made,) = (tree / "dist").iterdir()
    return made, result.stderr


def libraries(wheel: Path) -> list[str]:
    """Names of the instruction sets that a wheel has a library for."""
    found = (
        re.fullmatch(r"idlm/kernels/lib/(\w+)-[0-9a-f]{24}\.so", name)
        for name in zipfile.ZipFile(wheel).namelist()
    )
    return sorted(match[1] for match in found if match)


def is_pure(wheel: Path) -> bool:
    """By the wheel's own words."""
    return (
        "Root-Is-Purelib: true"
        in zipfile.ZipFile(wheel).read("idlm-0.1.0.dist-info/WHEEL").decode()
    )


def test_a_wheel_has_every_library_and_is_for_this_platform_and_any_python(tree: Path) -> None:
    stale = [
        tree / "build/lib/idlm/kernels" / name
        for name in ("lib/avx2-000000000000000000000000.so", "csrc/old.h")
    ]
    for one in stale:  # left by a build of other sources
        one.parent.mkdir(parents=True)
        one.write_text("")
    wheel, _ = build(tree, "build_wheel")
    assert re.fullmatch(rf"idlm-0\.1\.0-py3-none-\w+_{machine()}\.whl", wheel.name) and not is_pure(
        wheel
    )
    assert libraries(wheel) == sorted(HERE)
    sources = {f"idlm/kernels/csrc/{one.name}" for one in (ROOT / "idlm/kernels/csrc").iterdir()}
    assert {name for name in zipfile.ZipFile(wheel).namelist() if "csrc" in name} == sources
    assert not any(".data/" in name for name in zipfile.ZipFile(wheel).namelist())


@pytest.mark.skipif(machine() != "x86_64", reason="one instruction set alone")
def test_a_compiler_that_is_too_old_for_some_leaves_them_out(tree: Path) -> None:
    wheel, said = build(tree, "build_wheel", refused="-mavxvnni")
    assert libraries(wheel) == sorted(set(HERE) - {"avx2_vnni"}) and not is_pure(wheel)
    assert "without the C kernels for avx2_vnni: cc: error: unrecognized option '-mavxvnni'" in said


def test_without_a_compiler_the_wheel_is_for_every_platform(tree: Path) -> None:
    wheel, said = build(tree, "build_wheel", compiler="/no/such/compiler")
    assert wheel.name == "idlm-0.1.0-py3-none-any.whl" and is_pure(wheel) and not libraries(wheel)
    assert "without the C kernels" in said and "/no/such/compiler" in said


def test_an_editable_install_compiles_nothing(tree: Path) -> None:
    wheel, said = build(tree, "build_editable", compiler="/no/such/compiler")
    assert (
        wheel.name.endswith("py3-none-any.whl") and not libraries(wheel) and "compiler" not in said
    )


def test_a_source_distribution_builds(tree: Path) -> None:
    made, _ = build(tree, "build_sdist")
    with tarfile.open(made) as archive:
        archive.extractall(tree / "unpacked", filter="data")
    (unpacked,) = (tree / "unpacked").iterdir()
    wheel, _ = build(unpacked, "build_wheel", compiler=str(tree / "cc"))
    assert libraries(wheel) == sorted(HERE)

"""The wheel's build step: the C kernels go into it, compiled for every instruction set of this
platform.

All else is in pyproject.toml. Neither torch nor idlm is there when a wheel is built, so the two
modules that say what is compiled, and how, are loaded by their paths. Without a C compiler, or with
one that is too old for an instruction set, the wheel is built without those libraries. An editable
install has none, and compiles at first use.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

KERNELS = Path("idlm", "kernels")


def load(name: str) -> ModuleType:
    """A module of idlm.kernels, without running the packages around it."""
    spec = importlib.util.spec_from_file_location(
        f"kernels_{name}", Path(__file__).parent / KERNELS / f"{name}.py"
    )
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


compiling, instruction_sets = load("compiling"), load("instruction_sets")


class Package(Distribution):
    """What is built; it belongs to a platform once it has compiled kernels."""

    kernels: int = 0

    def has_ext_modules(self) -> bool:
        """Whether it does."""
        return self.kernels > 0


class BuildPackage(build_py):
    """The package's files, and its libraries beside them."""

    distribution: Package

    def run(self) -> None:
        """Copy the files and compile; what an earlier build left of the kernels goes first."""
        if not self.editable_mode:
            for folder in ("csrc", "lib"):
                shutil.rmtree(Path(self.build_lib, KERNELS, folder), ignore_errors=True)
        super().run()
        if not self.editable_mode:
            self.distribution.kernels = compile_all(Path(self.build_lib, KERNELS, "lib"))


class BuildWheel(bdist_wheel):
    """The wheel: for any Python on this platform if it has libraries, else for any platform."""

    distribution: Package

    def run(self) -> None:
        """Build first, since what could be compiled decides the rest."""
        self.run_command("build")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        """Python, ABI and platform: the libraries are loaded by ctypes, so they depend on no
        Python."""
        return "py3", "none", super().get_tag()[2]


def compile_all(to: Path) -> int:
    """Compile the libraries of this platform into a folder; returns how many there are."""
    here = instruction_sets.machine()
    targets = [one for one in instruction_sets.INSTRUCTION_SETS.values() if one.machine == here]
    try:
        command = compiling.compiler()
    except OSError as error:
        warn("the C kernels", error)
        return 0
    return sum(compile_one(command, one, to) for one in targets)


def compile_one(command: str, target: Any, to: Path) -> bool:
    """Compile a library into a folder, which is made; returns whether that worked."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            made = compiling.compile_library(command, target, Path(folder))
            to.mkdir(parents=True, exist_ok=True)
            shutil.copy(made, to)
    except (OSError, subprocess.SubprocessError) as error:
        warn(f"the C kernels for {target.name}", error)
        return False
    print(f"compiled the C kernels for {target.name}")
    return True


def warn(without: str, error: Exception) -> None:
    """Say what the wheel lacks."""
    print(
        f"warning: the wheel is built without {without}: {compiling.reason(error)}", file=sys.stderr
    )


if __name__ == "__main__":
    setup(distclass=Package, cmdclass={"build_py": BuildPackage, "bdist_wheel": BuildWheel})

"""The C kernels for a CPU (csrc/): one library for each instruction set, all from one source.

A wheel brings the libraries of its platform; from a source checkout the machine's C compiler builds the one that the
processor needs at its first use, into the user's cache. Loading a library registers the operators `torch.ops.idlm.*`.
Where there is none the PyTorch twins serve; the log says once what that costs.

`IDLM_NATIVE` is `auto` (the best the processor has; the default), `0` (none), or the name of an instruction set.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from idlm.decoding.errors import InputError
from idlm.kernels.instruction_sets import INSTRUCTION_SETS, InstructionSet, best, runs_here

log = logging.getLogger("idlm")

SOURCES = Path(__file__).parent / "csrc"
LIBRARIES = Path(__file__).parent / "lib"
"""Where a wheel has its libraries; a source checkout has none."""
FLAGS = ("-std=c11", "-O3", "-fopenmp", "-fPIC")
FAST = "-ffast-math"
"""For compiling alone: where fast math is given for linking too, it changes the whole process's rounding."""
FUSED = "-ffp-contract=fast"
"""Sums in the order that they are written in, with fused multiply-adds: a row's bits do not depend on its tile, and
those of int8 not on the instruction set."""
UNITS = (
    ("window_attention.c", FAST, "-DREAL=float", "-DREAL_BYTES=4", "-DEXP=expf"),
    ("window_attention.c", FAST, "-DREAL=double", "-DREAL_BYTES=8", "-DEXP=exp"),
    ("linear.c", FUSED),
    ("rows.c", FAST),
    ("ops.c",),
)


@cache
def loaded() -> bool:
    """Whether the operators are there; the first call builds and loads them.

    Raises:
        InputError: IDLM_NATIVE names an instruction set that is unknown, or that this processor does not have.
    """
    wanted = instruction_set()
    if wanted is None:
        if os.environ.get("IDLM_NATIVE") != "0":
            log.warning("no C kernels: there are none for %s; PyTorch's operators serve", platform.machine())
        return False
    try:
        failed = ctypes.CDLL(str(library(wanted))).idlm_register()
    except (OSError, subprocess.SubprocessError) as error:
        why = str(getattr(error, "stderr", "") or error).strip()
        log.warning("no C kernels: PyTorch's operators serve, at about half the speed (%s)", why)
        return False
    if failed:
        log.warning("no C kernels: torch %s does not take them; PyTorch's operators serve", torch.__version__)
    return not failed


def instruction_set() -> InstructionSet | None:
    """The one whose library is used, by IDLM_NATIVE and the processor; None where there is to be none.

    Raises:
        InputError: IDLM_NATIVE names an instruction set that is unknown, or that this processor does not have.
    """
    wanted = os.environ.get("IDLM_NATIVE", "auto")
    if wanted == "0":
        return None
    if wanted in ("auto", "1", ""):
        return best()
    if wanted not in INSTRUCTION_SETS:
        raise InputError(f"IDLM_NATIVE={wanted!r} is unknown; use auto, 0, or one of {', '.join(INSTRUCTION_SETS)}")
    if not runs_here(INSTRUCTION_SETS[wanted]):
        raise InputError(f"IDLM_NATIVE={wanted!r}: this processor does not have it; use auto")
    return INSTRUCTION_SETS[wanted]


def sources() -> str:
    """The text of all kernels."""
    return "".join(place.read_text() for place in sorted(SOURCES.glob("*.[ch]")))


def facts() -> tuple[str, ...]:
    """What measurements of the kernels depend on, beside the machine."""
    target = instruction_set()
    return sources(), repr(UNITS), torch.__version__, "" if target is None else target.name


def user_cache(name: str) -> Path:
    """Where this user's files of one kind stay between runs; it may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "idlm" / name


def library(target: InstructionSet) -> Path:
    """The shared library for an instruction set: the wheel's, or from the cache, or built now.

    Raises:
        OSError: there is neither a library nor a C compiler.
        subprocess.SubprocessError: the compiler failed.
    """
    shipped = LIBRARIES / f"{target.name}.so"
    if shipped.exists():
        return shipped
    compiler = os.environ.get("CC") or shutil.which("cc")
    if compiler is None:
        raise FileNotFoundError("no C compiler (cc) on the PATH; install one, or set CC")
    facts = (sources(), repr(UNITS), *FLAGS, *target.flags, compiler, platform.machine())
    home = user_cache("kernels")
    place = home / f"{hashlib.sha256(''.join(facts).encode()).hexdigest()[:24]}.so"
    if not place.exists():
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home) as folder:  # others may be building the same
            build(compiler, target, Path(folder)).replace(place)
    return place


def build(compiler: str, target: InstructionSet, folder: Path) -> Path:
    """Compile the library for an instruction set into `folder`; neither torch nor its headers are needed.

    It names torch's library as one it needs, so that the loader finds the operators' C interface there: a stub of that
    name serves for linking.
    """
    objects = compile_units(compiler, target, folder)
    made = folder / f"{target.name}.so"
    if platform.system() == "Darwin":
        _run(compiler, "-dynamiclib", "-undefined", "dynamic_lookup", "-fopenmp", *objects, "-o", str(made))
        return made
    stub = folder / "libtorch_cpu.so"
    _run(compiler, "-shared", "-Wl,-soname,libtorch_cpu.so", "-x", "c", os.devnull, "-o", str(stub))
    linking = ("-shared", "-fopenmp", "-Wl,--no-as-needed", f"-L{folder}", "-ltorch_cpu", "-lm")
    _run(compiler, *objects, *linking, "-o", str(made))
    return made


def compile_units(
    compiler: str, target: InstructionSet, folder: Path, units: Sequence[tuple[str, ...]] = UNITS, *flags: str
) -> list[str]:
    """Compile units for an instruction set into `folder`, with `flags` beside its own; returns the objects."""
    objects = []
    for number, (source, *own) in enumerate(units):
        objects.append(str(folder / f"{number}.o"))
        command = (compiler, *FLAGS, *target.flags, *flags, *own)
        _run(*command, "-c", str(SOURCES / source), "-o", objects[-1])
    return objects


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)

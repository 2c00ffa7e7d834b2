"""How the C kernels (csrc/) are compiled: one library for each instruction set, all from one
source.

It imports the standard library alone: the build of a wheel, which has neither torch nor idlm, loads
this file by its path (setup.py).
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from idlm.kernels.instruction_sets import InstructionSet

SOURCES = Path(__file__).parent / "csrc"
FLAGS = ("-std=c11", "-O3", "-fopenmp", "-fPIC")
FAST = "-ffast-math"
"""For compiling alone: where fast math is given for linking too, it changes the whole process's
rounding."""
FUSED = "-ffp-contract=fast"
"""Sums in the order that they are written in, with fused multiply-adds: a row's bits do not depend
on its tile, and those of int8 not on the instruction set."""
UNITS = (
    ("window_attention.c", FAST, "-DREAL=float", "-DREAL_BYTES=4", "-DEXP=expf"),
    ("window_attention.c", FAST, "-DREAL=double", "-DREAL_BYTES=8", "-DEXP=exp"),
    ("linear.c", FUSED),
    ("rows.c", FAST),
    ("ops.c", "-fexceptions"),
)
LINKING = {
    "Linux": ("-shared", "-fopenmp", "-Wl,--no-as-needed", "-ltorch_cpu", "-lm"),
    "Darwin": ("-dynamiclib", "-fopenmp", "-undefined", "dynamic_lookup"),
}
STUB = ("-shared", "-Wl,-soname,libtorch_cpu.so", "-x", "c", os.devnull)


def compiler() -> str:
    """The C compiler's command: CC, or cc.

    Raises:
        FileNotFoundError: there is none.
    """
    found = os.environ.get("CC") or shutil.which("cc")
    if found is None:
        raise FileNotFoundError("no C compiler (cc) on the PATH; install one, or set CC")
    return found


def fingerprint(target: InstructionSet) -> str:
    """Of all that a library is made from, except the compiler."""
    texts = [f"{place.name}\n{place.read_text()}" for place in sorted(SOURCES.glob("*.[ch]"))]
    facts = (*texts, repr((UNITS, FLAGS, LINKING, STUB, target.flags)))
    return hashlib.sha256("".join(facts).encode()).hexdigest()[:24]


def file_name(target: InstructionSet) -> str:
    """Of a library; one that was made from other sources has another name, so it is never taken for
    this one."""
    return f"{target.name}-{fingerprint(target)}.so"


def compile_library(command: str, target: InstructionSet, folder: Path) -> Path:
    """Compile the library of an instruction set into `folder`; neither torch nor its headers are
    needed.

    On Linux it names torch's library as one it needs, so that the loader finds the operators' C
    interface there: a stub of that name serves for linking.

    Raises:
        OSError: the compiler does not start.
        subprocess.SubprocessError: it failed.
    """
    folder = folder.absolute()
    objects = compile_units(command, target, folder)
    made = folder / file_name(target)
    system = "Darwin" if platform.system() == "Darwin" else "Linux"
    if system == "Linux":
        _run(command, *STUB, "-o", str(folder / "libtorch_cpu.so"))
    _run(command, *objects, f"-L{folder}", *LINKING[system], "-o", str(made))
    return made


def compile_units(
    command: str,
    target: InstructionSet,
    folder: Path,
    units: Sequence[tuple[str, ...]] = UNITS,
    *flags: str,
) -> list[str]:
    """Compile units for an instruction set into `folder`, with `flags` beside their own; returns
    the objects."""
    objects = [str(folder / f"{target.name}-{number}.o") for number in range(len(units))]
    for (source, *own), to in zip(units, objects, strict=True):
        _run(command, *FLAGS, *target.flags, *flags, *own, "-c", source, "-o", to)
    return objects


def _run(command: str, *arguments: str) -> None:
    """Where the sources lie: so that no path of this machine gets into a library."""
    whole = (*shlex.split(command), *arguments)
    subprocess.run(whole, check=True, capture_output=True, text=True, timeout=600, cwd=SOURCES)


def reason(error: Exception) -> str:
    """What went wrong, in one line; a compiler's first complaint."""
    lines = str(getattr(error, "stderr", "") or error).strip().splitlines()
    return next(
        (line for line in lines if "error" in line), lines[0] if lines else type(error).__name__
    )

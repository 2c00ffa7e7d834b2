"""Compiles the C kernels (csrc/): a library for each instruction set, all from the same source.

This module imports only the standard library. The build of a wheel, which has neither torch nor
idlm, loads it by its path (setup.py).
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
"""For compiling only: linking with -ffast-math sets flush-to-zero for the whole process."""
FUSED = "-ffp-contract=fast"
"""Fused multiply-adds, but sums in the order of the source: the bits of a row do not depend on its
tile, and those of int8 do not depend on the instruction set."""
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
    """The command of the C compiler: the variable CC, else `cc` on the PATH.

    Raises:
        FileNotFoundError: there is none.
    """
    command = os.environ.get("CC") or shutil.which("cc")
    if command is None:
        raise FileNotFoundError("no C compiler (cc) on the PATH; install one, or set CC")
    return command


def fingerprint(target: InstructionSet) -> str:
    """A hash of the sources and flags of a library; the compiler is not part of it."""
    texts = [f"{path.name}\n{path.read_text()}" for path in sorted(SOURCES.glob("*.[ch]"))]
    facts = (*texts, repr((UNITS, FLAGS, LINKING, STUB, target.flags)))
    return hashlib.sha256("".join(facts).encode()).hexdigest()[:24]


def file_name(target: InstructionSet) -> str:
    """The file name of a library. It has the fingerprint, so that a library of other sources is
    never loaded."""
    return f"{target.name}-{fingerprint(target)}.so"


def compile_library(command: str, target: InstructionSet, folder: Path) -> Path:
    """Compile the library of an instruction set into `folder`, without torch or its headers.

    On Linux the library depends on libtorch_cpu.so, where the loader finds torch's C interface. For
    linking an empty stub of that name is enough.

    Raises:
        OSError: the compiler does not start.
        subprocess.SubprocessError: it failed.
    """
    folder = folder.absolute()
    objects = compile_units(command, target, folder)
    library = folder / file_name(target)
    system = "Darwin" if platform.system() == "Darwin" else "Linux"
    if system == "Linux":
        _run(command, *STUB, "-o", str(folder / "libtorch_cpu.so"))
    _run(command, *objects, f"-L{folder}", *LINKING[system], "-o", str(library))
    return library


def compile_units(
    command: str,
    target: InstructionSet,
    folder: Path,
    units: Sequence[tuple[str, ...]] = UNITS,
    *flags: str,
) -> list[str]:
    """Compile units (source file and its flags) into `folder`, with additional `flags`.

    Returns the paths of the objects.
    """
    objects = [str(folder / f"{target.name}-{index}.o") for index in range(len(units))]
    for (source, *unit_flags), to in zip(units, objects, strict=True):
        _run(command, *FLAGS, *target.flags, *flags, *unit_flags, "-c", source, "-o", to)
    return objects


def _run(command: str, *arguments: str) -> None:
    """Run the compiler in the folder of the sources, so that no absolute path is in a library."""
    line = (*shlex.split(command), *arguments)
    subprocess.run(line, check=True, capture_output=True, text=True, timeout=600, cwd=SOURCES)


def reason(error: Exception) -> str:
    """The cause of a failed build in one line: the compiler's first error if there is one."""
    lines = str(getattr(error, "stderr", "") or error).strip().splitlines()
    return next(
        (line for line in lines if "error" in line), lines[0] if lines else type(error).__name__
    )

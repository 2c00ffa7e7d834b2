"""Loading the C kernels for a CPU (csrc/), which registers the operators `torch.ops.idlm.*`.

A wheel brings a library for every instruction set of its platform, and the best one that the
processor has is taken. From a source checkout, or where the wheel's does not load, the machine's C
compiler builds it at its first use, into the user's cache. Where there is neither, PyTorch's
operators serve; the log says once what that costs.

`IDLM_NATIVE` is `auto` (the best the processor has; the default), `0` (none), or the name of an
instruction set.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from idlm.errors import InputError
from idlm.kernels import compiling
from idlm.kernels.instruction_sets import INSTRUCTION_SETS, InstructionSet, best, machine, runs_here

log = logging.getLogger("idlm")

LIBRARIES = Path(__file__).parent / "lib"
"""Where a wheel has its libraries; a source checkout has none."""


@cache
def loaded() -> bool:
    """Whether the operators are there; the first call loads them, or says once why there are none.

    Raises:
        InputError: IDLM_NATIVE names an instruction set that is unknown, or that this processor
            does not have.
    """
    if os.environ.get("IDLM_NATIVE") == "0":
        return False
    wanted = instruction_set()
    try:
        if wanted is None:
            raise OSError(f"there are none for {machine()}")
        if load(wanted).idlm_register():
            raise OSError(f"torch {torch.__version__} does not take them")
    except OSError as error:
        log.warning(
            "no C kernels: PyTorch's operators serve, at a third to half the speed (%s)", error
        )
        return False
    return True


def load(target: InstructionSet) -> ctypes.CDLL:
    """The library for an instruction set: the wheel's, else from the cache, else built now; the log
    says which.

    Raises:
        OSError: there is none, and why.
    """
    shipped = LIBRARIES / compiling.file_name(target)
    try:
        library = ctypes.CDLL(str(shipped))
    except OSError as error:
        missing = (
            str(error)
            if shipped.exists()
            else f"none for {target.name} came with this installation"
        )
    else:
        log.info("C kernels: %s, from the wheel", target.name)
        return library
    try:
        library = ctypes.CDLL(str(built(target)))
    except (OSError, subprocess.SubprocessError) as error:
        raise OSError(f"{missing}; {compiling.reason(error)}") from error
    # a source checkout brings none, and that is as it should be
    level = logging.WARNING if LIBRARIES.exists() else logging.INFO
    log.log(level, "C kernels: %s, built on this machine (%s)", target.name, missing)
    return library


def built(target: InstructionSet) -> Path:
    """The library for an instruction set from the cache, or compiled now.

    Raises:
        OSError: there is no C compiler, or no place for the library.
        subprocess.SubprocessError: the compiler failed.
    """
    command, home = compiling.compiler(), user_cache("kernels")
    key = compiling.fingerprint(target) + command
    place = home / f"{target.name}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.so"
    if not place.exists():
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home) as folder:  # others may be building the same
            compiling.compile_library(command, target, Path(folder)).replace(place)
    return place


def instruction_set() -> InstructionSet | None:
    """The one whose library is used, by IDLM_NATIVE and the processor; None where there is to be
    none.

    Raises:
        InputError: IDLM_NATIVE names an instruction set that is unknown, or that this processor
            does not have.
    """
    wanted = os.environ.get("IDLM_NATIVE", "auto")
    if wanted == "0":
        return None
    if wanted in ("auto", "1", ""):
        return best()
    if wanted not in INSTRUCTION_SETS:
        raise InputError(
            f"IDLM_NATIVE={wanted!r} is unknown; use auto, 0, or one of {', '.join(INSTRUCTION_SETS)}"
        )
    if not runs_here(INSTRUCTION_SETS[wanted]):
        raise InputError(f"IDLM_NATIVE={wanted!r}: this processor does not have it; use auto")
    return INSTRUCTION_SETS[wanted]


def facts() -> tuple[str, ...]:
    """What measurements of the kernels depend on, beside the machine."""
    target = instruction_set()
    return torch.__version__, *(
        () if target is None else (target.name, compiling.fingerprint(target))
    )


def user_cache(name: str) -> Path:
    """Where this user's files of one kind stay between runs; it may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "idlm" / name

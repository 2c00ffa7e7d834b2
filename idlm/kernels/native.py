"""Loads the C kernels for a CPU (csrc/), which registers the operators `torch.ops.idlm.*`.

A wheel has a library for each instruction set of its platform; the fastest that the processor
supports is loaded. In a source checkout, or if the wheel's library does not load, the machine's C
compiler builds it on first use, into the user's cache. Without either, PyTorch's operators are
used, and the log says so once.

`IDLM_NATIVE` is `auto` (the fastest; the default), `0` (none), or the name of an instruction set.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
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
"""The folder of a wheel's libraries; a source checkout has none."""


def loaded() -> bool:
    """Whether the operators are registered. The first call loads them, or logs why it cannot.

    Raises:
        InputError: IDLM_NATIVE names an instruction set that is unknown, or that this processor
            does not have.
    """
    return library() is not None


@cache
def library() -> ctypes.CDLL | None:
    """The library whose operators are registered; None if there is none. Errors as in `loaded`."""
    if os.environ.get("IDLM_NATIVE") == "0":
        return None
    wanted = instruction_set()
    try:
        if wanted is None:
            raise OSError(f"there are none for {machine()}")
        kernels = load(wanted)
        if kernels.idlm_register():
            raise OSError(f"torch {torch.__version__} does not take them")
    except OSError as error:
        log.warning(
            "no C kernels: PyTorch's operators serve, at a third to half the speed (%s)", error
        )
        return None
    return kernels


def load(target: InstructionSet) -> ctypes.CDLL:
    """Load the library for an instruction set: the wheel's, else from the cache, else built now.

    The log says which.

    Raises:
        OSError: there is none, with the reason.
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
    # a source checkout has no libraries, so building one is expected there
    level = logging.WARNING if LIBRARIES.exists() else logging.INFO
    log.log(level, "C kernels: %s, built on this machine (%s)", target.name, missing)
    return library


def built(target: InstructionSet) -> Path:
    """The path of the library in the cache; it is compiled if it is not there.

    Raises:
        OSError: there is no C compiler, or the cache cannot be written.
        subprocess.SubprocessError: the compiler failed.
    """
    command, cache_folder = compiling.compiler(), user_cache("kernels")
    key = compiling.fingerprint(target) + command
    path = cache_folder / f"{target.name}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.so"
    if not path.exists():
        cache_folder.mkdir(parents=True, exist_ok=True)
        # atomic, since another process may build the same library
        with tempfile.TemporaryDirectory(dir=cache_folder) as folder:
            compiling.compile_library(command, target, Path(folder)).replace(path)
    return path


def instruction_set() -> InstructionSet | None:
    """The instruction set to use, by IDLM_NATIVE and the processor; None for no kernels.

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
            f"IDLM_NATIVE={wanted!r} is unknown; "
            f"use auto, 0, or one of {', '.join(INSTRUCTION_SETS)}"
        )
    if not runs_here(INSTRUCTION_SETS[wanted]):
        raise InputError(f"IDLM_NATIVE={wanted!r}: this processor does not have it; use auto")
    return INSTRUCTION_SETS[wanted]


def facts() -> tuple[str, ...]:
    """What timings of the kernels depend on, apart from the machine: torch, target and sources."""
    target = instruction_set()
    return torch.__version__, *(
        () if target is None else (target.name, compiling.fingerprint(target))
    )


def user_cache(name: str) -> Path:
    """The user's cache folder for files of kind `name`; it may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "idlm" / name


def write_cache(path: Path, content: object) -> None:
    """Write JSON to the user's cache; other processes may read the file meanwhile. An error is
    ignored: the next start measures again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps(content))
        draft.replace(path)
    except OSError:
        return

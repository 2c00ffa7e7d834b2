"""C kernels for a CPU: compiled by the machine's own C compiler at their first use, and kept in the user's cache.

Without a compiler the PyTorch twins serve; the log says so once.
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
from functools import cache
from pathlib import Path

import torch

log = logging.getLogger("idlm")

TYPES = {torch.float32: ("float", "expf", 4), torch.float64: ("double", "exp", 3)}
"""C type, its exponential, and log2 of how many of it a vector of 64 bytes holds."""
FLAGS = ("-std=c11", "-O3", "-march=native", "-mprefer-vector-width=512", "-fopenmp", "-fPIC")
FAST = "-ffast-math"
"""For compiling alone: where it is given for linking too, the library changes the whole process's rounding."""


@cache
def library(name: str, dtype: torch.dtype) -> ctypes.CDLL | None:
    """The compiled kernels of `name`.c for a type; None where there are none, with the reason in the log."""
    if dtype not in TYPES or os.environ.get("IDLM_NATIVE") == "0":
        return None
    try:
        return ctypes.CDLL(str(_compiled(Path(__file__).with_name(f"{name}.c"), *TYPES[dtype])))
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("no C kernels, PyTorch's instead (slower): %s", str(getattr(error, "stderr", "") or error).strip())
        return None


def _compiled(source: Path, real: str, exp: str, lane_bits: int) -> Path:
    """The shared library, from the cache if it was built before from the same source on such a machine."""
    compiler = os.environ.get("CC") or shutil.which("cc")
    if compiler is None:
        raise FileNotFoundError("no C compiler (cc) on the PATH; install one, or set CC")
    facts = (source.read_text(), *FLAGS, real, compiler, platform.machine(), _processor())
    key = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:24]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "idlm" / "kernels"
    place = home / f"{source.stem}-{real}-{key}.so"
    if not place.exists():
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home) as folder:  # others may be building the same
            made = _build(
                compiler, source, [f"-DREAL={real}", f"-DEXP={exp}", f"-DLANE_BITS={lane_bits}"], Path(folder)
            )
            made.replace(place)
    return place


def _build(compiler: str, source: Path, defines: list[str], folder: Path) -> Path:
    unit, made = folder / "unit.o", folder / "made.so"
    for command in (
        [compiler, *FLAGS, FAST, *defines, "-c", str(source), "-o", str(unit)],
        [compiler, "-shared", "-fopenmp", str(unit), "-lm", "-o", str(made)],
    ):
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    return made


def _processor() -> str:
    """What `-march=native` depends on: a cache may be shared by several machines."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    return next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), platform.processor())

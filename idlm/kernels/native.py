"""The C kernels for a CPU (csrc/): compiled by the machine's C compiler at their first use, kept in the user's cache.

Loading them registers the operators `torch.ops.idlm.*`. Without a compiler the PyTorch twins serve; the log says so.
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

SOURCES = Path(__file__).parent / "csrc"
FLAGS = ("-std=c11", "-O3", "-march=native", "-fopenmp", "-fPIC")
FAST = ("-ffast-math", "-mprefer-vector-width=512") if platform.machine() == "x86_64" else ("-ffast-math",)
"""For compiling alone: where fast math is given for linking too, it changes the whole process's rounding."""
COMPILER_SECONDS = 600
"""Only for one that hangs: a slow or busy machine takes minutes, once, and would be without kernels for good."""
UNITS = (
    ("window_attention.c", "-DREAL=float", "-DEXP=expf", "-DLANE_BITS=4"),
    ("window_attention.c", "-DREAL=double", "-DEXP=exp", "-DLANE_BITS=3"),
    ("linear.c",),
    ("draft_linear.c",),
    ("rows.c",),
    ("ops.c",),
)


@cache
def loaded() -> bool:
    """Whether the operators are there; the first call builds and loads them."""
    if os.environ.get("IDLM_NATIVE") == "0":
        return False
    try:
        failed = ctypes.CDLL(str(_library())).idlm_register()
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("no C kernels, PyTorch's instead (slower): %s", str(getattr(error, "stderr", "") or error).strip())
        return False
    if failed:
        log.warning("no C kernels, PyTorch's instead (slower): torch %s does not take them", torch.__version__)
    return not failed


@cache
def int8_pays() -> bool:
    """Whether this machine multiplies int8 faster than float32, as the kernel of `draft_linear.c` does it."""
    return loaded() and bool(ctypes.CDLL(str(_library())).draft_linear_pays())


def sources() -> str:
    """The text of all kernels."""
    return "".join(place.read_text() for place in sorted(SOURCES.glob("*.[ch]")))


def user_cache(name: str) -> Path:
    """Where this user's files of one kind stay between runs; it may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "idlm" / name


def _library() -> Path:
    """The shared library, from the cache if it was built before from the same sources on such a machine."""
    compiler = os.environ.get("CC") or shutil.which("cc")
    if compiler is None:
        raise FileNotFoundError("no C compiler (cc) on the PATH; install one, or set CC")
    facts = (sources(), *FLAGS, *FAST, compiler, torch.__version__, platform.machine(), _processor())
    home = user_cache("kernels")
    place = home / f"{hashlib.sha256(''.join(facts).encode()).hexdigest()[:24]}.so"
    if not place.exists():
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home) as folder:  # others may be building the same
            _build(compiler, Path(folder)).replace(place)
    return place


def _build(compiler: str, folder: Path) -> Path:
    objects = []
    for number, (source, *defines) in enumerate(UNITS):
        objects.append(str(folder / f"{number}.o"))
        _run(compiler, *FLAGS, *FAST, *defines, "-c", str(SOURCES / source), "-o", objects[-1])
    made, torch_libraries = folder / "kernels.so", Path(torch.__file__).parent / "lib"
    _run(compiler, "-shared", "-fopenmp", *objects, f"-L{torch_libraries}", "-ltorch_cpu", "-lm", "-o", str(made))
    return made


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILER_SECONDS)


def _processor() -> str:
    """What `-march=native` depends on: a cache may be shared by several machines."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    return next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), platform.processor())

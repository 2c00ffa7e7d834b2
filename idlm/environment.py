"""What a result depends on besides the code: hardware, versions, command and date."""

from __future__ import annotations

import os
import platform
import re
import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

import idlm

VECTORS = ("avx", "amx", "fma", "f16c", "asimd", "sve")
"""Prefixes of the instruction sets that matter for the kernels, on x86 and on ARM."""
FOLDERS = re.compile(r"(?<![^=+,])/(?:[^/=+,]*/)*")
"""The folders of an absolute path, at the start of an argument or after one of "=+,"."""


def environment() -> dict[str, object]:
    """CPU, its vector instructions, cores, threads, GPU, system, versions, command and date
    (UTC)."""
    name, flags = _cpuinfo("model name"), _cpuinfo("flags") or _cpuinfo("Features")
    report: dict[str, object] = {
        "cpu": name or platform.processor(),
        "instructions": [flag for flag in flags.split() if flag.startswith(VECTORS)],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers")},
        "idlm": idlm.__version__,
        "command": command(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    if torch.cuda.is_available():
        report["gpu"] = torch.cuda.get_device_name()
    return report


def command() -> str:
    """The command line of this process; absolute paths are cut to their last part."""
    program = [Path(sys.argv[0]).name]
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None:  # started with `python -m`
        program = ["python", "-m", spec.name.removesuffix(".__main__")]
    return shlex.join([*program, *(FOLDERS.sub("", argument) for argument in sys.argv[1:])])


def _cpuinfo(key: str) -> str:
    """The value of `key` for the first core in Linux's /proc/cpuinfo, or ""."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")

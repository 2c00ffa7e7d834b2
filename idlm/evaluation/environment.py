"""What a measurement depends on besides the code: the hardware and the versions."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch

import idlm

VECTORS = ("avx", "amx", "fma", "f16c", "asimd", "sve")
"""How the names of instruction sets begin that kernels of a language model may use, on x86 and on
ARM."""


def environment() -> dict[str, object]:
    """CPU, its vector instructions, cores, threads, system, versions, and the GPU where there is
    one."""
    name, flags = _cpuinfo("model name"), _cpuinfo("flags") or _cpuinfo("Features")
    found: dict[str, object] = {
        "cpu": name or platform.processor(),
        "instructions": [flag for flag in flags.split() if flag.startswith(VECTORS)],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers")},
        "idlm": idlm.__version__,
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _cpuinfo(key: str) -> str:
    """What Linux says of the first core under `key`; empty where it says nothing."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")

"""The instruction sets that the C kernels are built for, and which of them this processor supports.

Like compiling.py this module imports only the standard library: the build of a wheel loads it by
its path.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path

X86_64_V3 = frozenset(["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave"])
X86_64_V4 = X86_64_V3 | frozenset(["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"])


@dataclass(frozen=True)
class InstructionSet:
    """A target of the kernels' build.

    Attributes:
        name: the value of `IDLM_NATIVE` that selects it.
        machine: the platform, as in `platform.machine()`.
        flags: flags of the C compiler.
        needs: the processor features that it needs, with the names of /proc/cpuinfo.
    """

    name: str
    machine: str
    flags: tuple[str, ...]
    needs: frozenset[str] = frozenset()

    @property
    def dot4(self) -> bool:
        """Whether it has VNNI: four 8-bit products and their sum in one instruction."""
        return bool(self.needs & {"avx512_vnni", "avx_vnni"})


_WIDE = "-mprefer-vector-width=512"
_ALL = (
    InstructionSet(
        "avx512_vnni",
        "x86_64",
        ("-march=x86-64-v4", "-mavx512vnni", _WIDE),
        X86_64_V4 | {"avx512_vnni"},
    ),
    InstructionSet("avx512", "x86_64", ("-march=x86-64-v4", _WIDE), X86_64_V4),
    InstructionSet(
        "avx2_vnni", "x86_64", ("-march=x86-64-v3", "-mavxvnni"), X86_64_V3 | {"avx_vnni"}
    ),
    InstructionSet("avx2", "x86_64", ("-march=x86-64-v3",), X86_64_V3),
    InstructionSet("x86_64", "x86_64", ("-march=x86-64",)),
    InstructionSet("aarch64", "aarch64", ("-march=armv8-a",)),
)
INSTRUCTION_SETS = {target.name: target for target in _ALL}
"""All targets by name; on each platform the fastest comes first."""


def machine() -> str:
    """This platform, with the name that Linux has for it."""
    aliases = {"AMD64": "x86_64", "arm64": "aarch64"}
    return aliases.get(platform.machine(), platform.machine())


@cache
def processor_flags() -> frozenset[str]:
    """The processor's features from /proc/cpuinfo; empty without that file, so that only the basic
    target of the platform is left."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    line = next((line for line in lines if line.startswith(("flags", "Features"))), ":")
    return frozenset(line.partition(":")[2].split())


def runs_here(target: InstructionSet) -> bool:
    """Whether this machine can run a library for `target`."""
    return target.machine == machine() and target.needs <= processor_flags()


def best() -> InstructionSet | None:
    """The fastest target that this machine can run; None if its platform has none."""
    return next(filter(runs_here, INSTRUCTION_SETS.values()), None)

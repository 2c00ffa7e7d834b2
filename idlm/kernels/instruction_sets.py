"""The instruction sets that the C kernels are built for, and which of them this processor has.

Like compiling.py it imports the standard library alone: a wheel's build loads it by its path.
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
    """One build of the kernels.

    Attributes:
        name: what `IDLM_NATIVE` calls it.
        machine: the platform, as `platform.machine` names it.
        flags: of the C compiler.
        needs: what the processor has to have, by Linux's names.
    """

    name: str
    machine: str
    flags: tuple[str, ...]
    needs: frozenset[str] = frozenset()

    @property
    def dot4(self) -> bool:
        """Whether four products of 8 bits and their sum are one instruction."""
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
INSTRUCTION_SETS = {one.name: one for one in _ALL}
"""By name, the best first."""


def machine() -> str:
    """This platform, as Linux names it."""
    known = {"AMD64": "x86_64", "arm64": "aarch64"}
    return known.get(platform.machine(), platform.machine())


@cache
def processor_flags() -> frozenset[str]:
    """What the processor has, by Linux's names; empty where nothing says so, which leaves the
    plainest build."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    found = next((line for line in lines if line.startswith(("flags", "Features"))), ":")
    return frozenset(found.partition(":")[2].split())


def runs_here(target: InstructionSet) -> bool:
    """Whether this machine runs such a build."""
    return target.machine == machine() and target.needs <= processor_flags()


def best() -> InstructionSet | None:
    """The best one that runs here; None on a platform that there is no build for."""
    return next(filter(runs_here, INSTRUCTION_SETS.values()), None)

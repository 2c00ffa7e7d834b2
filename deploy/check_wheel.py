"""Check a wheel before it is given away: `python -m deploy.check_wheel dist/idlm-*.whl`.

It has to be for this platform, with a library of the C kernels for each of its instruction sets,
made from the sources beside them, and every library has to load; and it has to have the bundled
model and the built page.
"""

from __future__ import annotations

import ctypes
import sys
import tempfile
import zipfile
from pathlib import Path

import torch  # noqa: F401  whose library is one that the kernels need

from idlm.kernels import compiling
from idlm.kernels.instruction_sets import INSTRUCTION_SETS, machine

NEEDED = (
    "idlm/py.typed",
    "idlm/nano/weights/base/model.safetensors",
    "idlm/nano/weights/base/tokenizer.json",
    *(f"idlm/ui/page/{name}" for name in ("index.html", "app.js", "app.css", "explorer.html")),
)


def needed() -> set[str]:
    """Names of the files that a wheel for this platform has."""
    targets = [one for one in INSTRUCTION_SETS.values() if one.machine == machine()]
    libraries = {f"idlm/kernels/lib/{compiling.file_name(one)}" for one in targets}
    return (
        libraries
        | {f"idlm/kernels/csrc/{one.name}" for one in compiling.SOURCES.iterdir()}
        | set(NEEDED)
    )


def faults(wheel: Path) -> list[str]:
    """What is wrong with a wheel."""
    found = (
        []
        if wheel.stem.endswith(machine()) and "-py3-none-" in wheel.stem
        else [f"{wheel.name}: a wrong tag"]
    )
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        names = set(archive.namelist())
        found += [f"missing: {name}" for name in sorted(needed() - names)]
        found += [
            f"of other sources: {name}"
            for name in names - needed()
            if "/lib/" in name or "/csrc/" in name
        ]
        for name in sorted(name for name in names if name.endswith(".so")):
            try:
                ctypes.CDLL(archive.extract(name, folder))
            except OSError as error:
                found.append(str(error))
    return found


def main() -> int:
    """Exit status 1 where anything is wrong."""
    wheel = Path(sys.argv[1])
    wrong = faults(wheel)
    print("\n".join(wrong) if wrong else f"{wheel}: complete, {wheel.stat().st_size / 1e6:.1f} MB")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())

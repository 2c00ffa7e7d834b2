"""Where the C kernels come from: the wheel, the cache, the compiler, and else PyTorch's operators
serve."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from idlm.kernels import compiling, native
from idlm.kernels.instruction_sets import INSTRUCTION_SETS, InstructionSet, best
from tests.waiting import HANG_SECONDS

TARGET = best()
needs_target = pytest.mark.skipif(TARGET is None, reason="there are no C kernels for this platform")
NO_COMPILER = "/no/such/compiler"


class Library:
    """Instead of ctypes.CDLL: a file that says what it is; it loads unless that is "broken"."""

    loads: list[str] = []

    def __init__(self, place: str) -> None:
        said = Path(place).read_text()  # an OSError where there is no file, as with the real one
        if said == "broken":
            raise OSError("wrong libc")
        self.loads.append(said)

    def idlm_register(self) -> int:
        return 0


@pytest.fixture
def target() -> InstructionSet:
    assert TARGET is not None
    return TARGET


@pytest.fixture
def places(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> Path:
    """A folder with a wheel's libraries (lib), a cache (cache) and a compiler that copies (cc)."""
    compiler = tmp_path / "cc"
    compiler.write_text(
        '#!/bin/sh\nwhile [ $# -gt 0 ]; do [ "$1" = -o ] && printf compiled > "$2"; shift; done\n'
    )
    compiler.chmod(0o755)
    for name, value in {
        "CC": str(compiler),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "IDLM_NATIVE": "auto",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(native, "LIBRARIES", tmp_path / "lib")
    monkeypatch.setattr(native, "library", native.library.__wrapped__)
    monkeypatch.setattr(native.ctypes, "CDLL", Library)
    monkeypatch.setattr(Library, "loads", [])
    caplog.set_level(logging.INFO, "idlm")
    return tmp_path


def ship(places: Path, name: str, text: str) -> None:
    (places / "lib").mkdir(exist_ok=True)
    (places / "lib" / name).write_text(text)


def only_line(caplog: pytest.LogCaptureFixture) -> tuple[int, str]:
    (record,) = caplog.records
    return record.levelno, record.getMessage()


@needs_target
def test_the_wheels_library_comes_first(
    places: Path, target: InstructionSet, caplog: pytest.LogCaptureFixture
) -> None:
    ship(places, compiling.file_name(target), "shipped")
    assert native.loaded() and Library.loads == ["shipped"] and not (places / "cache").exists()
    assert only_line(caplog) == (logging.INFO, f"C kernels: {target.name}, from the wheel")


@needs_target
def test_a_source_checkout_compiles_once(
    places: Path,
    target: InstructionSet,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert native.loaded() and Library.loads == ["compiled"]
    assert only_line(caplog)[0] == logging.INFO
    native.built(target).write_text("cached")
    assert native.loaded() and Library.loads == ["compiled", "cached"]


@needs_target
@pytest.mark.parametrize("shipped", ["broken", "stale"])
def test_one_that_does_not_fit_is_compiled_instead(
    places: Path, target: InstructionSet, caplog: pytest.LogCaptureFixture, shipped: str
) -> None:
    name = compiling.file_name(target) if shipped == "broken" else f"{target.name}-{'0' * 24}.so"
    ship(places, name, shipped)
    assert native.loaded() and Library.loads == ["compiled"]
    level, line = only_line(caplog)
    assert level == logging.WARNING and "built on this machine" in line
    assert ("wrong libc" if shipped == "broken" else "none for") in line


@needs_target
def test_without_library_and_compiler_pytorch_serves_and_the_log_says_what_is_lost(
    places: Path,
    target: InstructionSet,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ship(places, compiling.file_name(target), "broken")
    monkeypatch.setenv("CC", NO_COMPILER)
    assert not native.loaded() and Library.loads == []
    level, line = only_line(caplog)
    assert level == logging.WARNING and all(
        part in line for part in ("half the speed", "wrong libc", NO_COMPILER)
    )


def test_a_platform_without_kernels_is_told(
    places: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "best", lambda: None)
    assert not native.loaded() and "half the speed" in only_line(caplog)[1]


def test_who_wants_none_is_not_told(
    places: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IDLM_NATIVE", "0")
    assert not native.loaded() and not caplog.records


def test_a_changed_source_changes_the_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    target = INSTRUCTION_SETS["avx2"]
    before = compiling.file_name(target)
    for source in compiling.SOURCES.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    monkeypatch.setattr(compiling, "SOURCES", tmp_path)
    assert compiling.file_name(target) == before
    (tmp_path / "vector.h").write_text((tmp_path / "vector.h").read_text() + "\n")
    changed = compiling.file_name(target)
    monkeypatch.setattr(compiling, "FLAGS", (*compiling.FLAGS, "-g"))
    assert len({before, changed, compiling.file_name(target)}) == 3


SCRIPT = """
import logging
import sys
from pathlib import Path

import torch

from idlm.kernels import native

logging.basicConfig(level=logging.INFO, format="%(message)s")
native.LIBRARIES = Path(sys.argv[1])
assert native.loaded() and native.loaded()  # and one line of log
gate, up = torch.randn(2, 3, 40)
torch.testing.assert_close(torch.ops.idlm.swiglu(gate, up), torch.nn.functional.silu(gate) * up)
"""


@needs_target
def test_a_compiled_library_loads_where_there_is_no_compiler(tmp_path: Path) -> None:
    """The plainest one, which is compiled in a few seconds and runs on every such processor."""
    plain = next(
        one for one in INSTRUCTION_SETS.values() if not one.needs and one.machine == TARGET.machine
    )
    try:
        command = compiling.compiler()
    except OSError:
        pytest.skip("no C compiler: there is nothing to test")
    compiling.compile_library(command, plain, tmp_path)
    bare = {"CC": NO_COMPILER, "XDG_CACHE_HOME": str(tmp_path / "cache"), "IDLM_NATIVE": plain.name}
    run = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    result = subprocess.run(
        run, env={**os.environ, **bare}, capture_output=True, text=True, timeout=HANG_SECONDS
    )
    assert (result.returncode, result.stderr) == (0, f"C kernels: {plain.name}, from the wheel\n")


def test_no_path_of_the_machine_is_in_a_library(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Sources are named to the compiler as they lie beside it: __FILE__ is in what is shipped."""
    said = tmp_path / "arguments"
    compiler = tmp_path / "cc"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {said}\npwd >> {said}.folders\n')
    compiler.chmod(0o755)
    compiling.compile_library(str(compiler), INSTRUCTION_SETS["avx2"], tmp_path)
    assert str(compiling.SOURCES) not in said.read_text()
    assert set(Path(f"{said}.folders").read_text().split()) == {str(compiling.SOURCES)}

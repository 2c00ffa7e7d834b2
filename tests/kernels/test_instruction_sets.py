"""Every build of the C kernels that this machine runs; with IDLM_EVERYWHERE=1 foreign ones too,
emulated."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from idlm.errors import InputError
from idlm.kernels import compiling, instruction_sets, native
from idlm.kernels.instruction_sets import INSTRUCTION_SETS, InstructionSet
from idlm.kernels.panels import SIDE, draft_format
from tests.attention.oracle import CONSTANTS, RATIOS, SHAPES, case
from tests.kernels import checks
from tests.kernels.everywhere import Driver, available, driver

few = settings(max_examples=20, deadline=None)  # an emulated processor is slow
SETS = available() if native.loaded() else []


@pytest.fixture(scope="module", params=SETS, ids=lambda target: target.name)
def kernels(request: pytest.FixtureRequest) -> Driver:
    return driver(request.param)


@pytest.mark.parametrize("format", SIDE)
@few
@given(
    rows=st.integers(1, 20),
    inner=st.one_of(st.integers(1, 70), st.integers(509, 517), st.just(1203)),
    out=st.integers(1, 100),
    threads=st.integers(1, 2),
    seed=st.integers(0, 2**20),
)
def test_products(
    kernels: Driver, format: str, rows: int, inner: int, out: int, threads: int, seed: int
) -> None:
    torch.manual_seed(seed)
    checks.check_product(
        kernels, torch.randn(rows, inner), torch.randn(out, inner), format, threads
    )


@pytest.mark.parametrize("format", SIDE)
def test_products_of_many_long_rows(kernels: Driver, format: str) -> None:
    """More rows than are multiplied at a time, and inputs so many that few rows are."""
    torch.manual_seed(0)
    checks.check_product(kernels, torch.randn(300, 33), torch.randn(33, 33), format, 2)
    checks.check_product(kernels, torch.randn(17, 20001), torch.randn(40, 20001), format, 1)


@pytest.mark.parametrize("format", ["int8", "uint8"])
def test_sums_are_exact_at_their_largest(kernels: Driver, format: str) -> None:
    """All codes 127 and all numbers 32,767, or 127 too."""
    checks.check_product(kernels, torch.ones(3, 1025), torch.ones(33, 1025), format, 1)
    checks.check_product(kernels, torch.ones(3, 1025), -torch.ones(33, 1025), format, 1)
    checks.check_product(kernels, -torch.ones(3, 1025), torch.ones(33, 1025), format, 1)


@few
@given(size=st.integers(1, 70), seed=st.integers(0, 2**20))
def test_activations_as_numbers(kernels: Driver, size: int, seed: int) -> None:
    """The same on every instruction set, and the nearest but for what float32 cannot tell."""
    x = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed % 40 - 20)
    numbers, scale = kernels.numbers(x)
    assert torch.equal(numbers[:size].long(), checks.rounded(x[None])[0][0])
    assert numbers[size:].eq(0).all()
    assert len(numbers) % 2 == 0
    error = (x.double() / x.abs().max().double() * 32767 - numbers[:size]).abs()
    assert error.max() < 0.5 + 0.01
    torch.testing.assert_close(scale[0], x.abs().max() / 32767, rtol=0, atol=0)


@few
@given(size=st.integers(1, 300), seed=st.integers(0, 2**20))
def test_activations_as_pieces(kernels: Driver, size: int, seed: int) -> None:
    """The same on every instruction set, and the nearest but for what float32 cannot tell."""
    x = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed % 40 - 20)
    found, (codes, scales) = kernels.pieces(x), checks.in_pieces(x[None])
    assert torch.equal(found[:, 8:].view(torch.int8).long(), codes[0])
    assert torch.equal(found[:, :4].contiguous().view(torch.float32)[:, 0], scales[0])
    assert torch.equal(
        found[:, 4:8].contiguous().view(torch.int32)[:, 0].long(), -128 * codes[0].sum(1)
    )
    groups = [(group.double() / group.abs().max().double() * 127) for group in x.split(128)]
    error = torch.cat(groups) - codes.flatten()[:size]
    assert error.abs().max() < 0.5 + 0.01
    assert codes.flatten()[size:].eq(0).all()


@few
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    width=st.integers(1, 24),
    heads=st.sampled_from(RATIOS),
    page=st.sampled_from([1, 3, 16]),
    size=st.sampled_from([2, 8, 20]),
    causal=st.booleans(),
    real=st.integers(1, 24),
    single=st.booleans(),
    constants=st.sampled_from(CONSTANTS),
    seed=st.integers(0, 2**20),
)
def test_attention(
    kernels: Driver,
    lengths: list[int],
    width: int,
    heads: tuple[int, int],
    page: int,
    size: int,
    causal: bool,
    real: int,
    single: bool,
    constants: dict[str, Any],
    seed: int,
) -> None:
    example = case(lengths, width, *heads, size=size, page=page, causal=causal, seed=seed)
    example = example.scored(**constants).without_hidden_pages()
    if single:
        checks.check_attention(
            kernels, example.to(torch.float32), min(real, width), **checks.SINGLE
        )
    else:
        checks.check_attention(kernels, example, min(real, width))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_attention_of_real_shapes(
    kernels: Driver,
    shape: tuple[list[int], int, int, int, int, int],
    causal: bool,
    dtype: torch.dtype,
) -> None:
    tolerance = {} if dtype == torch.float64 else checks.SINGLE
    for constants in CONSTANTS:
        example = case(*shape, causal=causal).to(dtype).scored(**constants).without_hidden_pages()
        checks.check_attention(kernels, example, max(1, shape[1] // 2), **tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_pieces(kernels: Driver, dtype: torch.dtype) -> None:
    example = case([0, 33, 7], 50, 6, 2, size=20, page=3, causal=True).to(dtype)
    tolerance = {} if dtype == torch.float64 else checks.SINGLE
    for constants in CONSTANTS:
        scored = example.scored(**constants).without_hidden_pages()
        checks.check_pieces(kernels, scored, [50, 1, 17], 2, **tolerance)


CHECKS = (
    checks.check_threads,
    partial(checks.check_alone, dtype=torch.float64),
    partial(checks.check_alone, dtype=torch.float32),
    checks.check_blind,
    checks.check_far_scores,
    checks.check_extremes,
)


@pytest.mark.parametrize(
    "check", CHECKS, ids=["threads", "alone64", "alone32", "blind", "far", "extremes"]
)
def test_everything_else(kernels: Driver, check: partial[None]) -> None:
    check(kernels)


@few
@given(
    rows=st.integers(1, 5),
    size=st.integers(1, 70),
    heads=st.integers(1, 3),
    seed=st.integers(0, 2**20),
)
def test_row_operations(kernels: Driver, rows: int, size: int, heads: int, seed: int) -> None:
    torch.manual_seed(seed)
    checks.check_row_operations(kernels, rows, size, heads)


COMPILERS = [command for command in ("cc", "gcc", "clang") if shutil.which(command)]


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize(
    "target",
    [target for target in SETS if instruction_sets.runs_here(target)],
    ids=lambda target: target.name,
)
def test_compilers_have_nothing_to_say(
    compiler: str, target: InstructionSet, tmp_path: Path
) -> None:
    compiling.compile_units(
        compiler, target, tmp_path, compiling.UNITS, "-Wall", "-Wextra", "-Werror", "-fsyntax-only"
    )


class TestWhichOne:
    """The choice of an instruction set."""

    @staticmethod
    def machine(
        monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, cpuinfo: str | None
    ) -> None:
        """Pretend to be one that /proc/cpuinfo describes so."""
        path = tmp_path / "cpuinfo"
        if cpuinfo is not None:
            path.write_text(cpuinfo)
        monkeypatch.setattr(instruction_sets, "Path", lambda _: path)
        monkeypatch.setattr(instruction_sets.platform, "machine", lambda: name)
        monkeypatch.setattr(
            instruction_sets, "processor_flags", instruction_sets.processor_flags.__wrapped__
        )

    V3 = "fpu sse2 avx avx2 bmi1 bmi2 f16c fma movbe xsave"
    V4 = f"{V3} avx512f avx512bw avx512cd avx512dq avx512vl"

    @pytest.mark.parametrize(
        ("machine", "flags", "best"),
        [
            ("x86_64", f"{V4} avx512_vnni avx_vnni", "avx512_vnni"),
            ("AMD64", V4, "avx512"),
            ("x86_64", f"{V3} avx_vnni", "avx2_vnni"),
            ("x86_64", V3, "avx2"),
            ("x86_64", f"{V3} avx512f avx512_vnni", "avx2"),  # some of AVX-512 is not enough
            ("x86_64", "fpu sse2 avx avx2", "x86_64"),
            ("x86_64", None, "x86_64"),
            ("aarch64", "fp asimd", "aarch64"),
            ("arm64", None, "aarch64"),
            ("riscv64", "", None),
        ],
    )
    def test_the_best_that_the_processor_has(
        self,
        machine: str,
        flags: str | None,
        best: str | None,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:
        key = "Features" if machine == "aarch64" else "flags"
        self.machine(
            monkeypatch,
            tmp_path,
            machine,
            None if flags is None else f"processor : 0\n{key}\t\t: {flags}\n",
        )
        monkeypatch.delenv("IDLM_NATIVE", raising=False)
        found = instruction_sets.best()
        assert (found and found.name) == best
        assert native.instruction_set() == found

    def test_one_that_is_named_is_used(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        self.machine(monkeypatch, tmp_path, "x86_64", f"flags : {self.V4}\n")
        for name in ("avx512", "avx2", "x86_64"):
            monkeypatch.setenv("IDLM_NATIVE", name)
            assert native.instruction_set() == INSTRUCTION_SETS[name]
        for value, best in (("auto", "avx512"), ("1", "avx512"), ("", "avx512"), ("0", None)):
            monkeypatch.setenv("IDLM_NATIVE", value)
            found = native.instruction_set()
            assert (found and found.name) == best

    @pytest.mark.parametrize(
        ("name", "complaint"),
        [
            ("avx1024", r"'avx1024' is unknown; use auto, 0, or one of avx512_vnni, avx512,"),
            ("avx512", r"'avx512': this processor does not have it; use auto"),
            ("aarch64", r"'aarch64': this processor does not have it; use auto"),
        ],
    )
    def test_one_that_cannot_be_used_is_refused(
        self, name: str, complaint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        self.machine(monkeypatch, tmp_path, "x86_64", f"flags : {self.V3}\n")
        monkeypatch.setenv("IDLM_NATIVE", name)
        with pytest.raises(InputError, match=complaint):
            native.instruction_set()
        with pytest.raises(InputError, match=complaint):
            native.library.__wrapped__()


@pytest.mark.skipif(not SETS, reason="no C compiler: there is nothing to test")
def test_this_machine_runs_the_one_it_says() -> None:
    wanted: InstructionSet | None = native.instruction_set()
    assert wanted in SETS


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_drafts_take_8_bits_where_that_is_one_instruction(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "instruction_set", lambda: INSTRUCTION_SETS[name])
    assert draft_format() == ("uint8" if name.endswith("vnni") else "int8")


def test_uint8_has_the_codes_of_int8() -> None:
    weight = torch.randn(70, 301, generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        checks.Panels.of(weight, "uint8").matrix(), checks.Panels.of(weight, "int8").matrix()
    )


def test_int8_is_the_same_on_every_instruction_set() -> None:
    torch.manual_seed(1)
    x, weight, results = torch.randn(9, 1100), torch.randn(70, 1100), list[Tensor]()
    panels = checks.Panels.of(weight, "int8")
    for target in SETS:
        results.append(driver(target).linear(x, panels))
    assert all(torch.equal(result, results[0]) for result in results)

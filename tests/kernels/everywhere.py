"""The C kernels built for any instruction set, without torch, behind the signatures of `Ops`.

driver.c is linked with the kernels and runs as a process of its own, natively or under an emulator.
"""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from idlm.attention.base import QKV, Segment
from idlm.attention.cpu import CpuAttention
from idlm.decoding.scores import Scores
from idlm.kernels import compiling, native
from idlm.kernels.instruction_sets import INSTRUCTION_SETS, InstructionSet, runs_here
from idlm.kernels.linears import ALWAYS
from idlm.kernels.panels import SIDE, Panels
from tests.attention.oracle import Case

DRIVER = Path(__file__).parent / "driver.c"
PRODUCT, NUMBERS, PIECES, ATTENTION_FLOAT, ATTENTION_DOUBLE, RMS_NORM, ROTATE, SWIGLU = range(8)
EVERYWHERE = "IDLM_EVERYWHERE"
"""Set to 1, foreign instruction sets are tested too."""
COMPILER, EMULATOR, SYSROOT = "aarch64-linux-gnu-gcc", "qemu-aarch64", "/usr/aarch64-linux-gnu"


class Kernels(Protocol):
    """The kernels of one build. Shapes as in the modules that the operators belong to."""

    def linear(self, x: Tensor, panels: Panels) -> Tensor:
        """x [T, K] by the panels: [T, N]."""

    def attend(self, example: Case, pages: Tensor, rows: Tensor, real: int) -> Tensor:
        """The real rows of all windows, then their masks: [B R + B M, H, E]; writes `pages`."""

    def attend_pieces(self, example: Case, pages: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
        """`one` holds flat rows [T, heads, E] here, `rows` int64 [T]."""

    def rms_norm(self, rows: Tensor, weight: Tensor, eps: float) -> Tensor:
        """rows [T, D]."""

    def rotate(self, heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """heads [T, H, E]; cosine, sine [T, E]."""

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """Both [T, D]."""


def flat(rows: Tensor, real: int) -> Tensor:
    """[B, W, ...] -> the real rows of all slots, then their masks."""
    return torch.cat([rows[:, :real].flatten(0, 1), rows[:, real:].flatten(0, 1)])


class Ops:
    """Those that this process has loaded, as torch operators."""

    def linear(self, x: Tensor, panels: Panels) -> Tensor:
        nothing = torch.empty(0)
        result: Tensor = torch.ops.idlm.linear(
            x, nothing, panels.weights, panels.scales, panels.out, ALWAYS
        )
        return result

    def attend(self, example: Case, pages: Tensor, rows: Tensor, real: int) -> Tensor:
        qkv = QKV(*(flat(tensor, real) for tensor in (example.query, example.key, example.value)))
        masks = example.query.shape[1] - real
        segment = Segment(example.table, example.lengths, rows, example.visible, masks)
        return _attend(segment, pages, qkv, example.scores)

    def attend_pieces(self, example: Case, pages: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
        segment = Segment(example.table, example.lengths, rows, ends=ends)
        qkv = QKV(example.query, example.key, example.value)
        return _attend(segment, pages, qkv, example.scores)

    def rms_norm(self, rows: Tensor, weight: Tensor, eps: float) -> Tensor:
        result: Tensor = torch.ops.idlm.rms_norm(rows, weight, eps)
        return result

    def rotate(self, heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        turned: Tensor = torch.ops.idlm.rotate(
            heads[None].transpose(1, 2), cosine[None, None], sine[None, None]
        )
        return turned[0].transpose(0, 1)

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        result: Tensor = torch.ops.idlm.swiglu(gate, up)
        return result


def _attend(segment: Segment, pages: Tensor, qkv: QKV, scores: Scores) -> Tensor:
    backend = CpuAttention()
    return backend.attend(backend.prepare(segment, scores.window), pages, qkv, scores)


class Driver:
    """Those of one build, in a process of their own.

    Args:
        command: how to start it.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        atexit.register(self.process.kill)

    def numbers(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [K] as 16-bit numbers, an even number of them, and their scale [1]."""
        numbers, scale = self._ask(NUMBERS, (), (x,))
        return _tensor(numbers, torch.int16), _tensor(scale, torch.float32)

    def pieces(self, x: Tensor) -> Tensor:
        """x [K] as pieces: bytes [C, 136], of each a float32 scale, an int32 shift and 128 int8
        codes."""
        (result,) = self._ask(PIECES, (), (x,))
        return _tensor(result, torch.uint8).view(-1, 136)

    def linear(self, x: Tensor, panels: Panels) -> Tensor:
        weights, scales, out, inner = panels
        format = [getattr(torch, name) for name in SIDE].index(weights.dtype)
        arrays = [weights, scales, x]
        if weights.dtype == torch.uint8:
            arrays = [weights, scales, torch.stack([self.pieces(row) for row in x])]
        if weights.dtype == torch.int8:
            rounded, row_scales = zip(*map(self.numbers, x.unbind()), strict=True)
            arrays = [weights, scales, torch.stack(rounded), torch.cat(row_scales)]
        (result,) = self._ask(PRODUCT, (format, len(x), inner, out), arrays)
        return _tensor(result, torch.float32).view(len(x), out)

    def attend(self, example: Case, pages: Tensor, rows: Tensor, real: int) -> Tensor:
        query, key, value = (
            flat(tensor, real) for tensor in (example.query, example.key, example.value)
        )
        masks = example.query.shape[1] - real
        tensors = (
            query,
            key,
            value,
            pages,
            rows,
            example.table,
            example.lengths,
            example.visible,
            None,
        )
        return self._attend(tensors, real, masks, example.scores)

    def attend_pieces(self, example: Case, pages: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
        tensors = (
            example.query,
            example.key,
            example.value,
            pages,
            rows,
            example.table,
            example.lengths,
            None,
            ends,
        )
        return self._attend(tensors, 0, 0, example.scores)

    def _attend(
        self, tensors: Sequence[Tensor | None], real: int, masks: int, scores: Scores
    ) -> Tensor:
        query, key, _, pages, rows, table, lengths, *_ = tensors
        assert query is not None and key is not None and pages is not None
        assert rows is not None and table is not None and lengths is not None
        numbers = (
            *(len(lengths), rows.numel(), real, masks),
            *(query.shape[1], key.shape[1], query.shape[2]),
            *(pages.shape[2], table.shape[1], pages.stride(0), scores.window or 0),
        )
        sinks = None if scores.sinks is None else scores.sinks.to(query.dtype)
        constants = scores.scale, scores.softcap or 0.0
        operation = ATTENTION_FLOAT if query.dtype == torch.float32 else ATTENTION_DOUBLE
        mixed, left = self._ask(operation, numbers, (*tensors, sinks), *constants)
        pages.copy_(_tensor(left, pages.dtype).view(pages.shape))
        return _tensor(mixed, query.dtype).view(query.shape)

    def rms_norm(self, rows: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._like(rows, RMS_NORM, rows.shape, (rows, weight), eps)

    def rotate(self, heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        return self._like(heads, ROTATE, heads.shape, (heads, cosine, sine))

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        return self._like(gate, SWIGLU, gate.shape, (gate, up))

    def _like(
        self,
        x: Tensor,
        operation: int,
        numbers: Sequence[int],
        arrays: Sequence[Tensor],
        *reals: float,
    ) -> Tensor:
        (result,) = self._ask(operation, numbers, arrays, *reals)
        return _tensor(result, torch.float32).view(x.shape)

    def _ask(
        self,
        operation: int,
        numbers: Sequence[int],
        arrays: Sequence[Tensor | None],
        *reals: float,
    ) -> list[bytes]:
        """One request, see driver.c; `reals` follow the numbers."""
        tail = struct.pack(f"{len(reals)}d", *reals)
        head = (operation, torch.get_num_threads(), len(numbers) + len(tail) // 8, len(arrays))
        request = [struct.pack(f"{4 + len(numbers)}q", *head, *numbers), tail]
        for array in arrays:
            content = b"" if array is None else _bytes(array)
            request += [struct.pack("q", len(content)), content]
        assert self.process.stdin is not None
        self.process.stdin.write(b"".join(request))
        self.process.stdin.flush()
        return [self._read(self._number()) for _ in range(self._number())]

    def _number(self) -> int:
        result: int = struct.unpack("q", self._read(8))[0]
        return result

    def _read(self, size: int) -> bytes:
        assert self.process.stdout is not None
        result = self.process.stdout.read(size)
        assert len(result) == size, "the driver ended; its complaint stands above"
        return result


def _bytes(tensor: Tensor) -> bytes:
    tensor = tensor.contiguous()
    return (
        (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy().tobytes()
    )


def _tensor(content: bytes, dtype: torch.dtype) -> Tensor:
    return (
        torch.frombuffer(bytearray(content), dtype=dtype)
        if content
        else torch.empty(0, dtype=dtype)
    )


def available() -> list[InstructionSet]:
    """The instruction sets that this machine can run; with EVERYWHERE also emulated ones."""
    foreign = os.environ.get(EVERYWHERE) == "1"
    return [
        target
        for target in INSTRUCTION_SETS.values()
        if runs_here(target) or foreign and target.machine == "aarch64"
    ]


@cache
def driver(target: InstructionSet) -> Driver:
    """The kernels of a build for `target`; made once, and kept in the user's cache."""
    if runs_here(target):
        compiler, command = os.environ.get("CC") or "cc", []
    else:
        missing = [program for program in (COMPILER, EMULATOR) if shutil.which(program) is None]
        assert not missing, (
            f"{', '.join(missing)} not found; `make kernels-everywhere` says what to install"
        )
        compiler, command = COMPILER, [EMULATOR, "-L", SYSROOT]
    return Driver([*command, str(program(compiler, target))])


def program(compiler: str, target: InstructionSet) -> Path:
    """driver.c with the kernels; flags for the compiler beside its own, such as -fsanitize's, are
    in CFLAGS."""
    flags = os.environ.get("CFLAGS", "").split()
    facts = (compiling.fingerprint(target), DRIVER.read_text(), compiler, flags)
    home = native.user_cache("drivers")
    home.mkdir(parents=True, exist_ok=True)
    place = home / hashlib.sha256(repr(facts).encode()).hexdigest()[:24]
    with place.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests that run beside these need the same
        if not place.exists():
            with tempfile.TemporaryDirectory(dir=home) as folder:
                build(compiler, target, flags, Path(folder)).replace(place)
    return place


def build(compiler: str, target: InstructionSet, flags: Sequence[str], folder: Path) -> Path:
    units = [unit for unit in compiling.UNITS if unit[0] != "ops.c"]
    objects = compiling.compile_units(compiler, target, folder, units, *flags)
    program = folder / "driver"
    command = [
        compiler,
        *compiling.FLAGS,
        *flags,
        f"-I{compiling.SOURCES}",
        str(DRIVER),
        *objects,
        "-lm",
        "-o",
        str(program),
    ]
    subprocess.run(command, check=True)
    return program

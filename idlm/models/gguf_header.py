"""The header of a GGUF file: its metadata and where its tensors lie. No tensor is read.

    "GGUF", version u32, number of tensors u64, number of metadata entries u64 a metadata entry
    name, type u32, value a tensor            name, number of dimensions u32, sizes u64 (the fastest
    first), type u32, offset u64 padding up to the alignment, then the tensors' bytes

All numbers are little-endian; a string is its length (u64) and its bytes; an array is type u32,
length u64, values.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from idlm.errors import InputError
from idlm.extras import need
from idlm.models.tensor_info import TensorInfo

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
STRING, ARRAY = 8, 9
ALIGNMENT = 32
DAMAGE = (struct.error, UnicodeDecodeError, KeyError, TypeError, ZeroDivisionError, RecursionError)
"""What parsing raises where bytes are missing or changed."""


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says of itself; tensors have the names and types that GGUF gives them."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]

    @property
    def architecture(self) -> str:
        """llama.cpp's name for the family."""
        return str(self.metadata.get("general.architecture"))


def is_gguf(path: Path) -> bool:
    """Whether `path` is a file that is named or begins as a GGUF file does."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return path.suffix.lower() == ".gguf" or file.read(4) == MAGIC


def read_header(path: Path) -> GgufHeader:
    """Read the header of a GGUF file.

    Raises:
        InputError: the packages for GGUF are missing; it is no GGUF file, of another version, or
            truncated; or it has tensors of a type that the package `gguf` does not know.
    """
    need("gguf", repr(str(path)))
    with path.open("rb") as file:
        _check_version(path, file.read(8))
        try:
            header = _Parser(file, path).header()
        except DAMAGE:
            raise InputError(
                f"{str(path)!r} is truncated or damaged in its header; download it again"
            ) from None
    size, expected = (
        path.stat().st_size,
        max((info.stop for info in header.tensors.values()), default=0),
    )
    if size < expected:
        raise InputError(
            f"{str(path)!r} is truncated: {size} bytes, not the {expected} it names; download it again"
        )
    return header


def _check_version(path: Path, start: bytes) -> None:
    if start[:4] != MAGIC:
        raise InputError(f"{str(path)!r} is no GGUF file; give a GGUF file or a model folder")
    version = int.from_bytes(start[4:], "little")
    if version not in VERSIONS:
        raise InputError(
            f"{str(path)!r} has GGUF version {version}, not 2 or 3; convert it with a current llama.cpp"
        )


class _Parser:
    """Reads values one after another; struct.error where the file ends too early."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path, self.size = file, path, path.stat().st_size

    def header(self) -> GgufHeader:
        """All after the version."""
        tensors, entries = self.numbers("QQ")
        metadata = {}
        for _ in range(entries):
            name = self.text()
            metadata[name] = self.value(self.number("I"))
        found = [self.tensor() for _ in range(tensors)]
        step = metadata.get("general.alignment", ALIGNMENT)
        data = -(-self.file.tell() // step) * step
        return GgufHeader(self.path, metadata, {one[0]: self.placed(one, data) for one in found})

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape as in torch, number of the type, offset in the data."""
        name = self.text()
        shape = self.numbers(f"{self.number('I')}Q")
        return name, shape[::-1], self.number("I"), self.number("Q")

    def placed(self, tensor: tuple[str, tuple[int, ...], int, int], data: int) -> TensorInfo:
        """The place in the file of what `tensor` read; the tensors' bytes begin at `data`."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        name, shape, kind, offset = tensor
        if kind not in [known.value for known in GGML_QUANT_SIZES]:
            raise InputError(
                f"{str(self.path)!r}: tensor {name!r} has the unknown type {kind}; "
                "upgrade the package gguf or use a file of another quantisation"
            )
        block, width = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        start = data + offset
        stop = start + math.prod(shape) // block * width
        return TensorInfo(self.path, GGMLQuantizationType(kind).name, shape, start, stop)

    def value(self, kind: int) -> Any:
        """One metadata value; KeyError where its type is unknown."""
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            return self.number(SCALARS[kind])
        inner, count = self.number("I"), self.number("Q")
        if inner in SCALARS:
            return list(self.numbers(f"{count}{SCALARS[inner]}"))
        return [self.value(inner) for _ in range(count)]

    def text(self) -> str:
        """One string."""
        return self.bytes(self.number("Q")).decode()

    def number(self, kind: str) -> Any:
        """One number."""
        return self.numbers(kind)[0]

    def numbers(self, kinds: str) -> tuple[Any, ...]:
        """Numbers side by side, of the kinds that `struct` calls so."""
        layout = f"<{kinds}"
        return struct.unpack(layout, self.bytes(struct.calcsize(layout)))

    def bytes(self, count: int) -> bytes:
        """The next bytes; a length beyond the file's, which damage can leave, must not be
        allocated."""
        if count > self.size - self.file.tell():
            raise struct.error("the file ends too early")
        return self.file.read(count)

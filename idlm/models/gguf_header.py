"""Reads the header of a GGUF file: its metadata and the positions of its tensors.

    "GGUF", version u32, number of tensors u64, number of metadata entries u64
    for each metadata entry: name, type u32, value
    for each tensor: name, number of dimensions u32, sizes u64 (fastest first), type u32, offset u64
    padding to the alignment, then the bytes of the tensors

All numbers are little-endian. A string is its length (u64) and its bytes. An array is the type u32,
the length u64 and the values.
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
"""The exceptions that parsing raises if bytes are missing or changed."""


@dataclass(frozen=True)
class GgufHeader:
    """The header of a GGUF file; tensors have GGUF's own names and types."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]

    @property
    def architecture(self) -> str:
        """The model family, as llama.cpp names it, such as "llama"."""
        return str(self.metadata.get("general.architecture"))


def is_gguf(path: Path) -> bool:
    """Whether `path` is a file with the suffix or the magic bytes of GGUF."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return path.suffix.lower() == ".gguf" or file.read(4) == MAGIC


def read_header(path: Path) -> GgufHeader:
    """Read the header of a GGUF file.

    Raises:
        InputError: the packages for GGUF are missing; the file is not GGUF, has another version or
            is truncated; or a tensor has a type that the package `gguf` does not know.
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
    size = path.stat().st_size
    expected = max((info.stop for info in header.tensors.values()), default=0)
    if size < expected:
        raise InputError(
            f"{str(path)!r} is truncated: {size} bytes, not the {expected} it names; "
            "download it again"
        )
    return header


def _check_version(path: Path, start: bytes) -> None:
    if start[:4] != MAGIC:
        raise InputError(f"{str(path)!r} is no GGUF file; give a GGUF file or a model folder")
    version = int.from_bytes(start[4:], "little")
    if version not in VERSIONS:
        raise InputError(
            f"{str(path)!r} has GGUF version {version}, not 2 or 3; "
            "convert it with a current llama.cpp"
        )


class _Parser:
    """Reads values in sequence; raises struct.error if the file ends too early."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path, self.size = file, path, path.stat().st_size

    def header(self) -> GgufHeader:
        """Read the header, from after the version."""
        tensors, entries = self.numbers("QQ")
        metadata = {}
        for _ in range(entries):
            name = self.text()
            metadata[name] = self.value(self.number("I"))
        tensor_entries = [self.tensor() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", ALIGNMENT)
        data = -(-self.file.tell() // alignment) * alignment
        infos = {entry[0]: self.placed(entry, data) for entry in tensor_entries}
        return GgufHeader(self.path, metadata, infos)

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Read an entry: name, shape in torch's order, id of the type, offset in the data."""
        name = self.text()
        shape = self.numbers(f"{self.number('I')}Q")
        return name, shape[::-1], self.number("I"), self.number("Q")

    def placed(self, tensor: tuple[str, tuple[int, ...], int, int], data: int) -> TensorInfo:
        """The position of an entry's bytes in the file, where the data starts at `data`."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        name, shape, kind, offset = tensor
        if kind not in [supported.value for supported in GGML_QUANT_SIZES]:
            raise InputError(
                f"{str(self.path)!r}: tensor {name!r} has the unknown type {kind}; "
                "upgrade the package gguf or use a file of another quantisation"
            )
        block, width = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        start = data + offset
        stop = start + math.prod(shape) // block * width
        return TensorInfo(self.path, GGMLQuantizationType(kind).name, shape, start, stop)

    def value(self, kind: int) -> Any:
        """Read a metadata value; raises KeyError if its type is unknown."""
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            return self.number(SCALARS[kind])
        inner, count = self.number("I"), self.number("Q")
        if inner in SCALARS:
            return list(self.numbers(f"{count}{SCALARS[inner]}"))
        return [self.value(inner) for _ in range(count)]

    def text(self) -> str:
        """Read a string: its length u64, then UTF-8."""
        return self.bytes(self.number("Q")).decode()

    def number(self, kind: str) -> Any:
        """Read a number of a `struct` format, such as "I"."""
        return self.numbers(kind)[0]

    def numbers(self, kinds: str) -> tuple[Any, ...]:
        """Read numbers of a `struct` format, such as "QQ"."""
        layout = f"<{kinds}"
        return struct.unpack(layout, self.bytes(struct.calcsize(layout)))

    def bytes(self, count: int) -> bytes:
        """Read bytes. A damaged file may give any length, so it is checked before allocation."""
        if count > self.size - self.file.tell():
            raise struct.error("the file ends too early")
        return self.file.read(count)

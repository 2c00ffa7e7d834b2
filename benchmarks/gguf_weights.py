"""The weights of a GGUF file in other formats, for engines that read GGUF: the same model in each.

    python -m benchmarks.gguf_weights MODEL.gguf [--formats F32 F16 BF16 Q8_0]
                                      [--folder build/models]

Every tensor is de-quantised to float32 first, so all formats round the same numbers, which
transformers reads from the file too. Vectors (of the norms) stay float32. Metadata is copied.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
from gguf.quants import dequantize, quantize

FILE_TYPES = {
    "F32": LlamaFileType.ALL_F32,
    "F16": LlamaFileType.MOSTLY_F16,
    "BF16": LlamaFileType.MOSTLY_BF16,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
}
"""The value of `general.file_type` for each format."""
NOT_COPIED = ("general.architecture", "general.file_type")
"""Fields that the writer or `write` sets."""


def write(source: Path, target: Path, kind: str) -> None:
    """Write `source`'s model to `target` with its matrices in the format `kind`."""
    reader = GGUFReader(source)
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    copy_metadata(reader, writer)
    writer.add_file_type(FILE_TYPES[kind])
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        stored = GGMLQuantizationType["F32" if values.ndim == 1 else kind]
        writer.add_tensor(tensor.name, quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def copy_metadata(reader: GGUFReader, writer: GGUFWriter) -> None:
    """Copy the fields of a file: shapes, tokenizer, chat template, licence."""
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in NOT_COPIED:
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)


def ensure(source: Path, formats: Sequence[str], folder: Path) -> dict[str, Path]:
    """The file of each format in `folder`; missing ones, and ones older than `source`, are
    written."""
    stem = source.stem.rpartition("-")[0] or source.stem
    files = {kind: folder / f"{stem}-{kind}.gguf" for kind in formats}
    for kind, target in files.items():
        if not target.exists() or target.stat().st_mtime < source.stat().st_mtime:
            unfinished = target.with_suffix(".part")
            write(source, unfinished, kind)
            unfinished.replace(target)
    return files


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("--formats", nargs="+", choices=tuple(FILE_TYPES), default=list(FILE_TYPES))
    parser.add_argument("--folder", type=Path, help="where to write; the source's own by default")
    options = parser.parse_args()
    for target in ensure(
        options.source, options.formats, options.folder or options.source.parent
    ).values():
        print(f"{target}: {target.stat().st_size / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()

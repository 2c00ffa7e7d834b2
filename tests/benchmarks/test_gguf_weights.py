"""The same weights in every format, with all metadata of the file."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")

from benchmarks.gguf_weights import FILE_TYPES, ensure  # noqa: E402  # needs the package


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A matrix in Q4_1, a vector in float32, and metadata of several kinds."""
    path = tmp_path / "tiny-Q4_1.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_token_list(["a", "b"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_1)
    matrix = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    q4 = gguf.GGMLQuantizationType.Q4_1
    writer.add_tensor("blk.0.ffn_up.weight", gguf.quants.quantize(matrix, q4), raw_dtype=q4)
    writer.add_tensor("blk.0.ffn_norm.weight", np.linspace(0, 1, 64, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensors(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Format and values by name."""
    read = gguf.GGUFReader(path).tensors
    return {
        tensor.name: (
            tensor.tensor_type.name,
            gguf.quants.dequantize(tensor.data, tensor.tensor_type),
        )
        for tensor in read
    }


@pytest.mark.parametrize(
    ("kind", "error"), [("F32", 0), ("F16", 1e-3), ("BF16", 8e-3), ("Q8_0", 8e-3)]
)
def test_a_format_holds_the_same_numbers_as_far_as_it_can(
    source: Path, kind: str, error: float
) -> None:
    found, expected = tensors(ensure(source, [kind], source.parent)[kind]), tensors(source)
    assert {name: form for name, (form, _) in found.items()} == {
        "blk.0.ffn_up.weight": kind,
        "blk.0.ffn_norm.weight": "F32",
    }
    for name, (_, values) in expected.items():
        size = 0 if name.endswith("norm.weight") else error * np.abs(values).max()
        assert np.abs(found[name][1] - values).max() <= size


def test_metadata_is_copied_and_the_file_type_is_its_own(source: Path) -> None:
    written = gguf.GGUFReader(ensure(source, ["F16"], source.parent)["F16"]).fields
    assert written["general.name"].contents() == "tiny"
    assert written["llama.context_length"].contents() == 64
    assert written["tokenizer.ggml.tokens"].contents() == ["a", "b"]
    assert written["general.file_type"].contents() == FILE_TYPES["F16"]


def test_a_file_is_written_once_and_again_when_its_source_is_newer(source: Path) -> None:
    target = ensure(source, ["F32"], source.parent)["F32"]
    assert target == source.parent / "tiny-F32.gguf"
    first = target.stat().st_mtime_ns
    assert ensure(source, ["F32"], source.parent)["F32"].stat().st_mtime_ns == first
    os.utime(source, (target.stat().st_mtime + 10,) * 2)
    assert ensure(source, ["F32"], source.parent)["F32"].stat().st_mtime_ns > first

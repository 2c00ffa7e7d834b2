"""Documents on disk, and when they are written again."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from idlm.errors import InputError
from idlm.training import corpus as corpus_module
from idlm.training.config import DataConfig, WeightedPath
from idlm.training.corpus import corpus
from idlm.training.data import Example
from idlm.training.store import Chosen, Store, Writer, lengths
from tests.training import tiny

EXAMPLES = [
    Example([1, 2, 3], ((1, 3),), "a line 1"),
    Example([4, 5, 6, 7, 8], ((1, 2), (3, 5)), "ä line 2"),
    Example([2**31 - 1, 0], ((1, 2),), ""),
]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    with Writer(tmp_path) as writer:
        for row, example in enumerate(EXAMPLES):
            writer.add(example, row // 2)
        assert len(writer) == 3
        writer.meta = {"note": 1}
    store = Store(tmp_path)
    assert list(store) == EXAMPLES and store[-1] == EXAMPLES[-1] and store[1:] == EXAMPLES[1:]
    assert store.meta["note"] == 1 and store.rows.tolist() == [0, 0, 1]
    with pytest.raises(IndexError):
        store[3]
    chosen = Chosen(store, torch.tensor([2, 0]))
    assert list(chosen) == [EXAMPLES[2], EXAMPLES[0]]
    assert lengths(chosen).tolist() == lengths(list(chosen)).tolist() == [2, 3]


def test_a_failed_write_leaves_no_store(tmp_path: Path) -> None:
    with pytest.raises(KeyError), Writer(tmp_path) as writer:
        writer.add(EXAMPLES[0], 0)
        raise KeyError
    assert not (tmp_path / "store.json").exists()


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    path = tiny.write_jsonl(tmp_path / "data.jsonl", tiny.examples(10))
    return DataConfig(source="jsonl", path=str(path), held_out=2)


def read(config: DataConfig, folder: Path, resumes: bool = False) -> list[Example]:
    data = corpus(config, tiny.model(), 10, folder / "run", resumes)
    return [*data.training, *data.held_out]


def test_rows_are_tokenised_once(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = read(config, tmp_path)
    assert [e.tokens for e in first] == [e.tokens for e in tiny.examples(10)]
    monkeypatch.setattr(corpus_module, "Reader", None)  # would be called
    assert read(config, tmp_path, resumes=True) == first
    os.utime(str(config.path))  # touched and not changed
    assert read(config, tmp_path, resumes=True) == first
    with pytest.raises(TypeError):
        read(replace(config, examples=8), tmp_path)


def test_before_the_first_step_data_may_change(config: DataConfig, tmp_path: Path) -> None:
    read(config, tmp_path)
    tiny.write_jsonl(Path(str(config.path)), tiny.examples(6))
    assert len(read(config, tmp_path)) == 6
    assert len(read(replace(config, examples=4), tmp_path)) == 4


def test_after_it_a_change_is_refused_and_named(config: DataConfig, tmp_path: Path) -> None:
    before = read(config, tmp_path)
    path = Path(str(config.path))
    text = path.read_text()
    size = path.stat().st_size
    path.write_text(text[:-1] + " ")  # the same rows; the size is the same, too
    assert path.stat().st_size == size
    with pytest.raises(InputError, match="data changed since step 0: '.*data.jsonl' has other co"):
        read(config, tmp_path, resumes=True)
    path.write_text(text)
    assert read(config, tmp_path, resumes=True) == before
    path.unlink()
    with pytest.raises(InputError, match="cannot read '.*data.jsonl'"):
        read(config, tmp_path, resumes=True)


def test_a_folder_that_grew_is_refused(config: DataConfig, tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    tiny.write_jsonl(folder / "a.jsonl", tiny.examples(10))
    config = replace(config, path=str(folder))
    read(config, tmp_path)
    tiny.write_jsonl(folder / "b.jsonl", tiny.examples(3))
    with pytest.raises(InputError, match=r"since step 0: '.*b.jsonl' is new; restore it or name"):
        read(config, tmp_path, resumes=True)


def test_another_tokenizer_is_refused(config: DataConfig, tmp_path: Path, tokenizer: Any) -> None:
    read(config, tmp_path)
    other = tiny.model()
    other.tokenizer = tokenizer
    with pytest.raises(InputError, match="since step 0: the tokenizer or the chat template"):
        corpus(config, other, 10, tmp_path / "run", resumes=True)


def test_a_full_disk_is_one_error(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Writer, "add", full)
    with pytest.raises(InputError, match="cannot write the documents to .*No space left.*free"):
        read(config, tmp_path)
    assert not (tmp_path / "run" / "data").exists()


def test_weighted_sources_hold_out_their_share(tmp_path: Path) -> None:
    examples = tiny.examples(30)
    parts = {"a": examples[:4], "b": examples[4:24], "c": examples[24:]}
    for name, rows in parts.items():
        tiny.write_jsonl(tmp_path / f"{name}.jsonl", rows)
    paths = tuple(
        WeightedPath(str(tmp_path / f"{name}.jsonl"), weight)
        for name, weight in [("a", 1.0), ("b", 6.0), ("c", 1.0)]
    )
    config = DataConfig(source="jsonl", path=paths, held_out=8)
    data = corpus(config, tiny.model(), 10, tmp_path / "run")
    assert [e.row.split("/")[-1] for e in data.held_out] == [
        *["a.jsonl line 3", "a.jsonl line 4"],
        *[f"b.jsonl line {line}" for line in (16, 17, 18, 19, 20)],
        "c.jsonl line 6",
    ]
    assert [tuple(share) for share in data.shares] == [(0, 2, 1.0), (2, 17, 6.0), (17, 22, 1.0)]
    assert [e.tokens for e in data.training] == [
        e.tokens
        for rows, out in ((parts["a"], 2), (parts["b"], 5), (parts["c"], 1))
        for e in rows[:-out]
    ]
    few = replace(config, held_out=2)
    with pytest.raises(InputError, match="held_out is 2 but data.path has 3 sources"):
        corpus(few, tiny.model(), 10, tmp_path / "few")
    short = corpus(replace(config, examples=3, held_out=3), tiny.model(), 10, tmp_path / "short")
    assert [len(short.training), len(short.held_out)] == [6, 3]


def test_a_long_response_is_cut_and_said(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": [5], "response": [6] * size} for size in (3, 60, 5, 70, 2)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(source="jsonl", path=str(path), held_out=1, max_length=40)
    data = corpus(config, tiny.model(), 10, tmp_path / "run")
    assert [e.length for e in data.training] == [4, 40, 6, 40]
    assert data.tally.notes == ["2 of 5 documents were cut at the length limit"]

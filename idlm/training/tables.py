"""Rows of files, folders and datasets, read as they are needed.

name             its rows
*.jsonl          a JSON object a line
*.parquet        the rows of the table
*.txt            {"prompt": line} for each line that is not empty
a folder         its files of these kinds, by name
another name     the dataset of that name on the Hugging Face hub, streamed
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from idlm.errors import InputError
from idlm.extras import need
from idlm.inputs import read_lines
from idlm.models.sources import first_line
from idlm.training.rows import read_jsonl

Named = tuple[str, str | dict[str, Any]]
"""A row with its name for messages of errors. One of a JSONL file is still text, so that a broken
line is an error of its row."""
DATASET = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Tables:
    """Where rows come from.

    Attributes:
        names: files, folders or datasets, in order.
        subset, split: of datasets.
    """

    names: tuple[str, ...]
    subset: str | None = None
    split: str = "train"

    def rows(self) -> Iterator[Named]:
        """All rows in order.

        Raises:
            InputError: a file or dataset cannot be read.
        """
        for name in self.names:
            path = Path(name).expanduser()
            if path.is_dir():
                for file in _files(path):
                    yield from READERS[file.suffix](file)
            elif path.suffix in READERS:
                yield from READERS[path.suffix](path)
            else:
                yield from self._dataset(name)

    def files(self) -> Iterator[tuple[str, Path | None]]:
        """The name of each file that `rows` reads, and its path; a dataset has none."""
        for name in self.names:
            path = Path(name).expanduser()
            if path.is_dir():
                yield from ((str(file), file) for file in _files(path))
            else:
                yield name, path if path.suffix in READERS else None

    def _dataset(self, name: str) -> Iterator[Named]:
        if Path(name).expanduser().exists() or not DATASET.fullmatch(name):
            raise InputError(
                f"cannot read {name!r}; give a file ({', '.join(READERS)}), a folder of them, "
                "or the name of a dataset"
            )
        need("data", f"there is no file {name!r}; a dataset of that name")
        import datasets

        try:
            rows = datasets.load_dataset(name, self.subset, split=self.split, streaming=True)
            yield from _numbered(rows, f"dataset {name}")
        except (OSError, ValueError, ImportError) as error:  # the hub's own errors are OSErrors
            raise InputError(
                f"there is no file {name!r}, and the dataset of that name cannot be read "
                f"({first_line(error)}); check the name, subset, split and connection"
            ) from None


def _numbered(rows: Iterable[dict[str, Any]], name: str) -> Iterator[Named]:
    for at, row in enumerate(rows, start=1):
        yield f"{name} row {at}", row


def _files(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.iterdir() if file.suffix in READERS)
    if not files:
        raise InputError(f"the folder {str(folder)!r} has no {', '.join(READERS)} file; add one")
    return files


def _text(path: Path) -> Iterator[Named]:
    for at, line in enumerate(read_lines(path), start=1):
        if line.strip():
            yield f"{path} line {at}", {"prompt": line}


def _parquet(path: Path) -> Iterator[Named]:
    need("data", f"reading {str(path)!r}")
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as table:
            rows = (row for batch in table.iter_batches(1024) for row in batch.to_pylist())
            yield from _numbered(rows, str(path))
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(
            f"cannot read {str(path)!r} ({first_line(error)}); give a Parquet file"
        ) from None


READERS = {".jsonl": read_jsonl, ".parquet": _parquet, ".txt": _text}
"""By the ending of a file's name."""

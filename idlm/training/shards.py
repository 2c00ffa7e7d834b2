"""The folder that self-distillation writes, which may be killed at any point.

    distill.json            the settings
    rows-00000.jsonl        rows in order, so many a shard
    dropped/rows.jsonl      rows that are not for training, with the reason
    .lock                   held while a run writes

Every row, kept or dropped, is appended in the order of (index, sample) with one write. So the rows
that are there are the first ones, and at most the last line is cut off.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from idlm.errors import InputError

SETTINGS, DROPPED = "distill.json", "dropped/rows.jsonl"
Place = tuple[int, int]
"""Index of the prompt and number of the sample."""


class Shards:
    """The rows of a folder; a context that holds its lock.

    Args:
        settings: what the rows depend on; a folder continues only with the same. `shard_rows`
            among them is the number of rows of a shard.
        wait: until another run does not write any more.

    Attributes:
        rows: how many are kept.
        dropped: how many are not, by reason.

    Raises:
        InputError: the folder cannot be written, holds something else, or another run writes
            and this one does not wait.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], wait: bool = False) -> None:
        self.folder, self.shard_rows = folder, int(settings["shard_rows"])
        self.rows, self.dropped = 0, Counter[str]()
        self._settings = json.loads(json.dumps(settings))
        self._lock = FileLock(folder / ".lock", timeout=-1 if wait else 0)

    def __enter__(self) -> Shards:
        try:
            (self.folder / DROPPED).parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except Timeout:
            raise InputError(
                f"another run writes to {str(self.folder)!r}; wait for it or name another folder"
            ) from None
        except OSError as error:
            raise _unwritable(self.folder, error) from None
        try:
            self._keep_settings()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def present(self) -> Iterator[tuple[Place, list[int]]]:
        """The place and the prompt's ids of each row that is there, in order. Counts them, and
        takes away a line that a kill cut off.

        Raises:
            InputError: a row is missing or broken.
        """
        self.rows, self.dropped = 0, Counter()
        files, last = shards(self.folder), self.folder / DROPPED
        dropped = _read(last, may_be_cut=True)
        kept = (row for file in files for row in _read(file, may_be_cut=file == files[-1]))
        for row, reason in _merged(kept, dropped):
            if reason is None:
                self.rows += 1
            else:
                self.dropped[reason] += 1
            yield _place(row), row["prompt"]
        for file in (*files[-1:], last):
            _trim(file)

    def append(self, row: dict[str, Any], reason: str | None) -> None:
        """Write a row at its end; a `reason` drops it.

        Raises:
            InputError: it cannot be written, as on a full disk.
        """
        if reason is None:
            file = self.folder / f"rows-{self.rows // self.shard_rows:05}.jsonl"
            self.rows += 1
        else:
            file, row = self.folder / DROPPED, {"reason": reason, **row}
            self.dropped[reason] += 1
        _append(file, json.dumps(row).encode() + b"\n")

    def _keep_settings(self) -> None:
        """Write the settings, or compare them with those that are there."""
        file = self.folder / SETTINGS
        if not file.exists():
            if shards(self.folder):
                raise InputError(
                    f"{str(self.folder)!r} holds rows without {SETTINGS}; name another folder"
                )
            new = file.with_suffix(".new")
            try:
                new.write_text(json.dumps(self._settings, indent=1) + "\n")
            except OSError as error:
                raise _unwritable(new, error) from None
            os.replace(new, file)
        try:
            old = json.loads(file.read_text())
        except ValueError:
            raise InputError(f"{str(file)!r} is not JSON; name another folder") from None
        for key in old | self._settings:
            if old.get(key) != self._settings.get(key):
                raise InputError(
                    f"{self.folder} was made with {key} {old.get(key)!r}, now it is "
                    f"{self._settings.get(key)!r}; restore the setting or name another folder"
                )


def shards(folder: Path) -> list[Path]:
    """The shards of a folder in order."""
    return sorted(folder.glob("rows-*.jsonl"))


def _merged(
    kept: Iterator[dict[str, Any]], dropped: Iterator[dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], str | None]]:
    """Rows of both in the order of their places, with the reason of those that are dropped."""
    row, other = next(kept, None), next(dropped, None)
    while row is not None or other is not None:
        if other is None or (row is not None and _place(row) < _place(other)):
            assert row is not None
            yield row, None
            row = next(kept, None)
        else:
            yield other, other["reason"]
            other = next(dropped, None)


def _place(row: dict[str, Any]) -> Place:
    return row["index"], row["sample"]


def _read(file: Path, may_be_cut: bool) -> Iterator[dict[str, Any]]:
    """The rows of a file, without a last line that is cut off."""
    if not file.exists():
        return
    with file.open("rb") as lines:
        for at, line in enumerate(lines, start=1):
            if may_be_cut and not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
                _ = row["index"], row["sample"], row["prompt"]
            except (ValueError, KeyError, TypeError):
                raise InputError(
                    f"{file} line {at} is no row of a distillation; name another folder"
                ) from None
            yield row


def _trim(file: Path) -> None:
    """Cut a file after its last whole line."""
    if file.exists():
        with file.open("rb+") as data:
            data.truncate(data.read().rfind(b"\n") + 1)


def _append(file: Path, line: bytes) -> None:
    try:
        with file.open("ab", buffering=0) as data:
            while line:
                line = line[data.write(line) :]
    except OSError as error:
        raise _unwritable(file, error) from None


def _unwritable(file: Path, error: OSError) -> InputError:
    return InputError(
        f"cannot write {str(file)!r} ({error.strerror}); make room or name another folder, then "
        "run the same command again"
    )

"""Progress where stderr is no terminal: a line at times, and not more."""

from __future__ import annotations

import pytest

from idlm import progress
from idlm.cli import common


def test_a_line_every_thirty_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr(progress, "perf_counter", lambda: now)
    with common.progress("answers", 50) as advance:
        for now in (110.0, 129.0, 131.0, 140.0, 160.0, 162.0):  # noqa: B007  # the clock
            advance()
    advance = progress.Lines("rows", 9, done=4)
    now = 200.0
    advance(2, ", 7 tokens/s")
    written = capsys.readouterr()
    assert written.err.splitlines() == [
        "answers: 3 of 50",
        "answers: 6 of 50",
        "rows: 6 of 9, 7 tokens/s",
    ]
    assert written.out == ""

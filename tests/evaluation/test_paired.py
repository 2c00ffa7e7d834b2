"""The comparison of two evaluations: exact p-values, intervals, and what is not comparable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from idlm.errors import InputError
from idlm.evaluation.paired import bootstrap, compare, items_needed, mcnemar, paired


def test_mcnemar_is_exact() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(1, 5) == mcnemar(5, 1) == pytest.approx(2 * (1 + 6) / 2**6)
    assert mcnemar(0, 10) == pytest.approx(2 / 2**10)
    assert mcnemar(4, 4) == 1.0


def test_the_difference_and_its_interval() -> None:
    left, right = [1.0, 0.0] * 50, [1.0, 0.0] * 45 + [1.0, 1.0] * 5
    found = paired(left, right)
    assert found["difference"] == pytest.approx(0.05)
    assert (found["only_first"], found["only_second"]) == (0, 5)
    low, high = found["interval"]
    assert 0 <= low < 0.05 < high < 0.12
    spread = 0.05 * 0.95
    assert found["items_for_a_point"] == pytest.approx(
        (1.95996 + 0.84162) ** 2 * spread * 1e4, 1e-3
    )


def test_without_a_difference() -> None:
    assert bootstrap([0.0] * 9) == [0.0, 0.0] and items_needed([0.0] * 9) is None


def test_figures_between_0_and_1_have_no_mcnemar() -> None:
    assert "mcnemar" not in paired([0.5, 1.0], [1.0, 1.0])


def folder(path: Path, answers: list[str], **more: Any) -> Path:
    path.mkdir()
    (path / "results.json").write_text(json.dumps({"suites": {more.get("suite", "gsm8k"): {}}}))
    lines = [
        {"task": "t", "doc_id": at, "filter": "none", "target": "1", "resps": [[text]],
         "metrics": {"exact_match": float(text == "1"), "parts": [True, text == "1"]}}
        for at, text in enumerate(answers)
    ]  # fmt: skip
    (path / "gsm8k.samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_two_folders(tmp_path: Path) -> None:
    first = folder(tmp_path / "a", ["1", "2", "1", "3"])
    second = folder(tmp_path / "b", ["1", "1", "1", "4"])
    found = compare(first, second)["gsm8k"]
    assert found["items"] == 4 and found["same_answers"] == 0.5
    exact = found["metrics"]["exact_match,none"]
    assert (exact["first"], exact["second"], exact["only_second"]) == (0.5, 0.75, 1)
    assert found["metrics"]["parts,none"]["difference"] == pytest.approx(0.125)


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    first = folder(tmp_path / "a", ["1", "2"])
    with pytest.raises(InputError, match="holds no results"):
        compare(first, tmp_path)
    with pytest.raises(InputError, match="no suite in common"):
        compare(first, folder(tmp_path / "b", ["1"], suite="ifeval"))
    with pytest.raises(InputError, match=r"other items \(2 and 1\)"):
        compare(first, folder(tmp_path / "c", ["1"]))

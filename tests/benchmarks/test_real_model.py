"""The figures of the comparison, and a short run of it on a small random model."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from benchmarks import real_model
from benchmarks.chat_prompts import draw
from idlm import LLM
from idlm.evaluation.closed_loop import Run, Served


def run(*texts: list[int], tpot: float = 0.1) -> Run:
    return Run(2.0, 1.0, 100.0, [Served(text, 0.5, tpot, 0.2) for text in texts])


def test_equal_tokens_are_those_before_the_first_difference() -> None:
    ours, theirs = run([1, 2, 3, 4], [5, 6, 7, 8]), run([1, 2, 9, 4], [5, 6, 7, 8])
    assert real_model.equal_share([ours], [theirs], frozenset({99})) == 6 / 8
    assert real_model.equal_share([ours, ours], [ours, theirs], frozenset({99})) == 14 / 16


def test_what_follows_an_end_token_is_not_compared() -> None:
    ours, theirs = run([1, 2, 0, 4]), run([1, 2, 7, 7])
    assert real_model.equal_share([ours], [theirs], frozenset({0})) == 1


def test_the_decoding_rate_counts_all_requests_in_flight() -> None:
    assert real_model.decoding_rate(run([1, 2], [3, 4], tpot=0.02), concurrency=2) == pytest.approx(
        100
    )


def test_a_peer_without_environment_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(real_model.NEEDED, "vllm", tmp_path / "python")
    assert real_model.with_environment(["vllm", "transformers"]) == ["transformers"]
    assert "make peers" in capsys.readouterr().err


def test_no_two_prompts_begin_alike(checkpoint: Path) -> None:
    llm = LLM(str(checkpoint / "base"), stride=1)
    asked = [request for seed in (0, 1) for request in draw(llm, 4, seed, 8)]
    page_size = 16
    beginnings = {tuple(request.prompt_token_ids[:page_size]) for request in asked}
    assert len(beginnings) == len(asked) == 8


def test_a_short_run(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint / "base", folder)
    # the small tokenizer makes many tokens of a prompt
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    output = tmp_path / "results" / "real_model.json"
    command = (
        f"x --model {folder} --threads 1 --concurrency 2 --precisions float32 --modes all "
        "--peers transformers"
    )
    short = [
        "--requests",
        "2",
        "--tokens",
        "4",
        "--repeats",
        "1",
        "--cost-repeats",
        "1",
        "--output",
        str(output),
    ]
    monkeypatch.setattr(sys, "argv", [*command.split(), *short])
    real_model.main()
    report = json.loads(output.read_text())
    rows = {(row["engine"], row["mode"]): row for row in report["rows"]}
    assert set(rows) == {("idlm", "ar"), ("idlm", "all"), ("transformers", "static")}
    assert rows["transformers", "static"]["equal_tokens"] == rows["idlm", "ar"]["equal_tokens"] == 1
    assert rows["idlm", "all"]["equal_tokens"] is None and rows["idlm", "all"]["simulated"]
    assert rows["idlm", "ar"]["over_our_ar"] == {"median": 1, "min": 1, "max": 1}
    assert [list(steps["rows"]) for steps in report["steps"]] == [["1", "4", "7", "16"]]
    assert "transformers static" in report["versions"]

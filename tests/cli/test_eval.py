"""`idlm eval`, `idlm compare` and `idlm lm-eval` as commands."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from idlm.cli import app
from tests.evaluation import suite_files

pytest.importorskip("lm_eval")


def invoke(*arguments: object, status: int = 0) -> Any:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == status, result.output
    return result


def test_the_list_has_all_suites() -> None:
    report = json.loads(invoke("eval", "--list", "--json").stdout)
    assert len(report) == 15 and report["gsm8k"]["source"] == "openai/gsm8k"
    assert report["humaneval"]["by"] == "idlm (--run-code)"
    assert "harness: arc_challenge, or idlm" in report["arc-c"]["by"]
    assert "LiveCodeBench v6" in invoke("eval", "--list").stdout


def test_ar_and_isd_are_compared(checkpoint: Path, tmp_path: Path) -> None:
    data = suite_files.write(tmp_path / "data")
    shared = (
        *("eval", checkpoint / "base", "aime-25", "--data", data, "--adapter", checkpoint / "lora"),
        *("--dtype", "float64", "--preset", "fast", "--max-tokens", 8, "--threads", 1),
    )
    for name, stride in (("ar", 1), ("isd", 3)):
        report = invoke(*shared, "-o", tmp_path / name, "--stride", stride, "--json")
        found = json.loads(report.stdout)
    assert found == json.loads((tmp_path / "isd" / "results.json").read_text())
    assert found["settings"]["limit"] == 200 and found["settings"]["stride"] == 3
    both = invoke("compare", tmp_path / "ar", tmp_path / "isd", "--json")
    assert json.loads(both.stdout)["suites"]["aime-25"]["same_answers"] == 1.0
    words = invoke("compare", tmp_path / "ar", tmp_path / "isd").stdout
    assert words.startswith("aime-25: 100.0 % of the answers are equal\n  exact_match: 0.0% and")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nano"], "give a model and suites"),
        (["nano", "arc"], "suite 'arc' is unknown"),
        (["nano", "humaneval"], "allow it with --run-code"),
        (["m", "mmlu", "--url", "http://127.0.0.1:1/v1"], "a chat API does not give"),
    ],
)
def test_what_is_refused(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(sys, "argv", ["idlm", "eval", *arguments])
    with pytest.raises(SystemExit) as end:
        app()
    assert end.value.code == 2 and words in capsys.readouterr().err


def test_the_harness_knows_our_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its command line gets our arguments, and finds our model beside its own."""
    from lm_eval import __main__
    from lm_eval.api.registry import get_model

    called: list[str] = []
    monkeypatch.setattr(__main__, "cli_evaluate", lambda: called.extend(sys.argv))
    monkeypatch.setattr(sys, "argv", ["idlm"])
    words = ["run", "--model", "idlm", "--model_args", "pretrained=nano", "--help"]
    invoke("lm-eval", *words)
    device = [] if torch.cuda.is_available() else ["--device", "cpu"]  # its default is cuda:0
    assert called == ["idlm lm-eval", *words, *device]
    for others in (["run", "--device=cuda:1"], ["ls", "tasks"], ["run", "-C", "file.yaml"]):
        called.clear()
        invoke("lm-eval", *others)
        assert called == ["idlm lm-eval", *others]
    assert get_model("idlm").__name__ == "EngineModel" and get_model("hf").__name__ == "HFLM"

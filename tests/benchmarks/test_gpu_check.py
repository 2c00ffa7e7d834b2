"""What of the GPU check can be checked without a GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from time import time

import pytest
import torch

from benchmarks import gpu_check, gpu_smoke
from benchmarks.gpu_check import (
    SUMMARY,
    attempt,
    failures,
    main,
    outcome,
    run_part,
    start_part,
    summary,
)
from benchmarks.gpu_costs import weight_bytes
from idlm import SamplingParams, load
from idlm.models.idlm_model import Idlm
from tests.engine.tiny import tiny_model


def test_the_weights_of_a_step_leave_out_an_embedding_that_is_no_head() -> None:
    tied, untied = tiny_model("qwen3"), tiny_model("qwen2")
    assert weight_bytes(Idlm(tied, None, 24)) == 8 * sum(p.numel() for p in tied.parameters())
    table = untied.get_input_embeddings().weight
    assert weight_bytes(Idlm(untied, None, 24)) == 8 * (
        sum(p.numel() for p in untied.parameters()) - table.numel()
    )


def test_every_bound_that_does_not_hold_is_named() -> None:
    report = {
        "tests": {"passed": False},
        "shape": {
            "costs": {"bounds": {"fast": [1.3, False], "small": [1.0, True]}},
            "rows": [{"bounds": 3}],
        },
        "nano": {"passed": True, "bounds": {"faster than AR": [0.9, False]}},
    }
    found = failures(report)
    assert [line.split(":")[0] for line in found] == ["/tests", "/shape/costs", "/nano"]
    assert "fast" in found[1] and "1.3" in found[1] and "0.9" in found[2]


def test_a_part_that_fails_is_reported_and_fails_the_check() -> None:
    found = attempt(lambda: {"figure": 1 / 0})
    assert failures({"part": found}) == ["/part: failed"]
    assert "ZeroDivisionError" in json.dumps(found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check"])
    assert main() == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and "CUDA" in printed.err


def test_the_bundled_model_gives_the_same_tokens_whatever_the_plan_and_the_batch() -> None:
    """The smoke test's comparisons, on the CPU."""
    idlm = load("nano", dtype="float64")
    prompts, params = gpu_smoke.questions(idlm, 2), SamplingParams(temperature=0, max_tokens=6)
    found = gpu_smoke.comparisons(idlm, prompts, params, deterministic=True)
    assert found["bounds"] and not failures(found)
    assert gpu_smoke.same([[1, 2], [3]], [[1, 2], [4]]) == 0.5


def test_a_part_writes_each_figure_and_goes_on_after_a_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def figures(until: float):  # type: ignore[no-untyped-def]
        yield "wrong", lambda: {"figure": 1 / 0}
        yield "right", lambda: {"figure": 3}
        raise MemoryError("no room")

    monkeypatch.setitem(run_part.__globals__["PARTS"], "smoke", (figures, 1.0))
    run_part("smoke", time() + 1.0, tmp_path / "smoke.json")
    found = json.loads((tmp_path / "smoke.json").read_text())
    assert found["right"]["figure"] == 3 and failures(found) == ["/wrong: failed", "/all: failed"]


def test_a_part_that_takes_too_long_is_ended_and_named(tmp_path: Path) -> None:
    found = start_part("smoke", 0.1, tmp_path / "gpu.json")
    assert found["process"]["status"] == "time is up" and failures(found) == ["/process: failed"]


def test_summaries_are_short() -> None:
    found = {
        f"figure {number}": {"seconds": 0.123456789, "bounds": {}, "name": "x" * 50}
        for number in range(99)
    }
    assert len(summary("costs", found)) == SUMMARY
    assert (
        summary("costs", {"a": found["figure 0"]})
        == f"## costs\na: {{seconds:0.1235,name:{'x' * 50}}}"
    )


def test_the_outcome_of_pytest() -> None:
    lines = [
        "4 workers [7 items]",
        "[gw0] [  1%] PASSED tests/a.py::one ",
        "[gw1] [  2%] FAILED tests/a.py::two[1] ",
        "E   assert 1 == 2",
        "end",
    ]
    found = outcome(lines)
    assert found["counts"] == {"passed": 1, "skipped": 0, "failed": 1, "error": 0, "of": 7}
    assert (found["failed"], found["errors"]) == (["a.py::two[1] "], ["E   assert 1 == 2"])
    assert found["last"] == ["end"]


def test_tests_that_take_too_long_are_interrupted_and_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "test_slow.py"
    file.write_text("import time\ndef test_one(): pass\ndef test_two(): time.sleep(100)\n")
    monkeypatch.setattr(gpu_check, "TESTS", (str(file),))
    monkeypatch.setattr(gpu_check, "find_spec", lambda name: None)  # workers take long to start
    found = gpu_check.run_tests(time() + 10 + gpu_check.TESTS_LEAVE)
    assert failures(found) == [": failed"]
    assert found["status"] == "time is up"
    assert (found["counts"]["passed"], found["counts"]["of"]) == (1, 2)  # type: ignore[index]

"""What of the GPU check can be checked without a GPU."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks.gpu_check import attempt, failures, main, weight_bytes
from idlm.models.idlm_model import Idlm
from tests.engine.tiny import tiny_model


def test_the_weights_of_a_step_leave_out_an_embedding_that_is_no_head() -> None:
    tied, untied = tiny_model("qwen3"), tiny_model("qwen2")
    assert weight_bytes(Idlm(tied, None, 24)) == 8 * sum(p.numel() for p in tied.parameters())
    table = untied.get_input_embeddings().weight
    assert weight_bytes(Idlm(untied, None, 24)) == 8 * (sum(p.numel() for p in untied.parameters()) - table.numel())


def test_every_bound_that_does_not_hold_is_named() -> None:
    report = {
        "tests": {"passed": False},
        "shape": {"costs": {"bounds": {"fast": [1.3, False], "small": [1.0, True]}}, "rows": [{"bounds": 3}]},
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

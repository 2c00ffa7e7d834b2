"""The figure's methods share all but what the table of objectives says."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.paper import METHODS, OBJECTIVES, config
from idlm.evaluation.results import wilson
from idlm.training.read_config import parse_config


def test_runs_differ_in_their_objectives_alone() -> None:
    trees = {name: config(name, 100, Path("runs")) for name in OBJECTIVES}
    configs = {name: parse_config(tree) for name, tree in trees.items()}
    base = configs["idlm-full"]
    for name, one in configs.items():
        assert one.data == base.data and one.model == base.model
        assert (one.seed, one.batch_size, one.steps) == (base.seed, base.batch_size, 100)
        if one.method == "full":
            assert one.optimizer == base.optimizer
        assert one.output_dir == f"runs/{name}"
    assert {method.trained for method in METHODS.values()} == {None, *OBJECTIVES}


def test_interval_of_a_share() -> None:
    _, low, high = wilson(90, 100)
    assert (low, high) == (pytest.approx(0.8256, abs=1e-4), pytest.approx(0.9448, abs=1e-4))
    assert wilson(0, 10).low == pytest.approx(0) and wilson(10, 10).high == pytest.approx(1)

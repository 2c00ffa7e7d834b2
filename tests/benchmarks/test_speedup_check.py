"""The constants that the check gives the speed-up model, and its prediction of a run."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.speedup_check import FEW, MANY, NANO, SOME, machine, predicted_rate
from idlm.evaluation.speedup import Load, Machine, autoregressive, forward_seconds, strided
from idlm.evaluation.workload import Request

CPU = Machine(bandwidth=2e10, flops=1e11, fixed=3e-4, overlap=0.5)


def test_constants_are_those_behind_the_products() -> None:
    memory = NANO.weights / CPU.bandwidth
    each = 2 * (NANO.body + NANO.head) / CPU.flops
    some = memory + SOME * each - CPU.overlap * min(memory, SOME * each)
    found = machine({FEW: memory, SOME: some, MANY: MANY * each}, CPU.fixed)
    assert found.bandwidth == pytest.approx(CPU.bandwidth)
    assert found.flops == pytest.approx(CPU.flops)
    assert (found.overlap, found.fixed) == (pytest.approx(0.5), CPU.fixed)


def test_a_run_is_its_windows_and_its_prompts() -> None:
    """Two requests at once, 10 steps of 16 rows each, and prompts of 50 tokens."""
    method = strided([1.0], 4)
    row: dict[str, Any] = {"plans": {"all-4": 10}, "tokens": 80, "tpf": 4.0, "requests": 2}

    def draw(count: int, seed: int) -> list[Request]:
        return [Request([5] * 50, 40)] * count

    window = forward_seconds(method.forwards[0], NANO, CPU, Load(2, 70))  # 50 and half of 40
    attended = 4 * NANO.layers * NANO.heads * NANO.head_size * 25 * 10
    prefill = (2 * NANO.body * 10 + attended) / CPU.flops  # 100 rows in 10 steps
    rate = predicted_rate(row, method, CPU, draw)
    assert rate == pytest.approx(2 * 4 / (window + prefill))
    slower = predicted_rate({**row, "plans": {"ar": 10}, "tpf": 4.0}, autoregressive(), CPU, draw)
    assert slower < rate

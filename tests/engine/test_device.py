"""What a GPU asks of the engine, shown without one: few graphs, prefills by themselves, the right
device."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from idlm import Idlm, SamplingParams
from idlm.config import EngineConfig
from idlm.decoding import reference
from idlm.decoding.plan import AR, Plan
from idlm.decoding.settings import Features, Settings
from idlm.engine import costs, record, runner
from idlm.engine.budget import PREFILL_LATE
from idlm.engine.build import build_engine
from idlm.engine.memory import gpu_share
from idlm.engine.record import Recorder
from idlm.engine.results import StepResult
from idlm.engine.slots import select
from idlm.engine.step import StepKey
from idlm.kernels import gpu
from tests.engine.tiny import tiny_idlm

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
CUDA = SimpleNamespace(device=torch.device("cuda", 0))


@pytest.fixture(scope="module")
def idlm() -> Idlm:
    return tiny_idlm("qwen3")


def eager(kind: StepKey, rows: Tensor, columns: Tensor, prompts: object = None) -> StepResult:
    return StepResult(torch.zeros(len(rows), 5))


def graph(
    core: Any, kind: StepKey, rows: Tensor, columns: Tensor, place: object
) -> Callable[..., tuple[Tensor]]:
    return lambda rows, columns: (torch.ones(len(rows), 5),)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """One that believes its model to be on a GPU."""
    monkeypatch.setattr(record, "_Place", object)
    monkeypatch.setattr(record, "_graph", graph)
    return Recorder(SimpleNamespace(idlm=CUDA, step=eager), on=True)  # type: ignore[arg-type]


def run(recorder: Recorder, batch: int, times: int = 2) -> list[bool]:
    """Steps of a batch; for each, whether it was a replay."""
    kind, rows = StepKey(AR, Features()), torch.zeros(batch)
    return [
        bool(recorder.step(kind, rows, torch.zeros(3), None).packed.any()) for _ in range(times)
    ]


def test_a_graph_is_recorded_at_the_second_step_of_its_shape(recorder: Recorder) -> None:
    assert run(recorder, 1, 3) == [False, True, True] and run(recorder, 2) == [False, True]


def test_the_graph_not_used_for_longest_makes_room(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "MOST_GRAPHS", 2)
    for batch in (1, 2, 1, 3):
        run(recorder, batch)
    assert [key[1] for key in recorder._recordings] == [1, 3]  # type: ignore[index]
    assert run(recorder, 2, 1) == [True], "it is recorded again at once"


def test_without_memory_for_a_graph_its_steps_run_eagerly(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_memory(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError

    run(recorder, 1)
    monkeypatch.setattr(record, "_graph", no_memory)
    with caplog.at_level(logging.WARNING, "idlm"):
        assert run(recorder, 4, 5) == [False] * 5
    assert caplog.text.count("no memory to record ar for 4 requests") == 1
    assert run(recorder, 1) == [True, True]


def test_few_contexts_have_graphs_of_their_own() -> None:
    assert [runner._context(tokens) for tokens in (1, 512, 513, 2048, 2049)] == [
        512,
        512,
        2048,
        2048,
        8192,
    ]
    assert len({min(runner._context(tokens), 40_960) for tokens in range(1, 40_961)}) == 5


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("stride, branches", [(1, "all"), (4, "all")])
def test_prompts_go_by_themselves_where_graphs_are_of_windows_alone(
    idlm: Idlm, stride: int, branches: str, late: int
) -> None:
    engine = build_engine(
        idlm, EngineConfig(stride, branches, lookahead=late, prefill_tokens=5, record=False)
    )
    core, steps = engine.runner.model_step, []
    engine.runner._graphs, step = True, core.step

    def counted(kind: StepKey, rows: Tensor, *rest: Any) -> StepResult:
        steps.append(len(rows))
        return step(kind, rows, *rest)

    core.step = counted  # type: ignore[method-assign]
    prompts = [[3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [7], [5] * 17]
    names = [engine.add(prompt, GREEDY, 0) for prompt in prompts]
    results = {
        update.request_id: update.result for update in engine.run() if update.result is not None
    }
    for name, prompt in zip(names, prompts, strict=True):
        expected = reference.ar(idlm.forward, reference.Request(prompt, GREEDY, idlm.mask_id))
        assert results[name].token_ids == expected.tokens
    assert set(steps) <= {1, 2, 4}


def test_while_nobody_decodes_no_window_is_run(idlm: Idlm) -> None:
    engine = build_engine(idlm, EngineConfig(1, "all", record=False))
    engine.runner._graphs, engine.runner.model_step.step = True, None  # type: ignore[method-assign, assignment]
    chunk = runner.Chunk(0, [3, 4, 5], 0)
    request = engine.admission.request([3, 4, 5, 6], GREEDY, 0)
    request.slot, request.pages = 0, [1]
    engine.runner.seat(request)
    outcome = engine.runner.step(StepKey(AR, Features()), [], 1, [chunk]).read()
    assert (
        outcome.packed.shape == (0, 6) and outcome.prompt is not None and len(outcome.prompt) == 3
    )


def test_where_results_come_late_the_host_does_not_time_the_prefill(idlm: Idlm) -> None:
    """The time of a launch says nothing of the device; a budget made of it would shrink to its
    least."""
    engine = build_engine(idlm, EngineConfig(1, "all", lookahead=1))
    engine.add([3, 4], GREEDY, 0)
    for _ in range(3):
        engine.step()
    engine.budget.observe(AR, 1, 0, 2e-4)
    engine.budget.observe(AR, 0, 64, 2e-2)
    assert engine.scheduler.decoding
    assert engine.budget.step_worth() < 100 < PREFILL_LATE == engine.budget.tokens(1, 0)


def test_steps_run_on_the_models_own_device(idlm: Idlm, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(gpu.current(torch.device("cpu")), nullcontext)
    assert gpu.current(torch.device("cuda", 1)).idx == 1  # type: ignore[attr-defined]
    entered = []
    monkeypatch.setattr(runner, "current", lambda device: entered.append(device) or nullcontext())
    engine = build_engine(idlm, EngineConfig(1, "all"))
    engine.runner.step(StepKey(AR, Features()), [], 1)
    assert entered == [idlm.device]


def test_the_cache_leaves_room_for_steps_and_graphs() -> None:
    gib = 2**30
    assert gpu_share(62 * gib, gib) == int(0.85 * 62 * gib)
    assert gpu_share(7 * gib, gib) == int(3.5 * gib)
    assert gpu_share(gib, gib) == 0


def test_what_is_as_large_as_the_logits_is_copied_only_where_needed() -> None:
    settings = Settings.empty(2, 24, 24)
    settings.put(
        0, SamplingParams(logit_bias={3: 1.0}, presence_penalty=0.5, min_tokens=2), 0, [1], (), [2]
    )
    whole, plain = (
        select(settings, torch.tensor([0]), one) for one in (settings.features, Features())
    )
    for name in ("bias", "stop", "seen", "counts"):
        assert (
            torch.equal(getattr(whole, name)[0], getattr(settings, name)[0])
            and getattr(plain, name) is None
        )
    assert torch.equal(plain.temperature, settings.temperature[:1])


@pytest.mark.parametrize("device, batches", [("cuda", {1, 8, 64}), ("cpu", {1})])
def test_what_recording_takes_is_not_counted_on_a_gpu(
    device: str, batches: set[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(costs, "_cache_file", lambda *_: tmp_path / "costs")
    table = costs.measured_costs(_measured(device, 1.0), [AR, Plan(2, "all")], 64, seconds=1.5)
    assert {row["batch"] for row in table.to_json()} == batches


@pytest.mark.parametrize("seconds, kept", [(1.5, False), (10.0, True)])
def test_a_short_time_to_measure_covers_all_batch_sizes(
    seconds: float, kept: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """All sizes are measured once before any is measured again."""
    monkeypatch.setattr(costs, "_cache_file", lambda *_: tmp_path / "costs")
    table = costs.measured_costs(_measured("cpu", 0.1), [AR, Plan(2, "all")], 64, seconds)
    assert {row["batch"] for row in table.to_json()} == {1, 2, 4, 8, 16, 32, 64}
    assert (tmp_path / "costs").exists() == kept


def _measured(device: str, seconds: float) -> Any:
    """A runner on whose clock each measurement takes so long; a step takes a millisecond."""
    now = [0.0]

    def measure(plan: Plan, batch: int) -> float:
        now[0] += seconds
        return 1e-3

    model = SimpleNamespace(device=torch.device(device))
    return SimpleNamespace(idlm=model, measure=measure, clock=lambda: now[0])

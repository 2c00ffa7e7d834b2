"""The cost of a step on a GPU, by plan, batch and kernel, against the time to read its weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu_smoke import Figure
from benchmarks.shapes import random_model
from idlm import LLM, SamplingParams
from idlm.decoding.plan import AR, Plan
from idlm.decoding.settings import Features
from idlm.engine.prefill import Chunk, PrefillBatch
from idlm.engine.step import Kind
from idlm.models.idlm_model import Idlm

ACCEPTANCE = (0.9, 0.88, 0.86)
BATCHES = (1, 8, 64)
PLANS = (AR, Plan(2, "all"), Plan(4, "chain"), Plan(4, "all"), Plan(8, "all"))
WINDOW = Plan(4, "all")
"""The plan whose kernels are profiled."""
PREFIX, ROOM = 1024, 320
"""Tokens in the cache of each request, and tokens that it may add while its steps are timed."""
QUEUED, READ = 16, 8
"""Steps launched in a row, for the device's time; steps read one by one, for the whole time."""
TOP = 15
ROWS = (1, 4, 16, 64, 256, 1024)
CHUNKS = {"1 x 512": (1, 512), "1 x 2000": (1, 2000), "16 x 128": (16, 128)}
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
"""Runtime calls in which the host waits; `cudaMemcpyAsync` has another name in the trace."""


def costs(shape: str = "8B", kv_memory: str = "13GiB") -> Iterator[Figure]:
    """The figures of Qwen3-8B's shape in bfloat16 with random weights.

    The profiler comes last: after its first use launches take longer.
    """
    idlm = random_model(shape, torch.bfloat16, "cuda")
    bandwidth = copy_bandwidth()
    yield (
        "bandwidth",
        lambda: {"copy_bytes_per_second": bandwidth, "parameters": idlm.model.num_parameters()},
    )
    ar = step_model(idlm, AR, kv_memory)
    yield "AR", partial(step_costs, ar, (AR,), bandwidth)
    yield "prefill", partial(prefill_costs, ar)
    llm = step_model(idlm, PLANS[-1], kv_memory)
    yield "windows", partial(step_costs, llm, PLANS[1:], bandwidth)
    yield "linears", partial(linear_costs, idlm)
    yield "AR kernels", partial(kernels, ar, AR, 1)
    yield "prefill kernels", partial(prefill_kernels, ar)
    yield "window kernels", partial(kernels, llm, WINDOW, 1)
    yield "window kernels at 64", partial(kernels, llm, WINDOW, 64)
    yield "host waits", partial(host_waits, llm)


def step_model(idlm: Idlm, widest: Plan, kv_memory: str) -> LLM:
    """An LLM for steps up to `widest` and for the largest batch."""
    simulated = ACCEPTANCE if widest.drafts else None
    return LLM(
        idlm,
        stride=widest.stride,
        branches="all",
        max_num_seqs=64,
        kv_memory=kv_memory,
        simulate_acceptance=simulated,
    )


def copy_bandwidth(size: int = 2**31, repeats: int = 20) -> float:
    """Bytes per second of a device copy, those read plus those written."""
    source = torch.empty(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * size / median(seconds(lambda: target.copy_(source), 1) for _ in range(repeats))


def seconds(work: Callable[[], object], times: int) -> float:
    """The device's time for one `work`, measured over several in a row."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(times):
        work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / times


def weight_bytes(idlm: Idlm) -> int:
    """Bytes of weights that a step of one row reads: all but the embedding, unless it is also the
    head."""
    table: torch.Tensor = idlm.model.get_input_embeddings().weight  # type: ignore[assignment]
    head: torch.Tensor = idlm.model.get_output_embeddings().weight  # type: ignore[no-untyped-call]
    parameters = {parameter.data_ptr(): parameter for parameter in idlm.model.parameters()}
    total = sum(parameter.numel() * parameter.itemsize for parameter in parameters.values())
    return total if table.data_ptr() == head.data_ptr() else total - table.numel() * table.itemsize


def cache_bytes(llm: LLM, batch: int) -> int:
    """Bytes of keys and values that a step of `batch` requests reads."""
    pages = llm.engine.runner.core.cache.pages
    row = sum(layer[:, 0, 0].numel() * layer.itemsize for layer in pages)
    return batch * PREFIX * row


@torch.inference_mode()
def seat(llm: LLM, batch: int) -> list[int]:
    """Greedy requests of PREFIX tokens in the slots 0 .. batch - 1, each with its own pages."""
    runner = llm.engine.runner
    each = runner.core.cache.columns(PREFIX + ROOM)
    for slot in range(batch):
        pages = range(1 + slot * each, 1 + (slot + 1) * each)
        runner.seat(
            slot, [5] * PREFIX, (), SamplingParams(temperature=0), slot, 10**6, (), 0, True, pages
        )
    return list(range(batch))


@torch.inference_mode()
def step_cost(llm: LLM, plan: Plan, batch: int) -> dict[str, object]:
    """Milliseconds of a step: the device's, until it is read, of the launch; and of the first
    steps."""
    runner, kind, slots = llm.engine.runner, Kind(plan, Features()), seat(llm, batch)
    step = partial(runner.step, kind, slots, PREFIX + ROOM)
    started = perf_counter()
    step().read()
    eager, started = perf_counter() - started, perf_counter()
    step().read()
    captured = perf_counter() - started
    device = seconds(step, QUEUED)
    waited, launched = [], []
    for _ in range(READ):
        started = perf_counter()
        pending = step()
        launched.append(perf_counter() - started)
        pending.read()
        waited.append(perf_counter() - started)
    times = {
        "device": device,
        "read": median(waited),
        "launch": median(launched),
        "eager": eager,
        "capture": captured,
    }
    free, total = torch.cuda.mem_get_info()
    return {name: round(1e3 * value, 3) for name, value in times.items()} | {
        "used_gib": (total - free) / 2**30
    }


def step_costs(llm: LLM, plans: Sequence[Plan], bandwidth: float) -> dict[str, object]:
    """Steps of each plan and batch size, against the time to read the weights and the cache."""
    each, pages = (
        llm.engine.runner.core.cache.columns(PREFIX + ROOM),
        llm.engine.scheduler.pool.total,
    )
    batches = [batch for batch in BATCHES if batch * each <= pages]
    report: dict[str, Any] = {
        plan.name: {batch: step_cost(llm, plan, batch) for batch in batches} for plan in plans
    }
    least = {
        batch: (weight_bytes(llm.idlm) + cache_bytes(llm, batch)) / bandwidth for batch in batches
    }
    report["least_ms"] = {batch: 1e3 * value for batch, value in least.items()}
    if AR in plans:
        over = report["ar"][1]["device"] / report["least_ms"][1]
        report["bounds"] = {"AR step at 1 within 1.25 of bytes / bandwidth": [over, over <= 1.25]}
    return report


@torch.inference_mode()
def kernels(llm: LLM, plan: Plan, batch: int, steps: int = 4) -> dict[str, object]:
    runner, kind, slots = llm.engine.runner, Kind(plan, Features()), seat(llm, batch)
    step = partial(runner.step, kind, slots, PREFIX + ROOM)
    for _ in range(3):  # the first ones are recorded
        step().read()
    return profiled(lambda: step().read(), steps)


def profiled(work: Callable[[], object], times: int) -> dict[str, object]:
    """Launches and microseconds of kernels in one `work`, and the kernels that take longest."""
    seconds, counts = Counter[str](), Counter[str]()
    with profiler() as profile:
        for _ in range(times):
            work()
        torch.cuda.synchronize()
    for event in profile.events() or []:
        if event.device_type.name == "CUDA":
            seconds[event.name] += event.time_range.elapsed_us()
            counts[event.name] += 1
    top = [
        [short(name), counts[name] / times, round(value / times, 1)]
        for name, value in seconds.most_common(TOP)
    ]
    return {"launches": counts.total() / times, "us": seconds.total() / times, "top": top}


def profiler() -> torch.profiler.profile:
    """A profiler of host and device."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    return torch.profiler.profile(activities=activities)


def short(name: str) -> str:
    """A kernel's name without PyTorch's template arguments."""
    for noise in ("void ", "at::native::", "(anonymous namespace)::", "c10::", "cutlass::"):
        name = name.replace(noise, "")
    return name[:80]


@torch.inference_mode()
def prefill_costs(llm: LLM) -> dict[str, object]:
    """Milliseconds of a prefill's forward: the device's, and the host's for its launch."""
    times = {}
    for name, (pieces, length) in CHUNKS.items():
        prefill = make_prefill(llm, pieces, length)
        prefill()
        torch.cuda.synchronize()
        started = perf_counter()
        prefill()
        launch = perf_counter() - started
        torch.cuda.synchronize()
        device = seconds(prefill, 3)
        times[name] = {"device": round(1e3 * device, 2), "launch": round(1e3 * launch, 2)}
    return {"ms": times}


def make_prefill(llm: LLM, pieces: int, length: int) -> Callable[[], object]:
    """A function that prefills new prompts of at most PREFIX + ROOM tokens each."""
    runner = llm.engine.runner
    seat(llm, pieces)
    chunks = [Chunk(slot, [7] * min(length, PREFIX + ROOM), 0) for slot in range(pieces)]
    return partial(
        runner.core.prefill, PrefillBatch.of(chunks, runner.core.cache.page_size, runner._on_device)
    )


@torch.inference_mode()
def prefill_kernels(llm: LLM) -> dict[str, object]:
    """As `profiled`, for a prefill of many short prompts."""
    return profiled(make_prefill(llm, *CHUNKS["16 x 128"]), 1)


@torch.inference_mode()
def linear_costs(idlm: Idlm) -> dict[str, object]:
    """Milliseconds of all linear layers and the head alone, by rows."""
    weights, times = idlm.linear_weights(), {}
    for rows in ROWS:
        inputs = {
            width: torch.randn(rows, width, dtype=idlm.dtype, device="cuda")
            for width in {w.shape[1] for w in weights}
        }
        products = partial(_products, weights, inputs)
        products()
        times[rows] = round(1e3 * seconds(products, 3), 3)
    return {"ms": times}


def _products(weights: Sequence[torch.Tensor], inputs: dict[int, torch.Tensor]) -> None:
    for weight in weights:
        F.linear(inputs[weight.shape[1]], weight)


def host_waits(llm: LLM, steps: int = 15) -> dict[str, object]:
    """Calls in which the host waits while the engine admits and launches, from the profiler's
    trace.

    Seven requests decode and one more comes; there should be no such call. No graph is recorded
    meanwhile.
    """
    engine = llm.engine
    params = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
    for seed in range(7):
        engine.add([9 + seed] * 260, params, seed)
    for _ in range(6):
        engine.step()
    engine.add([99] * 260, params, 9)
    launch, admit = engine._launch, engine._admit
    engine._launch, engine._admit = _marked("launch", launch), _marked("admit", admit)  # type: ignore[method-assign]
    with profiler() as profile:
        for _ in range(steps):
            engine.step()
    engine._launch, engine._admit = launch, admit  # type: ignore[method-assign]
    for name in list(engine._requests):
        engine.abort(name)
    events = profile.events() or []
    waits = {label: _waits_within(events, f"idlm {label}") for label in ("launch", "admit")}
    count = sum(sum(counts.values()) for counts in waits.values())
    return {
        "steps": steps,
        "waits": waits,
        "bounds": {"no host synchronisation": [count, not count]},
    }


def _marked(label: str, work: Callable[[], Any]) -> Callable[[], Any]:
    def marked() -> Any:
        with torch.profiler.record_function(f"idlm {label}"):
            return work()

    return marked


def _waits_within(events: Sequence[Any], label: str) -> dict[str, int]:
    """Waiting calls within the ranges of a label, by name."""
    ranges = [
        event.time_range
        for event in events
        if event.name == label and event.device_type.name == "CPU"
    ]
    waits = [
        event.name
        for event in events
        if event.name in WAITS
        and any(span.start <= event.time_range.start <= span.end for span in ranges)
    ]
    return dict(Counter(waits))

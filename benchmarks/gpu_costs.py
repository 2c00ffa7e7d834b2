"""What a step costs on a GPU: by plan and batch, against the time its weights take to read, kernel
by kernel."""

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
from idlm.config import EngineConfig
from idlm.decoding.plan import AR, Plan
from idlm.decoding.settings import Features
from idlm.engine.prefill import Chunk, PrefillBatch
from idlm.engine.step import StepKey
from idlm.evaluation.simulation import simulate_acceptance
from idlm.models.idlm_model import Idlm

ACCEPTANCE = (0.9, 0.88, 0.86)
BATCHES = (1, 8, 64)
PLANS = (AR, Plan(2, "all"), Plan(4, "chain"), Plan(4, "all"), Plan(8, "all"))
WINDOW = Plan(4, "all")
"""The plan whose kernels are looked at."""
PREFIX, ROOM = 1024, 320
"""Tokens in the cache of each request, and those it may grow by while its steps are timed."""
QUEUED, READ = 16, 8
"""Steps launched one after the other, for the device's time; and steps read one by one, for the
whole time."""
TOP = 15
ROWS = (1, 4, 16, 64, 256, 1024)
CHUNKS = {"1 x 512": (1, 512), "1 x 2000": (1, 2000), "16 x 128": (16, 128), "64 x 32": (64, 32)}
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
"""Runtime calls in which the host waits; the trace names `cudaMemcpyAsync` apart from `cudaMemcpy`.
"""


def costs(shape: str = "8B", kv_memory: str = "13GiB") -> Iterator[Figure]:
    """Qwen3-8B's shape in bfloat16 with random weights.

    The profiler comes last: once it has run, launches take longer.
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
    """A model for steps up to `widest`, and for the largest batch."""
    config = EngineConfig(widest.stride, "all", max_num_seqs=64, kv_memory=kv_memory)
    llm = LLM(idlm, config=config)
    if widest.drafts:
        simulate_acceptance(llm.engine, ACCEPTANCE)
    return llm


def copy_bandwidth(size: int = 2**31, repeats: int = 20) -> float:
    """Bytes per second that a device copy moves, those read and those written."""
    source = torch.empty(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * size / median(seconds(lambda: target.copy_(source), 1) for _ in range(repeats))


def seconds(work: Callable[[], object], times: int) -> float:
    """The device's time for one `work`, of several launched one after the other."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(times):
        work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / times


def weight_bytes(idlm: Idlm) -> int:
    """Bytes of weights that a step of one row reads: all but the embedding, unless that is the head
    as well."""
    table: torch.Tensor = idlm.model.get_input_embeddings().weight  # type: ignore[assignment]
    head: torch.Tensor = idlm.model.get_output_embeddings().weight  # type: ignore[no-untyped-call]
    parameters = {parameter.data_ptr(): parameter for parameter in idlm.model.parameters()}
    total = sum(parameter.numel() * parameter.itemsize for parameter in parameters.values())
    return total if table.data_ptr() == head.data_ptr() else total - table.numel() * table.itemsize


def cache_bytes(llm: LLM, batch: int) -> int:
    """Bytes of keys and values that a step of `batch` requests reads."""
    pages = llm.engine.runner.model_step.cache.pages
    row = sum(layer[:, 0, 0].numel() * layer.itemsize for layer in pages)
    return batch * PREFIX * row


@torch.inference_mode()
def seat(llm: LLM, batch: int) -> list[int]:
    """Greedy requests of PREFIX tokens in the slots 0 .. batch - 1, each with pages of its own."""
    runner = llm.engine.runner
    each = runner.model_step.cache.columns(PREFIX + ROOM)
    for slot in range(batch):
        pages = range(1 + slot * each, 1 + (slot + 1) * each)
        params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
        request = llm.engine.admission.request([5] * PREFIX, params, seed=slot)
        request.slot, request.pages, request.limit = slot, list(pages), 10**6
        runner.seat(request)
    return list(range(batch))


@torch.inference_mode()
def step_cost(llm: LLM, plan: Plan, batch: int) -> dict[str, object]:
    """Milliseconds of a step: the device's, those until it is read, those of the launch; the first
    ones' until read."""
    runner, kind, slots = llm.engine.runner, StepKey(plan, Features()), seat(llm, batch)
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
        one = step()
        launched.append(perf_counter() - started)
        one.read()
        waited.append(perf_counter() - started)
    found = {
        "device": device,
        "read": median(waited),
        "launch": median(launched),
        "eager": eager,
        "capture": captured,
    }
    free, total = torch.cuda.mem_get_info()
    return {name: round(1e3 * value, 3) for name, value in found.items()} | {
        "used_gib": (total - free) / 2**30
    }


def step_costs(llm: LLM, plans: Sequence[Plan], bandwidth: float) -> dict[str, object]:
    """Steps of each plan and batch size, and AR's against the time its weights and its cache take
    to read."""
    each, pages = (
        llm.engine.runner.model_step.cache.columns(PREFIX + ROOM),
        llm.engine.scheduler.pool.total,
    )
    batches = [batch for batch in BATCHES if batch * each <= pages]
    found: dict[str, Any] = {
        plan.name: {batch: step_cost(llm, plan, batch) for batch in batches} for plan in plans
    }
    least = {
        batch: (weight_bytes(llm.idlm) + cache_bytes(llm, batch)) / bandwidth for batch in batches
    }
    found["least_ms"] = {batch: 1e3 * value for batch, value in least.items()}
    if AR in plans:
        over = found["ar"][1]["device"] / found["least_ms"][1]
        found["bounds"] = {"AR step at 1 within 1.25 of bytes / bandwidth": [over, over <= 1.25]}
    return found


@torch.inference_mode()
def kernels(llm: LLM, plan: Plan, batch: int, steps: int = 4) -> dict[str, object]:
    """The kernels of `steps` steps of `batch` requests, by time; see `profiled`."""
    runner, kind, slots = llm.engine.runner, StepKey(plan, Features()), seat(llm, batch)
    step = partial(runner.step, kind, slots, PREFIX + ROOM)
    for _ in range(3):  # the first ones are recorded
        step().read()
    return profiled(lambda: step().read(), steps)


def profiled(work: Callable[[], object], times: int) -> dict[str, object]:
    """Launches and microseconds of kernels in each `work`, and the kernels that take longest."""
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
    """A kernel's name without what PyTorch's templates put around it."""
    for noise in ("void ", "at::native::", "(anonymous namespace)::", "c10::", "cutlass::"):
        name = name.replace(noise, "")
    return name[:80]


@torch.inference_mode()
def prefill_costs(llm: LLM) -> dict[str, object]:
    """Milliseconds of a prefill's forward: the device's, and the host's for launching it."""
    found = {}
    for name, (pieces, length) in CHUNKS.items():
        prefill = a_prefill(llm, pieces, length)
        prefill()
        torch.cuda.synchronize()
        started = perf_counter()
        prefill()
        launch = perf_counter() - started
        torch.cuda.synchronize()
        device = seconds(prefill, 3)
        found[name] = {"device": round(1e3 * device, 2), "launch": round(1e3 * launch, 2)}
    return {"ms": found}


def a_prefill(llm: LLM, pieces: int, length: int) -> Callable[[], object]:
    """Prefills pieces of new prompts, of at most PREFIX + ROOM tokens each."""
    runner = llm.engine.runner
    seat(llm, pieces)
    chunks = [Chunk(slot, [7] * min(length, PREFIX + ROOM), 0) for slot in range(pieces)]
    return partial(
        runner.model_step.prefill,
        PrefillBatch.of(chunks, runner.model_step.cache.page_size, runner._on_device),
    )


@torch.inference_mode()
def prefill_kernels(llm: LLM) -> dict[str, object]:
    """See `profiled`, of a prefill of many short pieces."""
    return profiled(a_prefill(llm, *CHUNKS["16 x 128"]), 1)


@torch.inference_mode()
def linear_costs(idlm: Idlm) -> dict[str, object]:
    """Milliseconds of all linear layers and the head on so many rows, and nothing else."""
    weights, found = [weight for group in idlm.linear_groups() for weight in group], {}
    for rows in ROWS:
        inputs = {
            width: torch.randn(rows, width, dtype=idlm.dtype, device="cuda")
            for width in {w.shape[1] for w in weights}
        }
        products = partial(_products, weights, inputs)
        products()
        found[rows] = round(1e3 * seconds(products, 3), 3)
    return {"ms": found}


def _products(weights: Sequence[torch.Tensor], inputs: dict[int, torch.Tensor]) -> None:
    for weight in weights:
        F.linear(inputs[weight.shape[1]], weight)


def host_waits(llm: LLM, steps: int = 15) -> dict[str, object]:
    """Runtime calls in which the host waits while the engine admits and launches, from the
    profiler's trace.

    Seven requests decode and one more comes; none of the calls is wanted. No graph is recorded
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
    found = {label: _waits_within(events, f"idlm {label}") for label in ("launch", "admit")}
    number = sum(sum(counts.values()) for counts in found.values())
    return {
        "steps": steps,
        "waits": found,
        "bounds": {"no host synchronisation": [number, not number]},
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
        and any(one.start <= event.time_range.start <= one.end for one in ranges)
    ]
    return dict(Counter(waits))

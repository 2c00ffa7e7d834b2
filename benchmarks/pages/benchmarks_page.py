"""docs/benchmarks.md: the results in benchmarks/results, each with its command and machine."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.pages import tables

RESULTS = Path(__file__).parents[1] / "results"
HEAD = """# Benchmarks

This page is made from [benchmarks/results](../benchmarks/results) by `make pages`. Do not edit it.

Each section names its file, the command that writes it, and what the file records of the machine. Where a file does
not record something, the page says so. **Earlier engine** marks a file that was written before the kernels of entry 24
of the [log](LOG.md); its absolute speeds no longer hold. Ratios are medians over rounds in which every engine takes its
turn, with the range over rounds in brackets. [glossary.md](glossary.md) explains TPF, acceptance and the plans. All
models here are small: `nano` is the bundled model with 2.5 M parameters. Do not read its figures as a promise for
another model.
"""
DROPPED = {
    "decode.json": "the decoder of one sequence that the engine replaced",
    "families.json": "it has [a page of its own](families.md)",
}
"""Files that the page does not show, and why."""
NOT_RECORDED = "not recorded"


@dataclass(frozen=True)
class Section:
    """A result and how it is shown.

    Attributes:
        command: that writes the file; used if the file does not record its own.
        about: what is measured, in a sentence or two.
        table: makes the tables from the content of the file.
    """

    title: str
    file: str
    command: str
    about: str
    table: tables.Table


SAME_BYTES = (
    "A pair is one prompt under one setting (greedy or seeded, with and without every filter and penalty). It is equal "
    "if every plan gives the tokens of AR."
)
SECTIONS = {
    "Same bytes": (
        Section("Random models, float64", "same_bytes_random.json",
                "python -m benchmarks.same_bytes random-llama random-mistral random-qwen2 random-qwen3 "
                "--prompts 24 --max-tokens 10", SAME_BYTES, tables.same_bytes),
        Section("Sliding windows shorter than a draft, float64", "same_bytes_windows.json",
                "python -m benchmarks.same_bytes sliding-mistral-3 sliding-gemma2-5 --prompts 6 --max-tokens 24",
                SAME_BYTES, tables.same_bytes),
        Section("Mixtures of experts, float64", "same_bytes_experts.json",
                "python -m benchmarks.same_bytes sliding-gpt_oss-4 random-qwen3_moe --prompts 4 --max-tokens 16",
                SAME_BYTES, tables.same_bytes),
        Section("nano, float64", "same_bytes_nano.json",
                "python -m benchmarks.same_bytes nano --prompts 2 --max-tokens 20",
                SAME_BYTES + " After the model's name: the build of the C kernels; 0 is without them. The builds come "
                "from two runs.", tables.same_bytes),
        Section("nano-full, float64", "same_bytes_full.json",
                "python -m benchmarks.same_bytes nano-full --prompts 2 --max-tokens 20", SAME_BYTES,
                tables.same_bytes),
        Section("stories260K with a gated LoRA, float64", "same_bytes_stories.json",
                "python -m benchmarks.same_bytes STORIES+ADAPTER --prompts 4 --max-tokens 20", SAME_BYTES,
                tables.same_bytes),
        Section("nano, float32", "same_bytes_nano_float32.json",
                "python -m benchmarks.same_bytes nano --dtype float32 --prompts 3 --max-tokens 20", SAME_BYTES,
                tables.same_bytes),
        Section("SmolLM2-135M-Instruct with int8 weights", "drafted_bytes_int8.json",
                "python -m benchmarks.drafted_bytes --prompts FILE",
                "Nobody has trained this model to draft, so the benchmark writes the drafts itself: the next tokens "
                "of AR, most of them right. Greedy; a prompt is equal if the plan gives the tokens of AR.",
                tables.drafted_bytes),
        Section("Over HTTP", "server_bytes.json", "make server-bytes",
                "Greedy and seeded requests, streamed and not, at several requests at once, with a cold and a warm "
                "prefix cache. The same bytes are those of `LLM.generate`, whose own are those of AR.",
                tables.server_bytes),
        Section("Exactness and its price", "exactness.json", "python -m benchmarks.exactness",
                "The rules that verify drafts. First a random model with 4 tokens to write: the total variation between "
                "AR's law of three tokens and that of stride 3, enumerated, and counted in the engine's samples beside "
                "as many samples of AR. Then nano at stride 4, all outcomes: the distance of the token's law at a draft "
                "from AR's, with its standard error over texts. The expected TPF follows from the acceptance by depth.",
                tables.exactness),
        Section("Structured output", "structured.json", "python -m benchmarks.structured",
                "Random JSON schemas of growing size. Every output that ended was validated.", tables.structured),
    ),
    "Tokens per forward": (
        Section("2,000 held-out problems", "nano_2000.json", "python -m idlm.nano.evaluate --problems 2000",
                "Greedy. The tokens are compared with those of transformers' own `generate` on the same weights. "
                "TPF counts the forward that brings the first token.", tables.problems),
        Section("All outcomes against the chain", "outcomes.json", "python -m benchmarks.outcomes",
                "The first and the last forward of a request are left out. The formula is that of "
                "`idlm/decoding/plan.py` at the acceptance measured.", tables.outcomes),
        Section("The same with an adapter of 300 steps", "outcomes_300_steps.json",
                "python -m benchmarks.outcomes --model nano-base --adapter runs/nano-300/final",
                "Entry 23 of the log trains this adapter.", tables.outcomes),
    ),
    "Evaluation": (
        Section("Graders", "graders.json", "python -m benchmarks.graders --data DIR",
                "Known answers through each grader of `idlm eval`: right ones, and the same perturbed. The last column "
                "names items that did not count as they should: their last line is not needed. Then programs that must not "
                "count, in the sandbox.",
                tables.graders),
    ),
    "GPU": (
        Section("Qwen3-8B's shape and nano on a GPU", "gpu.json", "make gpu-check",
                "The 8B shape has random weights in bf16; its acceptance is SIMULATED (0.9, 0.88, 0.86). nano drafts "
                "with its own adapter.", tables.gpu),
    ),
    "Speed": (
        Section("Under load, against vLLM", "serving_avx2.json",
                'IDLM_NATIVE=avx2 make bench ARGS="--stride 8 --modes ar planner --peers vllm --concurrency 1 8 32 64 '
                '--requests 48"',
                "The kernels of idlm are forced to their AVX2 build; vLLM uses what it finds. All engines get the same "
                "greedy requests, and their tokens are equal.", tables.serving),
        Section("Under load, against vLLM and transformers", "serving.json",
                'make bench ARGS="--stride 8 --modes ar planner --requests 48"',
                "The kernels of idlm in their AVX-512 build. All engines get the same greedy requests, and their "
                "tokens are equal.", tables.serving),
        Section("Under load, plans against each other", "serving_stride8.json",
                'make bench ARGS="--stride 8 --modes ar planner chain all --peers --concurrency 1 8 32 64 '
                '--requests 64 --repeats 7"',
                "idlm alone, in its AVX-512 build.", tables.serving),
        Section("A real model: SmolLM2-135M-Instruct", "real_model.json", "make models peers; make real-model",
                "64 greedy tokens for each chat prompt, AR on every engine. llama.cpp is compiled for the machine. "
                "The model was not trained to draft, so the second table counts rows and not accepted drafts.",
                tables.real_model),
        Section("A converted model: SmolLM2-135M-Instruct", "converted.json",
                "python -m benchmarks.converted build/models/SmolLM2-135M-Instruct adapters/smollm2-135m --prompts ...",
                "The adapter of this repository ([card](../adapters/smollm2-135m/README.md)) on held-out prompts, stride "
                "4, float32, greedy, one thread; CPU times. The speed-up's range is over runs. Where tokens differ, two "
                "were closer than rounding; the file has the gaps.", tables.converted),
        Section("Lookup drafts", "lookup.json", "python -m benchmarks.lookup --data DATA",
                "SmolLM2-135M-Instruct, which was not trained to draft. Edits of code and summaries repeat what the "
                "prompt says, chat hardly does. Greedy; CPU times. The speed-up's range is over runs.", tables.lookup),
        Section("What a wider step costs", "cost_curve.json", "make cost-curve",
                "Random models of 0.1 and 0.6 billion parameters, since the cost does not depend on what the weights "
                "say. The speed-up is what is expected at the acceptance named.", tables.cost_curve),
        Section("Matrix products, AVX-512", "kernels_avx512_vnni.json",
                "python -m benchmarks.kernels --rounds 4 --packed-limit 200000000",
                "What an engine chooses, against PyTorch. Shares are of the machine's own peaks, measured in the same "
                "run.", tables.kernels),
        Section("Matrix products, AVX2", "kernels_avx2.json",
                "IDLM_NATIVE=avx2 python -m benchmarks.kernels --rounds 4 --packed-limit 200000000",
                "As above, forced to AVX2.", tables.kernels),
    ),
    "Server": (
        Section("Speed over HTTP", "server_speed.json",
                'make server-speed ARGS="--vllm build/vllm/bin/python"',
                "A closed loop of greedy requests; stride up to 4. Two later runs of three rounds, after a fault in "
                "the prefill budget was fixed, gave 0.89 and 0.99 of the engine alone at 8 and 32 requests (entry 23 "
                "of the log).", tables.server_speed),
        Section("Clients", "clients.json", "make clients",
                "What clients of the APIs do with a small chat model, each with pinned versions. What is refused is a "
                "400 or 404 with a sentence that says what to use; the file has it.", tables.clients),
        Section("Faults", "server_faults.json", "make server-faults",
                "Four times the load that the server can take; clients that leave at random points; kill -9 of the "
                "engine; SIGTERM.", tables.server_faults),
        Section("Fuzzing", "server_fuzz.json", "make server-fuzz",
                "schemathesis over the OpenAPI document. The failure found was a field that took 0 for false; it is "
                "fixed and tested since.", tables.server_fuzz),
        Section("A long prompt beside running requests", "worst_gap.json", "python -m benchmarks.worst_gap",
                "The longest wait of the running requests while a prompt of context length is admitted, in median "
                "steps.", tables.worst_gap),
        Section("A long run", "soak.json", "python -m benchmarks.soak",
                "Random requests and aborts, and a page pool too small for all.", tables.soak),
    ),
    "Training": (
        Section("Ablation, 300 steps", "ablation_300.json", "python -m benchmarks.ablation --steps 300 --only ...",
                "Variants of one recipe, with the same steps and batches; decoding with all outcomes.",
                tables.ablation),
        Section("Ablation, 60 steps", "ablation.json",
                "python -m benchmarks.ablation --steps 60 --problems 10", "A smaller budget.", tables.ablation),
        Section("Memory of the loss", "loss_memory.json", "python -m benchmarks.loss_memory --limit 0.1",
                "The peak of CE + KL + TV with the weights of D-PACE, forward and backward, over 2,048 MASK rows. With "
                "all weights trained, it has the gradient of the head.", tables.loss_memory),
        Section("Packing", "packing.json", "python -m benchmarks.packing MODEL TEXTS --cut 6",
                "Training on gsm8k's texts, forward and backward, one thread: random batches padded to their longest, "
                "batches sorted by length in windows as without `packing`, and packed rows. A sixth of SmolLM2-135M.",
                tables.packing),
        Section("A step, against transformers' Trainer with PEFT", "training_step.json",
                "python -m benchmarks.training_step MODEL TEXTS",
                "SmolLM2-135M-Instruct, the same texts: a conversion by a gated LoRA, and plain fine-tuning by PEFT's "
                "LoRA on the same layers. Memory is what a step takes beside the weights.", tables.training_step),
        Section("Distillation, against transformers' generate", "distill_speed.json",
                "python -m benchmarks.distill_speed MODEL QUESTIONS",
                "SmolLM2-135M-Instruct answers questions of gsm8k. Tokens of responses that ended, a second; the other "
                "engine decodes static batches of 32.", tables.distill_speed),
    ),
}  # fmt: skip
"""By heading."""


def render(results: Path = RESULTS) -> str:
    return "\n".join([HEAD, *_body(results)])


def _body(results: Path) -> Iterator[str]:
    for heading, sections in SECTIONS.items():
        yield f"## {heading}\n"
        for section in sections:
            yield from _section(section, json.loads((results / section.file).read_text()))
    yield "## Not shown\n"
    yield from (f"* `{file}`: {why}." for file, why in sorted(DROPPED.items()))
    yield ""


def _section(section: Section, report: Mapping[str, Any]) -> Iterator[str]:
    yield f"### {section.title}\n"
    yield section.about + "\n"
    yield from section.table(report)
    yield ""
    yield _source(section, report)


def is_earlier(report: Mapping[str, Any]) -> bool:
    """Whether a file is older than the kernels of entry 24 of the log.

    Newer files record the processor's instructions.
    """
    return "instructions" not in report | report.get("environment", {})


def _source(section: Section, report: Mapping[str, Any]) -> str:
    """Where the figures come from: file, command, machine, versions, date."""
    recorded = report | report.get("environment", {})
    age = "**Earlier engine.** " if is_earlier(report) else ""
    command = recorded.get("command", section.command)
    cpu, cores = recorded.get("cpu", NOT_RECORDED), recorded.get("cores")
    machine = f"{cpu}, {cores} cores" if cores else f"{cpu}"
    threads = recorded.get("threads", NOT_RECORDED)
    versions = ", ".join(
        f"{name} {recorded.get(name, NOT_RECORDED)}" for name in ("idlm", "torch", "transformers")
    )
    return (
        f"{age}[{section.file}](../benchmarks/results/{section.file}): `{command}`. Machine: {machine}; threads: "
        f"{threads}. Versions: {versions}. Date: {recorded.get('date', NOT_RECORDED)}.\n"
    )

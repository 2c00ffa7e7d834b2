"""IFEval, and MT-Bench, whose prompts time a model."""

from __future__ import annotations

from idlm.evaluation.suites.suite import Harness, Suite

INSTRUCTIONS = (
    Suite(
        "ifeval",
        "IFEval",
        "google/IFEval",
        "ifeval",
        {"train": ("*input_data*", "*train*", "*.jsonl")},
        Harness("ifeval", "ifeval", "prompt_level_strict_acc,none"),
    ),
    Suite(
        "mt-bench",
        "MT-Bench",
        "https://github.com/lm-sys/FastChat (llm_judge/data/mt_bench)",
        "mt_bench",
        {"test": ("question*", "*")},
        speed=True,
    ),
)

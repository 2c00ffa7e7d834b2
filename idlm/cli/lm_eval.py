"""`idlm lm-eval ...`: the command line of lm-evaluation-harness, with our engine as a model."""

from __future__ import annotations

import sys

import typer

from idlm.extras import need

CONTEXT = {
    "ignore_unknown_options": True,
    "allow_extra_args": True,
    "help_option_names": [],
}


def lm_eval(context: typer.Context) -> None:
    """The command line of lm-evaluation-harness; --model idlm is this engine.

    For example: idlm lm-eval run --model idlm --model_args pretrained=nano --tasks gsm8k. The
    arguments of the model are pretrained, adapter, dtype, think_end_token and the engine's options,
    such as stride and branches.
    """
    need("eval", "idlm lm-eval")
    import lm_eval.models  # noqa: F401  # its own models, which it adds only where there are none
    from lm_eval.__main__ import cli_evaluate

    import idlm.evaluation.engine_model  # noqa: F401  # registers itself

    sys.argv = ["idlm lm-eval", *context.args, *_device(context.args)]
    cli_evaluate()


def _device(words: list[str]) -> list[str]:
    """--device cpu for a run that names no device, where there is no GPU: the harness's default is
    cuda:0."""
    import torch

    runs = bool(words) and (words[0] == "run" or words[0].startswith("-"))
    named = any(word.split("=")[0] in ("--device", "--config", "-C") for word in words)
    return [] if not runs or named or torch.cuda.is_available() else ["--device", "cpu"]

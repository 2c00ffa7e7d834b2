"""transformers' own `generate`: static greedy batches of `concurrency` requests, float32,
left-padded.

    python benchmarks/peers/transformers_generate.py --model FOLDER [--threads 1] < workload.jsonl

A batch runs until its longest request is done, as `generate` does; only the tokens of a request
count. See protocol.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import protocol

if TYPE_CHECKING:
    from torch import Tensor


class Steps:
    """A streamer that gives each row's token to its clock; `generate` calls it with the prompts
    first."""

    def __init__(self, clocks: list[protocol.Clock]) -> None:
        self.clocks = clocks
        self.prompts = True

    def put(self, tokens: Tensor) -> None:
        """Add the tokens of one step, [B]."""
        if not self.prompts:
            for clock, token in zip(self.clocks, tokens.tolist(), strict=True):
                clock.extend([token])
        self.prompts = False

    def end(self) -> None:
        """Called by `generate`; there is nothing to do."""


def load(folder: str, threads: int) -> protocol.Run:
    """Load the model; returns its `Run`."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # every request runs to its limit

    def batch(requests: list[protocol.Request]) -> list[protocol.Clock]:
        clocks = [protocol.Clock(request["max_tokens"]) for request in requests]
        longest = max(len(request["prompt_token_ids"]) for request in requests)
        padding = [longest - len(request["prompt_token_ids"]) for request in requests]
        ids = [
            [0] * pad + request["prompt_token_ids"]
            for pad, request in zip(padding, requests, strict=True)
        ]
        seen = [[0] * pad + [1] * (longest - pad) for pad in padding]
        model.generate(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(seen),
            max_new_tokens=max(clock.limit for clock in clocks),
            do_sample=False,
            pad_token_id=0,
            streamer=Steps(clocks),
        )
        return clocks

    def run(requests: list[protocol.Request], concurrency: int) -> list[protocol.Clock]:
        groups = (
            requests[start : start + concurrency] for start in range(0, len(requests), concurrency)
        )
        return [clock for group in groups for clock in batch(group)]

    return run


if __name__ == "__main__":
    options = protocol.parse(__doc__, "static")
    versions = protocol.installed("transformers", "torch")
    protocol.serve(
        "transformers",
        options.mode,
        versions,
        lambda: protocol.Engine(load(options.model, options.threads)),
    )

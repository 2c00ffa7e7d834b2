"""`EngineConfig`: all options of an engine with their defaults, checked in one place.

`LLM`, the server and its worker, the command line and the benches all use it, so that an option has
the same meaning and default everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from idlm.errors import InputError

CHOICES = {
    "drafts": ("auto", "masks", "lookup"),
    "weights": ("auto", "float32", "bfloat16", "int8"),
    "generation_config": ("auto", "none"),
    "logprobs_mode": ("processed_logprobs", "raw_logprobs"),
}
"""Options that are one of a few words."""
COUNTS = (
    *("max_num_seqs", "page_size", "prefill_tokens", "max_model_len"),
    "tensor_parallel_size",
)
MOST_THREADS = 1024
UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True)
class EngineConfig:
    """How an engine runs a model.

    Attributes:
        stride: N, the most tokens that one forward commits with drafts of MASK rows; 1 is plain AR.
        branches: "planner" chooses stride (up to `stride`) and branches at each step, by measured
            costs and running acceptance; it chooses AR if nothing is faster. "all" drafts for every
            outcome of the verification, "chain" only for full acceptance. A tuple of numbers of
            accepted drafts: drafts for these outcomes. "lookup": N - 1 lookup drafts in every step.
        drafts: where drafts come from. "masks": from MASK rows. "lookup": from the request's own
            text, prompt and output: what followed the last occurrence of its end, up to 8 tokens.
            It needs no training and helps where the output repeats the text. "auto": from MASK
            rows if the model has any, and from a longer match in the text in their place; with a
            single plan of MASK rows, from these alone. The planner decides at each step whether
            drafts are worth their time.
        max_num_seqs: the most running requests; others wait.
        kv_memory: the size of the KV cache: bytes, or a string such as "512MiB". None: twice the
            need of `max_num_seqs` requests of full length, so that as many pages can stay cached;
            at most a share of the free memory.
        page_size: the tokens of a page of the KV cache.
        prefill_tokens: prompt tokens that a step may prefill beside decoding requests. None: on a
            CPU, as many as take about as long as a decode step; on a GPU, 512. More if most
            requests prefill.
        deterministic: use batch-invariant kernels: a token's logits do not depend on the other
            rows of the step, also in float32 and bfloat16. Slower.
        weights: on a CPU, the format of the linear layers' weights: "float32", "bfloat16" (half the
            bytes to read) or "int8" (a quarter; a quantised model, whose AR and ISD outputs are
            equal). "auto": the format of the checkpoint.
        logprobs_mode: which log-probabilities requests get: "processed_logprobs", those of the law
            that tokens are chosen by, after temperature, penalties, bias, bans, guide and filters;
            or "raw_logprobs", the model's own. vLLM's default is "raw_logprobs".
        threads: on a CPU, the engine's threads. None: measure 1, 2 and 4, up to the free cores.
        lookahead: steps launched before the results of a step are read. None: 1 on a GPU, which
            hides the host's work, and 0 on a CPU.
        record: whether decode steps are recorded and replayed without Python.
        max_model_len: the most tokens of a request, prompt and output together. None: the model's
            context. Some models (longrope) are exact up to a length only, and need it.
        tensor_parallel_size: the processes that hold a part of the model each, on a GPU of their
            own; `kv_memory` is then that of each. 1: the model is in one process.
        generation_config: "auto": the sampling settings of the checkpoint's generation_config.json
            are the defaults of a request. "none": those of `SamplingParams` are. Its end tokens
            count in both.

    Raises:
        InputError: a value is out of range; the message names it.
    """

    stride: int = 4
    branches: str | tuple[int, ...] = "planner"
    drafts: str = "auto"
    max_num_seqs: int = 64
    kv_memory: int | str | None = None
    page_size: int = 16
    prefill_tokens: int | None = None
    deterministic: bool = False
    weights: str = "auto"
    logprobs_mode: str = "processed_logprobs"
    threads: int | None = None
    lookahead: int | None = None
    record: bool = True
    max_model_len: int | None = None
    tensor_parallel_size: int = 1
    generation_config: str = "auto"

    def __post_init__(self) -> None:
        for name in COUNTS:
            _check_count(name, getattr(self, name))
        threads = self.threads
        if threads is not None and (type(threads) is not int or not 1 <= threads <= MOST_THREADS):
            raise InputError(
                f"threads={threads!r} is no number of threads; use 1 to {MOST_THREADS}"
            )
        if self.lookahead not in (None, 0, 1):
            raise InputError(f"lookahead={self.lookahead!r} is unknown; use 0 or 1")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise InputError(
                    f"{name}={getattr(self, name)!r} is unknown; use {', '.join(known)}"
                )
        if self.kv_memory is not None:
            parse_memory(self.kv_memory)
        if not isinstance(self.branches, str):
            object.__setattr__(self, "branches", tuple(self.branches))
        from idlm.decoding.plan import plans_for  # here, because torch takes seconds to import

        plans_for(self.stride, self.branches)
        wrong = "masks" if self.branches == "lookup" else "lookup"
        if self.drafts == wrong and self.branches not in ("planner", self.drafts):
            raise InputError(
                f"drafts={self.drafts!r} with branches={self.branches!r}, which draft otherwise; "
                "use branches='planner', or leave out one of them"
            )

    def with_options(self, options: Mapping[str, Any]) -> EngineConfig:
        """A copy with some options changed.

        Raises:
            InputError: an option is unknown or out of range.
        """
        known = [field.name for field in fields(self)]
        for name in options:
            if name not in known:
                raise InputError(f"{name!r} is no option of an engine; use {', '.join(known)}")
        return replace(self, **options)


def _check_count(name: str, value: object) -> None:
    if value is None and name in ("prefill_tokens", "max_model_len"):
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{name}={value!r} is not a whole number above 0; use for example 16")


def parse_memory(value: int | str) -> int:
    """Bytes of `value`: a number of bytes, or a string such as "512MiB" or "2GiB".

    Raises:
        InputError: `value` is neither.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(|KiB|MiB|GiB)\s*", str(value))
    if isinstance(value, bool) or match is None or float(match[1]) == 0:
        raise InputError(
            f"kv_memory={value!r} is no amount of memory; "
            "give bytes, or for example '512MiB' or '2GiB'"
        )
    return int(float(match[1]) * UNITS[match[2]])

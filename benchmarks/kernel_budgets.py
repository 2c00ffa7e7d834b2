"""Every Triton kernel compiled for every GPU generation, within what the GPU has: needs no GPU.

    python -m benchmarks.kernel_budgets [--processors 80 89 90 100 120] [--out FILE]

Each kernel is compiled as the engine launches it, for heads of 128 and 256 numbers, and checked
against the shared memory of a block (the least of the generation) and 255 registers a thread; what
registers do not hold, in bytes of a thread's stack, has a bound by head size. Exit status 1 if one
is over. It takes about 3 s of CPU time a kernel.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from idlm.environment import environment
from idlm.kernels import (
    batch_invariant_triton,
    choose_triton,
    keep_triton,
    layer_ops_triton,
    prefill_attention_triton,
    window_attention_triton,
)
from idlm.kernels.window_attention_triton import tile_sizes

SHARED = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
"""Bytes of shared memory that a block may have, by compute capability."""
MOST_STACK = {128: 96, 256: 640}
"""Bytes of the stack of a thread, by head size."""
TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
INT64 = ("lengths", "table", "visible", "firsts", "order", "counts", "keys", "positions", "ids")
INT64 += ("starts", "ends", "top_ks", "cache_rows", "adapter", "owners")
FLOATS = ("query", "key", "value", "pages", "x", "weight", "bias", "out", "sinks", "scores", "kept")
FLOATS += ("more", "total", "cosine", "sine", "query_norm", "key_norm", "y", "low", "b")
FLOAT64 = ("temperatures", "bests", "top_ps", "min_ps")
NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
FOUR = {"num_warps": 4, "num_stages": 2}
PLAIN = {"WINDOWED": False, "CAPPED": False, "SINKS": False}


def kernels() -> Iterator[tuple[str, Any, dict[str, Any], str, dict[str, int], int]]:
    """Name, kernel, constants, type of the numbers, options and head size (128 if it has none)."""
    yield "choose", choose_triton._choose, {"SAMPLED": True, "BLOCK": 1024}, "bf16", FOUR, 128
    eight = {"num_warps": 8, "num_stages": 2}
    yield "keep", keep_triton._keep, {"BLOCK": keep_triton.BLOCK}, "bf16", eight, 256
    linear = {"BIASED": True, "ROWS": 16, "COLUMNS": 64, "DEPTH": 64}
    yield "linear", batch_invariant_triton._linear, linear, "bf16", FOUR, 128
    yield from layer_kernels()
    for size in (128, 256):
        join = {"E": size, "SPLITS": 16, "SIZE": size}
        yield f"join {size}", window_attention_triton._join, join, "bf16", FOUR, size
        for dtype, name in NAMES.items():
            heads = {"PAGE": 16, "G": 8, "F": 4, "E": size, "SIZE": size, **PLAIN}
            for rows in (4, 64):
                tile, keys = tile_sizes(rows, size, dtype)
                block = heads | {"ROWS": tile, "KEYS": keys, "CAUSAL": False}
                what = f"window {name} {size}, {tile} rows"
                yield what, window_attention_triton._attend, block, name, FOUR, size
            block = heads | {"ROWS": tile, "KEYS": keys}
            yield (
                f"prefill {name} {size}",
                prefill_attention_triton._attend,
                block,
                name,
                FOUR,
                size,
            )
            block = heads | {"HEADS": 16, "KEYS": batch_invariant_triton.keys_of(size, dtype)}
            what = f"deterministic {name} {size}"
            stages = FOUR | {"num_stages": batch_invariant_triton.stages_of(size, dtype)}
            yield what, batch_invariant_triton._attend, block, name, stages, size


def layer_kernels() -> Iterator[tuple[str, Any, dict[str, Any], str, dict[str, int], int]]:
    """As `kernels`, those between a layer's products."""
    inner = {"BLOCK": layer_ops_triton.INNER}
    for dtype, name in NAMES.items():
        for hidden in (4096, 12_288):
            row = layer_ops_triton.row_block(hidden)
            block = {"ADDED": True, "BLOCK": row.pop("BLOCK")}
            yield f"norm {name} {hidden}", layer_ops_triton._norm, block, name, row, 128
        yield f"swiglu {name}", layer_ops_triton._swiglu, inner, name, FOUR, 128
        heads = {"NORMED": True, "H": 32, "G": 8, "E": 128, "SIZE": 128}
        yield f"rotate {name}", layer_ops_triton._rotate, heads, name, {"num_warps": 1}, 128
        tile = {"ROWS": layer_ops_triton.ROWS, "COLUMNS": layer_ops_triton.COLUMNS, "PARTS": 3}
        tile["DEPTH"] = layer_ops_triton.depth_of(dtype)
        yield f"update {name}", layer_ops_triton._update, tile, name, FOUR, 128


def compiled(
    kernel: Any, constants: dict[str, Any], floats: str, options: dict[str, int], cc: int
) -> Any:
    """The kernel for a compute capability, as launched by the engine."""
    types = dict.fromkeys(INT64, "*i64") | dict.fromkeys(FLOATS, f"*{floats}")
    types |= dict.fromkeys(FLOAT64, "*fp64") | {"partial": "*fp32", "weights": "*fp32"}
    types |= {"scale": "fp32", "cap": "fp32", "epsilon": "fp32", "scales": "*fp32"}
    if kernel is layer_ops_triton._rotate:  # elsewhere a number
        types["rows"] = f"*{floats}"
    names = kernel.arg_names
    signature = {name: types.get(name, "i32") for name in names}
    signature |= dict.fromkeys((name for name in names if name in constants), "constexpr")
    aligned = [name for name in names if signature[name].startswith("*")] + ["half"]
    attributes = {
        (place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if name in aligned
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", cc, 32), options=options)


def usage(code: Any) -> dict[str, int]:
    """Shared memory of a block, registers and bytes of the stack of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code.asm["cubin"])
        file.flush()
        command = [str(TOOL), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(re.findall(rf"{name}:(\d+)", text)[-1]) for name in ("REG", "STACK")}
    return {"shared": code.metadata.shared, "registers": found["REG"], "stack": found["STACK"]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--processors", type=int, nargs="+", default=list(SHARED))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows, over = [], []
    for name, kernel, constants, floats, launch, size in kernels():
        for cc in options.processors:
            used = usage(compiled(kernel, constants, floats, launch, cc))
            rows.append({"kernel": name, "processor": cc, **used})
            fits = used["shared"] <= SHARED[cc] and used["stack"] <= MOST_STACK[size]
            over += [] if fits else [rows[-1]]
            print(rows[-1], "" if fits else "OVER", flush=True)
            if options.out is not None:
                report = {"environment": environment(), "kernels": rows, "over": over}
                options.out.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(bool(over))


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"
    main()

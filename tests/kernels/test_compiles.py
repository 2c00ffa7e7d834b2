"""The kernels compile for a GPU: the interpreter takes much that Triton's compiler refuses. Needs
no GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import sys
from itertools import product

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from idlm.kernels import batch_invariant_triton, choose_triton, layer_ops_triton
from idlm.kernels import prefill_attention_triton, window_attention_triton

INT64 = ("lengths", "table", "visible", "firsts", "order", "counts")
INT64 += ("keys", "positions", "ids", "starts", "ends", "cache_rows", "adapter", "owners")
BFLOAT16 = ("query", "key", "value", "pages", "x", "weight", "bias", "out", "sinks", "more")
BFLOAT16 += ("total", "cosine", "sine", "query_norm", "key_norm", "y", "low", "b")
POINTERS = {name: "*i64" for name in INT64}
POINTERS |= {name: "*fp32" for name in ("partial", "weights")}
POINTERS |= {name: "*bf16" for name in BFLOAT16}
POINTERS |= {name: "*fp64" for name in ("temperatures", "bests")}
POINTERS |= {"scale": "fp32", "cap": "fp32", "epsilon": "fp32", "scales": "*fp32"}
HEAD = {"PAGE": 16, "G": 8, "F": 4, "E": 80, "SIZE": 128}


PLAIN = {"WINDOWED": False, "CAPPED": False, "SINKS": False}
KINDS = (PLAIN, {"WINDOWED": True, "CAPPED": True, "SINKS": True})


def compiles(kernel, processor=80, **constants):
    names = kernel.arg_names
    signature = {name: POINTERS.get(name, "i32") for name in names}
    signature |= {name: "constexpr" for name in names if name in constants}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    assert triton.compile(source, target=GPUTarget("cuda", processor, 32)).asm["cubin"]


if sys.argv[1] == "window":
    for kind, causal in product(KINDS, (True, False)):
        tile = {"CAUSAL": causal, "ROWS": 16, "KEYS": 64}
        compiles(window_attention_triton._attend, **tile, **kind, **HEAD)
    compiles(window_attention_triton._join, E=80, SPLITS=16, SIZE=128)
elif sys.argv[1] == "prefill":
    for kind, processor in product(KINDS, (80, 90)):
        tile = {"ROWS": 64, "KEYS": 64}
        compiles(prefill_attention_triton._attend, processor, **tile, **kind, **HEAD)
elif sys.argv[1] == "choose":
    for POINTERS["scores"] in ("*bf16", "*fp64"):
        for sampled in (True, False):
            compiles(choose_triton._choose, SAMPLED=sampled, BLOCK=choose_triton.BLOCK)
elif sys.argv[1] == "layer":
    POINTERS["rows"] = "i32"
    for added in (True, False):
        compiles(layer_ops_triton._norm, ADDED=added, BLOCK=4096)
    compiles(layer_ops_triton._swiglu, BLOCK=layer_ops_triton.INNER)
    tile = {"ROWS": layer_ops_triton.ROWS, "COLUMNS": layer_ops_triton.COLUMNS, "DEPTH": 64}
    for parts in (1, 3):
        compiles(layer_ops_triton._update, PARTS=parts, **tile)
    POINTERS["rows"] = "*bf16"
    for normed in (True, False):
        compiles(layer_ops_triton._rotate, NORMED=normed, H=32, G=8, E=80, SIZE=128)
else:
    for kind in KINDS:
        compiles(batch_invariant_triton._attend, HEADS=16, KEYS=32, **kind, **HEAD)
    compiles(batch_invariant_triton._linear, BIASED=True, ROWS=16, COLUMNS=64, DEPTH=64)
"""


@pytest.mark.parametrize("kernels", ["window", "prefill", "invariant", "choose", "layer"])
def test_the_kernels_compile(kernels: str) -> None:
    pytest.importorskip("triton", reason="triton is not installed: there is nothing to compile")
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, kernels], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr

"""Measures whether the processor's own prefetcher reads the panels faster than the C kernels' does.

For products of few rows that differs between processors: with 4 rows of float32 weights the
processor's is faster on an AMD Zen 4, and half as fast on an Intel Sapphire Rapids. The setting is
one for the process, by format.
"""

from __future__ import annotations

import ctypes
import json
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from idlm.kernels import native
from idlm.kernels.choice import choice_file, fastest, noise
from idlm.kernels.linears import ALWAYS, Layer, Linears
from idlm.kernels.panels import FORMATS

log = logging.getLogger("idlm")

ROWS = (1, 2, 4)
SAMPLE_BYTES = 32 << 20
"""Layers are timed until they have so many bytes: more than second-level caches hold."""


@torch.inference_mode()
def choose_prefetch(linears: Linears) -> None:
    """Set the most rows for which the kernels leave prefetching to the processor, and log it."""
    layers = _sample(linears.layers)
    path = choice_file("prefetch", [linears.format, [layer.shape for layer in layers]])
    most = _read(path)
    if most is None:
        most = _measure(linears.format, layers)
        native.write_cache(path, most)
    _set(linears.format, most)
    log.info("prefetch of %s weights: the processor's own up to %d rows", linears.format, most)


def _sample(layers: Sequence[Layer]) -> list[Layer]:
    """The first layers, until they have SAMPLE_BYTES; all if they have fewer."""
    sample: list[Layer] = []
    for layer in layers:
        sample.append(layer)
        if sum(layer.panels.weights.nbytes for layer in sample) > SAMPLE_BYTES:
            break
    return sample


def _measure(format: str, layers: Sequence[Layer]) -> int:
    """The last of ROWS at which the processor's prefetcher is as fast as ours, and at all before
    it; 0 if there is none."""
    most = 0
    for rows in ROWS:
        inputs = {layer.shape[0]: noise(rows, layer.shape[0]) for layer in layers}

        calls = [partial(_multiply, format, layers, inputs, most) for most in (rows, 0)]
        hardware, own = fastest(calls)
        if hardware > own:
            break
        most = rows
    return most


def _multiply(
    format: str, layers: Sequence[Layer], inputs: Mapping[int, Tensor], hardware: int
) -> None:
    """Multiply rows by the layers' panels; `inputs` are by K."""
    _set(format, hardware)
    for layer in layers:
        weights, scales, out, inner = layer.panels
        torch.ops.idlm.linear(inputs[inner], layer.weight, weights, scales, out, ALWAYS)


def _set(format: str, rows: int) -> None:
    library = native.library()
    assert library is not None, "there are panels, so there are kernels"  # noqa: S101
    library.set_hardware_rows(ctypes.c_int(list(FORMATS).index(format)), ctypes.c_int64(rows))


def _read(path: Path) -> int | None:
    """The cached number; None if there is none."""
    try:
        most = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return most if most in (0, *ROWS) else None

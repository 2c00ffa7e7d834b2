"""The grid on which the explorer's port of the speed-up model is compared with the model.

`python -m tests.ui.speedup_grid` writes web/tests/speedup.json.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

from idlm.evaluation import speedup as model

FILE = Path(__file__).parents[2] / "web" / "tests" / "speedup.json"
CASES = 240
METHODS: list[tuple[str, Any]] = [
    ("autoregressive", []),
    ("strided", [[0.9], 4]),
    ("strided", [[0.95, 0.8, 0.6], 8]),
    ("strided", [[0.7, 0.9], 5, [0, 3]]),
    ("strided", [[0.5], 1]),
    ("chain", [[0.84], 4]),
    ("chain", [[1.0], 3]),
    ("chain", [[0.6, 0.4], 12]),
    ("blockDiffusion", [0.5]),
    ("blockDiffusion", [0.8, 32, False]),
    ("wholeSequence", [128, 32, 100]),
    ("twoForwards", [[0.8, 0.7], 6]),
]
PYTHON = {
    "blockDiffusion": model.block_diffusion,
    "wholeSequence": model.whole_sequence,
    "twoForwards": model.two_forwards,
}
SHAPES = [
    model.QWEN3_8B,
    model.Shape(30, 576, 49_152, 9, 3, 64, 106_000_000, 1.0, 4.0),
]
MACHINES = [model.H100, model.H200, model.Machine(9e10, 2e12, 1e-3, 0.35)]
LOADS = [model.Load(), model.Load(8, 1024), model.Load(200, 300)]
DRAFTINGS = [model.PLAIN, model.Drafting(11, 4e6, 1.12)]


def camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(word.title() for word in rest)


def js(value: Any) -> dict[str, Any]:
    """The fields of a dataclass under the names of the port."""
    return {camel(name): field for name, field in asdict(value).items()}


def grid() -> dict[str, Any]:
    """All inputs, and for each case its inputs by index and what the model gives."""
    rng = random.Random(0)
    cases = []
    for number in range(CASES):
        name, given = METHODS[number % len(METHODS)]
        made = PYTHON.get(name) or getattr(model, name)
        method = made(*given)
        shape, machine, load, drafting = (
            rng.randrange(len(choices)) for choices in (SHAPES, MACHINES, LOADS, DRAFTINGS)
        )
        found = model.speed(
            method, SHAPES[shape], MACHINES[machine], LOADS[load], DRAFTINGS[drafting]
        )
        case = {"method": [name, *given], "shape": shape, "machine": machine, "load": load}
        cases.append(
            case | {"drafting": drafting, "speed": js(found), "efficiency": method.efficiency}
        )
    inputs = {"shapes": SHAPES, "machines": MACHINES, "loads": LOADS, "draftings": DRAFTINGS}
    return {name: [js(one) for one in values] for name, values in inputs.items()} | {"cases": cases}


if __name__ == "__main__":
    FILE.write_text(json.dumps(grid(), separators=(",", ":")).replace('{"method"', '\n{"method"'))

"""Convert a model: train a gated LoRA, load it, compare with AR.

    python examples/convert.py [--model nano-base] [--folder runs/example] [--quick]

--quick trains for two steps only, so hardly any draft is accepted; the output is AR's all the same.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from idlm import LLM, SamplingParams

IDLM = Path(sys.executable).with_name("idlm")
"""The command in this Python's environment."""
PROMPT = "Mia has 14 apples."

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--model", default="nano-base")
parser.add_argument("--folder", default="runs/example")
parser.add_argument("--quick", action="store_true")
options = parser.parse_args()

command = [
    "train",
    "configs/nano-lora.yaml",
    f"--model.path={options.model}",
    f"--output_dir={options.folder}",
]
if options.quick:
    command += [
        "--stages.0.steps=1",
        "--stages.1.steps=1",
        "--batch_size=2",
        "--data.held_out=2",
        "--bf16=false",
    ]
subprocess.run([IDLM, *command], check=True)

params = SamplingParams(temperature=0, max_tokens=40)
ar = LLM(options.model, stride=1, dtype="float64").generate(PROMPT, params)[0]
isd = LLM(options.model, f"{options.folder}/final", branches="all", dtype="float64").generate(
    PROMPT, params
)[0]
print(f"AR  {ar.text!r}: TPF {ar.tpf:.2f}")
print(f"ISD {isd.text!r}: TPF {isd.tpf:.2f}")
print("the same tokens:", ar.token_ids == isd.token_ids)

"""A batch of prompts, each with its own sampling: `python examples/generate.py [MODEL]`."""

from __future__ import annotations

import sys

from idlm import LLM, SamplingParams

model = sys.argv[1] if len(sys.argv) > 1 else "nano"
llm = LLM(model, stride=8)
prompts = ["Mia has 14 apples.", "Emma has 3 boxes.", "Tom buys 5 books."]
params = [SamplingParams(seed=seed, temperature=0.7, max_tokens=60) for seed in range(len(prompts))]
for result in llm.generate(prompts, params):
    print(f"{result.text!r}")
    print(f"  {len(result.token_ids)} tokens in {result.forwards} forward passes: TPF {result.tpf:.2f}")
print("the planner's choice:", llm.engine.planner.reason)

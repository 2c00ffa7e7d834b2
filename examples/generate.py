"""A batch of conversations with tokens per forward: `python examples/generate.py [MODEL]`."""

from __future__ import annotations

import sys

from idlm import LLM, SamplingParams

model = sys.argv[1] if len(sys.argv) > 1 else "nano"
llm = LLM(model, stride=8)
questions = [
    "Leo has 24 buttons. After that he sells 8 of the buttons. "
    "After that he sells 4 of the buttons. How many buttons does Leo have now?",
    "Sara has 25 pencils. Then she buys 25 more pencils at school. "
    "After that she loses 47 of the pencils. How many pencils does Sara have now?",
]
conversations = [[{"role": "user", "content": question}] for question in questions]
for result in llm.chat(conversations, SamplingParams(seed=7, temperature=0.5, max_tokens=200)):
    print(result.text)
    tokens, forwards = len(result.token_ids), result.forwards
    print(f"  {tokens} tokens in {forwards} forward passes: TPF {result.tpf:.2f}")
print("the planner's choice:", llm.engine.planner.reason)

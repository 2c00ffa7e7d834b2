"""Text as it comes, then where its tokens came from: `python examples/stream.py [MODEL]`."""

from __future__ import annotations

import sys
from collections import Counter

from idlm import LLM, SamplingParams

model = sys.argv[1] if len(sys.argv) > 1 else "nano"
llm = LLM(model, stride=8, branches="all")
question = "Mia has 14 apples. Then she buys 9 more apples at the market. How many apples does Mia have now?"
prompt = llm.encode_chat([{"role": "user", "content": question}])
sources: Counter[str] = Counter()
for update in llm.stream(prompt, SamplingParams(temperature=0, max_tokens=200)):
    print(update.text, end="", flush=True)
    sources.update(update.sources)
print()
print(", ".join(f"{count} {source}" for source, count in sources.most_common()))

"""Text as it comes, then the sources of its tokens: `python examples/stream.py [MODEL]`."""

from __future__ import annotations

import sys
from collections import Counter

from idlm import LLM, SamplingParams

QUESTION = (
    "Leo has 12 cookies. After that he gives away 4 of the cookies. "
    "Then he finds 33 more cookies at school. How many cookies does Leo have now?"
)

model = sys.argv[1] if len(sys.argv) > 1 else "nano"
llm = LLM(model, stride=8, branches="all")
prompt = llm.encode_chat([{"role": "user", "content": QUESTION}])
sources: Counter[str] = Counter()
for update in llm.stream(prompt, SamplingParams(temperature=0, max_tokens=200)):
    print(update.text, end="", flush=True)
    sources.update(update.sources)
print()
print(", ".join(f"{count} {source}" for source, count in sources.most_common()))

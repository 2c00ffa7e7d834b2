"""A client with the `openai` package, for a running server.

idlm serve nano
python examples/openai_client.py --url http://127.0.0.1:8000/v1 [--model nano] [--key KEY]
"""

from __future__ import annotations

import argparse

from openai import OpenAI

QUESTION = (
    "Leo has 12 cookies. After that he gives away 4 of the cookies. "
    "Then he finds 33 more cookies at school. How many cookies does Leo have now?"
)

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
parser.add_argument("--model", default="nano", help='"nano:ar" decodes without drafts')
parser.add_argument("--key", default="none")
options = parser.parse_args()

client = OpenAI(base_url=options.url, api_key=options.key)
messages = [{"role": "user", "content": QUESTION}]
answer = client.chat.completions.create(
    model=options.model, messages=messages, temperature=0, max_tokens=100
)
print(answer.choices[0].message.content)
print("drafts:", answer.usage.completion_tokens_details)

stream = client.chat.completions.create(
    model=options.model,
    messages=messages,
    seed=7,
    max_tokens=100,
    stream=True,
    extra_body={"top_k": 20},
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()

"""guidellm: a few requests with its defaults, which stream."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from features import HOST, MODEL, check, feature


def load(route: str) -> None:
    """Four requests to a route, all of which must be answered."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.jsonl"
        rows = ({"prompt": f"Count to {n}.", "output_tokens_count": 8} for n in range(4))
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        out = Path(folder) / "report.json"
        command = [
            *(str(Path(sys.executable).with_name("guidellm")), "run", "--disable-console"),
            *("--backend", f"kind=openai_http,target={HOST},model={MODEL},request_format={route}"),
            *("--profile", "kind=synchronous", "--constraint", "kind=max_requests,count=4"),
            *("--data", f"kind=json_file,path={data}", "--output", f"kind=json,path={out}"),
            *("--tokenizer", f"kind=huggingface_auto,model={os.environ['FOLDER']}"),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if not out.exists():
            raise RuntimeError((done.stdout + done.stderr)[-1500:])
        totals = json.loads(out.read_text())["benchmarks"][0]["metrics"]["request_totals"]
        assert totals["successful"] == 4 and not totals["errored"], totals


@feature("chat completions, streamed")
def chat() -> None:
    load("/v1/chat/completions")


@feature("completions, streamed")
def completions() -> None:
    load("/v1/completions")


@feature("responses, streamed")
def responses() -> None:
    load("/v1/responses")


check("guidellm")

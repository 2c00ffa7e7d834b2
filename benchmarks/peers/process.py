"""`Peer`: another engine as a `BenchEngine`, in a process of its own."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from idlm.evaluation.closed_loop import Run, Served
from idlm.evaluation.workload import Request

HERE = Path(__file__).parent


class Peer:
    """A process that speaks `benchmarks/peers/protocol.py`. It loads its model now, and idles
    between runs.

    Args:
        python: of the environment that has the engine.
        script: in this folder.
        model: a folder in Hugging Face form, or a GGUF file for llama.cpp.
        slots: the most requests in flight.
    """

    simulated = False

    def __init__(
        self,
        python: str | Path,
        script: str,
        model: Path,
        threads: int,
        mode: str | None = None,
        slots: int = 64,
    ) -> None:
        options = ["--model", str(model), "--threads", str(threads), "--slots", str(slots)]
        options += ["--mode", mode] if mode else []
        command = [str(python), str(HERE / script), *options]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        introduction = self._read()
        self.engine, self.mode = str(introduction["engine"]), str(introduction["mode"])
        self.versions: dict[str, str] = introduction["versions"]

    def run(self, requests: Sequence[Request], concurrency: int) -> Run:
        line = {"concurrency": concurrency, "requests": [asdict(request) for request in requests]}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(line) + "\n")
        answer = self._read()
        served = [Served(**request) for request in answer["requests"]]
        return Run(answer["seconds"], answer["cpu_seconds"], answer["peak_memory_mb"], served)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"{' '.join(map(str, self._process.args))} ended; see its messages above"
            )  # type: ignore[arg-type]
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=600)

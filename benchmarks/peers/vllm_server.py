"""`vllm serve` of vLLM's CPU build.

    build/vllm/bin/python benchmarks/peers/vllm_server.py serve FOLDER --port 8000 ...

The command line looks up a distribution "vllm"; that of the CPU build has another name.
"""

from __future__ import annotations

import os
from importlib import metadata

SETTINGS = {
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # OMP_NUM_THREADS counts, not the number of cores
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


def main() -> None:
    version = metadata.version
    metadata.version = lambda name: version("vllm-cpu" if name == "vllm" else name)
    from vllm.entrypoints.cli.main import main as vllm

    vllm()


if __name__ == "__main__":
    os.environ.update({name: value for name, value in SETTINGS.items() if name not in os.environ})
    from vllm_cpu import preload

    preload()
    main()

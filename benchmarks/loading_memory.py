"""Memory of loading a model for training: what each of two ranks holds of its own at the peak.

python -m benchmarks.loading_memory [--layers 8] [--hidden 1024]

A random Qwen3 in bfloat16 is written to a temporary folder. Each rank loads and shards it (FSDP2
over gloo, on the CPU), and a thread reads its anonymous memory (RssAnon of Linux), which leaves out
pages of mapped files: all ranks share those, and the system can drop them. `whole in float32` is
what `from_pretrained(dtype=float32)` holds.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time

import torch
import torch.multiprocessing as spawning
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.memory import status
from idlm.training.read_config import parse_config

KINDS = {
    "whole in float32": None,
    "fsdp full, float32 masters": {"method": "full", "parallel": "fsdp"},
    "fsdp lora": {"method": "lora", "parallel": "fsdp"},
}


def rank(index: int, port: int, folder: str, kind: str, peaks: dict[str, float]) -> None:
    """Load as a run does; keep the peak above what the imports take, in GB."""
    os.environ |= {"RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    from idlm.training import processes, setup
    from idlm.training.objective import Objective
    from idlm.training.optimizer import optimizers

    changes = KINDS[kind] or {"method": "full"}
    stages = [{"steps": 1}]
    tree = {"output_dir": folder, "model": {"path": folder}, "stages": stages, **changes}
    config = parse_config(tree)
    accelerator = processes.processes(config)
    start, highest, done = status("RssAnon"), 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.is_set():
            highest = max(highest, status("RssAnon") - start)
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    if KINDS[kind] is None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        idlm = setup.base_model(config.model, *processes.placement(accelerator))
        student = setup.trainee(config, idlm)
        model = Objective(student.idlm, trains_clean=config.method == "full")
        processes.prepare(accelerator, model, list(optimizers(model, config.optimizer)))
    done.set()
    watcher.join()
    if index == 0:
        peaks[kind] = round(highest / 1e9, 3)
        peaks[f"{kind}, at the end"] = round((status("RssAnon") - start) / 1e9, 3)
    del model


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=1024)
    given = parser.parse_args()
    sizes = {"num_hidden_layers": given.layers, "hidden_size": given.hidden, "vocab_size": 32768}
    sizes |= {"intermediate_size": 3 * given.hidden, "tie_word_embeddings": False}
    config = AutoConfig.for_model("qwen3", **sizes, mask_token_id=7)
    with tempfile.TemporaryDirectory() as folder:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder)
        parameters = sum(p.numel() for p in model.parameters())
        del model
        figures = {"parameters": parameters, "float32 GB": round(parameters * 4 / 1e9, 3)}
        with spawning.Manager() as manager:
            peaks = manager.dict()
            for number, kind in enumerate(KINDS):
                spawning.spawn(rank, (29600 + number, folder, kind, peaks), nprocs=2)
            print(json.dumps(figures | dict(peaks), indent=1))


if __name__ == "__main__":
    main()

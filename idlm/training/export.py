"""`idlm export`: a run's result as one Hugging Face folder, with a model card, and onto the hub."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file

from idlm.errors import InputError
from idlm.models import adapter
from idlm.models.sources import first_line, read_json
from idlm.training.card import MARK, Facts, card
from idlm.training.checkpoint import OPTIMIZER, STATE, checkpoints
from idlm.training.log import read_entries
from idlm.training.strict import read_yaml

CARD = "README.md"
FIXES = {
    401: "set HF_TOKEN to a token of yours",
    403: "use a token that may write there",
    404: "check the name and that the token may see it",
}
"""What helps, by the status of the hub's answer."""


@dataclass(frozen=True)
class Result:
    """A checkpoint, or the end of a run; and the run that it is of, if its folder is known.

    `step` is None at the end of a run.
    """

    folder: Path
    run: Path | None
    step: int | None


def find(source: Path) -> Result:
    """The result in `source`: a folder of weights, or a run, of which it is the end or else the
    newest checkpoint.

    Raises:
        InputError: there are no weights.
    """
    inside = [source, source / "final", *reversed(checkpoints(source))]
    folder = next((each.resolve() for each in inside if _has_weights(each)), None)
    if folder is None:
        raise InputError(
            f"no weights in {str(source)!r}; give the output_dir of a run, or a checkpoint in it"
        )
    run = folder.parent if (folder.parent / "config.yaml").exists() else None
    state = folder / STATE
    return Result(folder, run, read_json(state)["step"] if state.exists() else None)


def _has_weights(folder: Path) -> bool:
    names = (adapter.CONFIG, "config.json")
    return any((folder / name).exists() for name in names) and any(folder.glob("*.safetensors"))


def export(
    source: Path, folder: Path, repo: str | None = None, dtype: torch.dtype | None = None
) -> Path:
    """Write the result in `source` to `folder`: a PEFT adapter, or a whole model whose config names
    MASK id and block size; with a card that calls it `repo`, by default the folder's name.

    Args:
        dtype: of an adapter's weights; None keeps the type that they were trained in.

    Returns:
        the folder of weights that was taken.

    Raises:
        InputError: there are no weights, a whole model is to be converted, or `folder` holds
            something else or cannot be written.
    """
    result = find(source)
    if dtype is not None and not (result.folder / adapter.CONFIG).exists():
        raise InputError(
            f"{str(result.folder)!r} is a whole model, and a dtype is for adapters; "
            "leave it out, and give --dtype to the commands that load the model"
        )
    held = list(folder.iterdir()) if folder.is_dir() else []
    if folder.exists() and not folder.is_dir() or held and not _is_export(folder):
        raise InputError(f"{str(folder)!r} holds something else; name a new or empty folder")
    text = card(facts(result, repo or folder.resolve().name))
    staging = folder.resolve().with_name(f".{folder.resolve().name}.writing")
    ignored = shutil.ignore_patterns(OPTIMIZER, STATE)
    try:
        shutil.rmtree(staging, ignore_errors=True)
        shutil.copytree(result.folder, staging, ignore=ignored)
        if dtype is not None:
            _convert(staging, dtype)
        (staging / CARD).write_text(text, encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        staging.rename(folder.resolve())
    except (OSError, shutil.Error) as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise InputError(
            f"cannot write {str(folder)!r} ({first_line(error)}); make room or name another folder"
        ) from None
    return result.folder


def _convert(folder: Path, dtype: torch.dtype) -> None:
    """Round all weights in a folder to `dtype`."""
    for file in folder.glob("*.safetensors"):
        weights = {name: weight.to(dtype) for name, weight in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})


def _is_export(folder: Path) -> bool:
    readme = folder / CARD
    return readme.is_file() and MARK in readme.read_text(encoding="utf-8", errors="replace")


def facts(result: Result, name: str) -> Facts:
    """What the card says of a result."""
    is_adapter = (result.folder / adapter.CONFIG).exists()
    if is_adapter:
        info = adapter.read(result.folder)
        base, mask, block = info.base_name, info.mask_id, info.block_size
    else:
        keys = read_json(result.folder / "config.json")
        base, mask, block = None, keys.get("mask_token_id"), keys.get("block_size")
    recipe = ""
    measured: dict[str, Any] = {}
    started: dict[str, Any] = {}
    if result.run is not None:
        recipe = (result.run / "config.yaml").read_text(encoding="utf-8")
        base = (read_yaml(recipe, "config.yaml").get("model") or {}).get("path") or base
        step = math.inf if result.step is None else result.step
        entries = read_entries(result.run / "metrics.jsonl", step)
        measured = next((each for each in reversed(entries) if "acceptance" in each), {})
        started = _environment(result.run)
    return Facts(name, is_adapter, base, mask, block, recipe, measured, started)


def _environment(run: Path) -> dict[str, Any]:
    """What the run wrote of its machine and data when it started last, if it did."""
    file = run / "environment.json"
    entries = read_yaml(file.read_text(encoding="utf-8"), str(file)) if file.exists() else None
    return dict(entries[-1]) if entries else {}


def push(folder: Path, repo: str, private: bool) -> str:
    """Upload an export to a repository of the hub, which is made if it is missing; returns its
    address. The token is huggingface_hub's: HF_TOKEN or `hf auth login`.

    Raises:
        InputError: the hub refuses, or cannot be reached.
    """
    api = HfApi()
    try:
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Export from idlm")
    except Exception as error:  # the hub's client and its network libraries raise many types
        status = getattr(getattr(error, "response", None), "status_code", None)
        fix = FIXES.get(status or 0, "check the network, HF_ENDPOINT and HF_TOKEN")
        why = f"status {status}" if status in FIXES else first_line(error)
        raise InputError(
            f"the hub did not take {repo!r} ({why}); {fix}. The export is in {str(folder)!r}"
        ) from None
    return str(address)

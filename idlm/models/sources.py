"""Finds checkpoints by bundled name, folder, GGUF file or hub id, and reads their JSON files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from idlm.errors import InputError
from idlm.models.gguf_header import is_gguf

WEIGHTS = Path(__file__).parents[1] / "nano" / "weights"
BUNDLED = {
    "nano": (WEIGHTS / "base", WEIGHTS / "lora"),
    "nano-base": (WEIGHTS / "base", None),
    "nano-full": (WEIGHTS / "full", None),
}
"""The bundled models: the folder, and the adapter that belongs to the name."""

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
"""Configs, weights, tokenizers and chat templates. Pickles and code are never downloaded."""


def resolve(name: str | Path) -> tuple[Path, Path | None]:
    """The folder or GGUF file of `name`, and the adapter that belongs to it (only for "nano").

    Raises:
        InputError: there is no such folder, file or hub id, or the hub cannot be reached; it is a
            file of another kind, or a folder with GGUF weights only.
    """
    if str(name) in BUNDLED:
        return BUNDLED[str(name)]
    folder = Path(name).expanduser()
    if folder.is_dir():
        _refuse_only_gguf(folder)
        return folder, None
    if folder.exists() and is_gguf(folder):
        return folder, None
    if folder.exists():
        raise InputError(f"{str(name)!r} is a file, and no GGUF; give the folder that holds it")
    if folder.suffix.lower() == ".gguf":
        raise InputError(f"no file {str(name)!r}; check the path")
    if isinstance(name, Path) or not HUB_ID.fullmatch(name):
        raise InputError(
            f"no folder {str(name)!r}; "
            f"give a folder, a hub id such as Qwen/Qwen3-0.6B, or {', '.join(BUNDLED)}"
        )
    return _download(name), None


def _refuse_only_gguf(folder: Path) -> None:
    """Raise InputError for a folder with GGUF weights only: it may have several, so the user must
    name the file."""
    files = sorted(folder.glob("*.gguf"))
    if files and not any(folder.glob("*.safetensors")):
        raise InputError(
            f"{str(folder)!r} has GGUF weights only; give a file of it, such as {str(files[0])!r}"
        )


def _download(hub_id: str) -> Path:
    """Download a repository of the hub into the cache of huggingface_hub."""
    try:
        return Path(snapshot_download(hub_id, allow_patterns=HUB_FILES))
    except Exception as error:  # the hub's client and its network libraries raise many types
        raise InputError(
            f"no folder {hub_id!r}, and the hub gave none ({first_line(error)}); check the name"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in `path`.

    Raises:
        InputError: there is no such file, or it is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"no {path.name} in {str(path.parent)!r}; give a folder that holds one"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(
            f"{str(path)!r} is not valid JSON ({first_line(error)}); download it again"
        ) from None
    if not isinstance(value, dict):
        raise InputError(
            f"{str(path)!r} holds a JSON {type(value).__name__}, not an object; download it again"
        )
    return value


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__

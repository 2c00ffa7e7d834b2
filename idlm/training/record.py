"""`environment.json`: what a run depends on besides its config, one entry for each start.

started, resumed_from     when (UTC), and the checkpoint that it went on from
command                   the command line
steps                     of each stage
ranks                     processes of the run
model, fingerprint        the base, and what its weights are
data                      sha256 and bytes of each file that was read; a dataset has none
git                       commit, and whether files differ from it: of idlm, if it runs from a
                          clone, and of the working directory
...                       versions and hardware
"""

from __future__ import annotations

import hashlib
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

import idlm
from idlm.environment import environment
from idlm.training.checkpoint import replace_text
from idlm.training.config import TrainConfig, WeightedPath
from idlm.training.processes import writing
from idlm.training.tables import Tables

ENVIRONMENT = "environment.json"


def record(
    config: TrainConfig,
    fingerprint: str,
    ranks: int,
    resume: Path | None,
    files: Mapping[str, Mapping[str, Any]],
) -> None:
    """Add an entry to the run's environment.json.

    Args:
        config: with steps.
        fingerprint: of the base.
        resume: the checkpoint that the run goes on from.
        files: the data's, with digests, as `training.origin` has them.

    Raises:
        InputError: it cannot be written.
    """
    file = Path(config.output_dir) / ENVIRONMENT
    entry = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "resumed_from": None if resume is None else resume.name,
        **environment(),
        "command": shlex.join(sys.argv),
        "accelerate": version("accelerate"),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": torch.cuda.device_count(),
        "ranks": ranks,
        "git": {"idlm": _of_package(), "working_directory": revision(Path.cwd())},
        "model": config.model.path or "from scratch",
        "fingerprint": fingerprint,
        "steps": [stage.steps for stage in config.stages],
        "data": {
            name: {"sha256": files[name]["digest"], "bytes": files[name]["size"]}
            if name in files
            else digest(path)
            for name, path in _read(config).items()
        },
    }
    entries = [*starts(file.parent), entry]
    with writing(file):
        replace_text(file, json.dumps(entries, indent=1) + "\n")


def starts(folder: Path) -> list[dict[str, Any]]:
    """The entries of a run's environment.json; none if there is no such file."""
    file = folder / ENVIRONMENT
    entries: list[dict[str, Any]] = []
    if file.exists():
        entries = json.loads(file.read_text(encoding="utf-8"))
    return entries


def _read(config: TrainConfig) -> dict[str, Path | None]:
    """The files that the data came from, by name; None for a dataset."""
    data, paths = config.data, config.data.path or ()
    if data.source == "self":
        paths = str(Path(config.output_dir) / "responses")
    of_list = (paths,) if isinstance(paths, str) else paths
    names = [p.path if isinstance(p, WeightedPath) else p for p in of_list]
    read: dict[str, Path | None] = {}
    for name in names:
        files = Tables((name,)).files()
        read.update((str(file), file) for file in files)
        if not files:
            read[name] = None
    return read


def digest(file: Path | None) -> dict[str, Any] | None:
    """What identifies the bytes of a file."""
    if file is None:
        return None
    with file.open("rb") as opened:
        sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
    return {"sha256": sha256, "bytes": file.stat().st_size}


def _of_package() -> dict[str, Any] | None:
    """The revision of idlm, if git tracks the files that run."""
    folder = Path(idlm.__file__).parent
    tracked = _git(folder, "ls-files", "--error-unmatch", "__init__.py")
    return None if tracked is None else revision(folder)


def revision(folder: Path) -> dict[str, Any] | None:
    """The commit of the clone that a folder is in, and whether tracked files differ from it; None
    if it is in none, or there is no git."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit, "dirty": bool(_git(folder, "status", "--porcelain", "-uno"))}


def _git(folder: Path, *words: str) -> str | None:
    command = ["git", "-C", str(folder), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()

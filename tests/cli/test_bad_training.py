"""Broken data, configs, models and folders: one line that names the value and the fix, exit status
2, and nothing that was there is changed."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import yaml
from filelock import FileLock
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from idlm.cli import app
from tests.waiting import HANG_SECONDS

ROW = {"prompt": "Mia has 3", "response": " apples."}
CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]}
ROWS = 6
NAN = float("nan")
MOST_BYTES = 30_000


@dataclass
class Place:
    """A run before it starts; its files are written by `ready`."""

    folder: Path
    checkpoint: Path
    tree: dict[str, Any] = field(default_factory=dict)
    data: bytes = b"".join(json.dumps(ROW).encode() + b"\n" for _ in range(ROWS))
    name: str = "data.jsonl"
    config: str | None = None

    def __post_init__(self) -> None:
        self.tree = {
            "output_dir": str(self.folder / "run"),
            "threads": 1,
            "device": "cpu",
            "batch_size": 2,
            "stages": [{"steps": 1, "block_size": 2}],
            "lora": {"rank": 2, "targets": ["q_proj"]},
            "model": {"path": str(self.checkpoint / "base")},
            "data": {"source": "jsonl", "held_out": 1},
            "optimizer": {"warmup": 0},
        }

    @property
    def mask(self) -> int:
        """The MASK id of the model."""
        tokenizer = json.loads((self.checkpoint / "base" / "tokenizer_config.json").read_text())
        return load_tokens(self.checkpoint / "base")[tokenizer["mask_token"]]

    def model(self) -> Path:
        """The run's own copy of the model."""
        folder = self.folder / "model"
        if not folder.exists():
            shutil.copytree(self.checkpoint / "base", folder)
        self.tree["model"]["path"] = str(folder)
        return folder

    def ready(self) -> list[str]:
        """Write the files; returns the command."""
        (self.folder / self.name).write_bytes(self.data)
        self.tree["data"].setdefault("path", str(self.folder / self.name))
        text = yaml.safe_dump(self.tree) if self.config is None else self.config
        (self.folder / "run.yaml").write_text(text)
        return ["train", str(self.folder / "run.yaml")]

    def contents(self) -> dict[str, bytes]:
        """All files that are there."""
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in files}


def load_tokens(folder: Path) -> dict[str, int]:
    """The added tokens of a tokenizer."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    return {token["content"]: token["id"] for token in tokenizer["added_tokens"]}


Change = Callable[[Place], object]


def row(*more: object) -> Change:
    """Rows after the good ones, as JSON or as text."""

    def change(place: Place) -> None:
        for one in more:
            text = one if isinstance(one, str) else json.dumps(one)
            place.data += text.encode() + b"\n"

    return change


def raw(data: bytes, name: str = "data.jsonl") -> Change:
    """The whole data file."""

    def change(place: Place) -> None:
        place.data, place.name = data, name

    return change


def keys(**values: object) -> Change:
    """Keys of the config; a__b is b in the section a."""

    def change(place: Place) -> None:
        for key, value in values.items():
            *sections, last = key.split("__")
            node: Any = place.tree
            for name in sections:
                node = node[int(name)] if name.isdecimal() else node.setdefault(name, {})
            node[last] = value

    return change


def config(text: str) -> Change:
    """The text of the config."""
    return lambda place: setattr(place, "config", text)


def file(name: str, content: bytes | Callable[[bytes], bytes]) -> Change:
    """A file of the model."""

    def change(place: Place) -> None:
        path = place.model() / name
        path.write_bytes(content if isinstance(content, bytes) else content(path.read_bytes()))

    return change


def weight(name: str, change_of: Callable[[Tensor], Tensor]) -> Change:
    """A weight of the model."""

    def change(place: Place) -> None:
        path = place.model() / "model.safetensors"
        tensors = load_file(path)
        tensors[name] = change_of(tensors[name])
        save_file(tensors, path, metadata={"format": "pt"})

    return change


def both(*changes: Change) -> Change:
    def change(place: Place) -> None:
        for one in changes:
            one(place)

    return change


def before(place: Place) -> Path:
    """A run that is done, in the folder of the run; returns its checkpoint."""
    result = CliRunner().invoke(app, place.ready())
    assert result.exit_code == 0, result.output
    return place.folder / "run" / "checkpoint-1"


def resumed(spoil: Callable[[Path], object]) -> Change:
    """A run that goes on from a spoilt checkpoint."""

    def change(place: Place) -> None:
        place.tree |= {"save_steps": 1, "stages": [{"steps": 2, "block_size": 2}]}
        before(place)
        shutil.rmtree(place.folder / "run" / "final")
        spoil(place.folder / "run" / "checkpoint-2")
        place.tree["resume"] = True

    return change


def cut(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:40])


def table(columns: dict[str, list[Any]], damage: Callable[[bytes], bytes]) -> Change:
    """A Parquet file, damaged."""
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table(columns), sink)
    return raw(damage(sink.getvalue().to_pybytes()), "data.parquet")


GOOD = {"prompt": ["Mia has 3"] * 50, "response": [" apples."] * 50}
ASKS_ONLY = b"{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
LINE = f"data.jsonl line {ROWS + 1}"
CASES: dict[str, tuple[Change, list[str]]] = {
    # data
    "a row that is cut off": (row('{"prompt": "a"'), [LINE, "not JSON"]),
    "a row that is a list": (row([1, 2]), [LINE, "not an object"]),
    "a prompt that is a number": (row({"prompt": 3, "response": "x"}), [LINE, "prompt"]),
    "an empty response": (row({"prompt": "a", "response": ""}), [LINE, "no response"]),
    "a response that is null": (row({"prompt": "a", "response": None}), [LINE, "no response"]),
    "an empty prompt": (row({"prompt": "", "response": "x"}), [LINE, "no tokens"]),
    "ids of another vocabulary": (row({"prompt": [1], "response": [99999]}), [LINE, "99999"]),
    "ids that are no whole numbers": (row({"prompt": [1], "response": [1.5]}), [LINE, "1.5"]),
    "ids of another tokenizer": (
        row({"prompt": [5], "response": [7, 8], "response_text": "zzzz"}),
        [LINE, "'zzzz'", "another tokenizer"],
    ),
    "messages without an answer": (
        row({"messages": [{"role": "user", "content": "x"}]}),
        [LINE, "response"],
    ),
    "MASK in a prompt": (
        lambda place: row({"prompt": [place.mask], "response": [4]})(place),
        [LINE, "MASK token"],
    ),
    "MASK in a response": (
        lambda place: row({"prompt": [4], "response": [place.mask, 4]})(place),
        [LINE, "MASK token"],
    ),
    "a template without answers": (
        both(row(CHAT), file("chat_template.jinja", ASKS_ONLY)),
        ["chat template", "no assistant turns"],
    ),
    "bytes that are not UTF-8": (raw(b'{"prompt":"a","response":"\xff"}\n'), ["not UTF-8"]),
    "a byte order mark inside": (row("\ufeff" + json.dumps(ROW)), [LINE, "BOM"]),
    "half of a surrogate pair": (row('{"prompt": "a", "response": "\\ud800"}'), ["\\ud800"]),
    "an empty file": (raw(b""), ["0 rows"]),
    "responses of one token": (
        raw(b'{"prompt": [5, 6], "response": [7]}\n' * ROWS),
        ["all responses to train on have one token", "data.jsonl line 1"],
    ),
    "one token held out": (
        row({"prompt": [5], "response": [7]}),
        ["all responses held out have one token", LINE],
    ),
    "fewer rows than are held out": (keys(data__held_out=99), ["data.held_out is 99"]),
    "a folder without rows": (
        lambda place: ((place.folder / "e").mkdir(), keys(data__path=f"{place.folder}/e")(place)),
        ["/e", ".jsonl"],
    ),
    "no such file": (keys(data__path="/nowhere/rows.jsonl"), ["/nowhere/rows.jsonl"]),
    "a file of another kind": (raw(b"a,b\n1,2\n", "data.csv"), ["data.csv", ".parquet"]),
    "a table that is cut off": (table(GOOD, lambda b: b[: len(b) // 2]), ["data.parquet"]),
    "a table with broken pages": (
        table(GOOD, lambda b: b[:20] + b"\xff" * 40 + b[60:]),
        ["data.parquet"],
    ),
    "a table of other columns": (table({"a": [1, 2]}, bytes), ["data.parquet row 1", "prompt"]),
    "a prompt beyond the context": (
        row({"prompt": "a " * 500, "response": "x"}),
        [LINE, "501 tokens", "160"],
    ),
    # config
    "not YAML": (config("stages: ["), ["run.yaml", "not YAML"]),
    "a config that is a list": (config("- 1"), ["run.yaml", "list"]),
    "a missing key": (lambda place: place.tree.pop("stages"), ["stages is missing"]),
    "an unknown key": (keys(optimizer__rate=1), ["unknown key optimizer.rate", "lr"]),
    "negative steps": (keys(stages__0__steps=-3), ["stages.0.steps is -3"]),
    "a block of 0": (keys(stages__0__block_size=0), ["stages.0.block_size is 0"]),
    "rank 0": (keys(lora__rank=0), ["lora.rank is 0"]),
    "a learning rate that is NaN": (keys(optimizer__lr=NAN), ["optimizer.lr is nan"]),
    "a text for a number": (keys(batch_size="many"), ["batch_size is 'many'"]),
    "targets that are not there": (keys(lora__targets=["qkv"]), ["'qkv'", "q_proj"]),
    "an unknown source": (keys(data__source="csv", data__path=None), ["data.source is 'csv'"]),
    # model
    "no such model": (keys(model__path="/nowhere/model"), ["/nowhere/model"]),
    "an adapter as the model": (
        lambda place: keys(model__path=str(place.checkpoint / "lora"))(place),
        ["is an adapter"],
    ),
    "a weight that is NaN": (
        weight("model.layers.1.mlp.up_proj.weight", lambda tensor: tensor * NAN),
        ["model.layers.1.mlp.up_proj.weight", "NaN"],
    ),
    "a weight of another shape": (
        weight("model.norm.weight", lambda tensor: tensor[:7].clone()),
        ["model.norm.weight", "[7]"],
    ),
    "weights that are cut off": (file("model.safetensors", lambda b: b[:9000]), ["9000 bytes"]),
    "a model's config that is not JSON": (file("config.json", b"{"), ["config.json", "JSON"]),
    "a broken tokenizer": (file("tokenizer.json", b"{"), ["tokenizer"]),
    "a broken chat template": (
        both(row(CHAT), file("chat_template.jinja", b"{% for")),
        [LINE, "chat template"],
    ),
    # folders
    "a file in the place of the folder": (
        lambda place: (place.folder / "run").write_text("mine"),
        ["output_dir", "run"],
    ),
    "a folder that cannot be made": (keys(output_dir="/proc/mine/run"), ["/proc/mine/run"]),
    "a folder that cannot be written": (keys(output_dir="/proc/self"), ["/proc/self"]),
    "a second run in a folder": (before, ["holds checkpoint-1", "resume"]),
    "another config for the same run": (
        both(before, keys(lora__rank=3, resume=True)),
        ["lora.rank was 2"],
    ),
    "a checkpoint without its state": (resumed(cut("state.json")), ["state.json"]),
    "a checkpoint without its weights": (
        resumed(cut("adapter_model.safetensors")),
        ["adapter_model.safetensors"],
    ),
    "a run whose config is broken": (
        resumed(lambda folder: (folder.parent / "config.yaml").write_text("a: [")),
        ["config.yaml", "not YAML"],
    ),
    "a finished model without its run": (
        lambda place: (
            (place.folder / "run" / "final").mkdir(parents=True),
            (place.folder / "run" / "final" / "mine").write_text("x"),
        ),
        ["holds 'final'"],
    ),
}


DISTILL: dict[str, tuple[str, list[str]]] = {
    "a broken row": ('{"prompt": "a"}\n{"prompt": 3}\n', ["prompts.jsonl line 2", "prompt"]),
    "messages of no one": ('{"messages": [{"content": "x"}]}\n', ["prompts.jsonl line 1"]),
    "a prompt beyond the context": (
        json.dumps({"prompt": "a " * 500}),
        ["prompts.jsonl line 1", "160"],
    ),
    "a row without a prompt": ('{"question": "x"}\n', ["prompts.jsonl line 1", "no prompt"]),
}


@pytest.mark.parametrize("case", DISTILL)
def test_distill(case: str, checkpoint: Path, tmp_path: Path) -> None:
    text, words = DISTILL[case]
    (tmp_path / "prompts.jsonl").write_text(text)
    out = tmp_path / "rows"
    given = [str(checkpoint / "base"), str(tmp_path / "prompts.jsonl"), "-o", str(out)]
    refused(["distill", *given], words)
    assert not out.exists()


def test_distill_leaves_alone_what_others_wrote(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "rows").mkdir()
    mine = tmp_path / "rows" / "rows-00000.jsonl"
    mine.write_text('{"mine": 1}\n')
    given = [str(checkpoint / "base"), str(tmp_path / "prompts.jsonl"), "-o", str(mine.parent)]
    refused(["distill", *given], ["rows", "distill.json"])
    assert mine.read_text() == '{"mine": 1}\n'
    with FileLock(tmp_path / "other" / ".lock"):
        refused(["distill", *given[:3], str(tmp_path / "other")], ["another run writes"])


def on_a_full_disk(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command whose files cannot be longer than some bytes."""

    def fill() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (MOST_BYTES, MOST_BYTES))

    program = [sys.executable, "-c", "from idlm.cli import app; app(prog_name='idlm')"]
    return subprocess.run(
        [*program, *command],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        preexec_fn=fill,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_distill_on_a_full_disk_keeps_its_rows(checkpoint: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"Mia has {number}\n" for number in range(9)))
    options = ["--num-samples", "9", "--max-tokens", "100", "--threads", "1"]
    keep = ["--keep-truncated", "--keep-repetitive", "-o", str(tmp_path / "rows")]
    command = ["distill", str(checkpoint / "base"), str(prompts), *options, *keep]
    done = on_a_full_disk(command)
    assert done.returncode == 2, done.stderr
    message = done.stderr.splitlines()[0]
    assert message.startswith("error: cannot write") and "rows-00000.jsonl" in message, message
    written = (tmp_path / "rows" / "rows-00000.jsonl").read_bytes()
    assert len(written) == MOST_BYTES
    again = CliRunner().invoke(app, [*command, "--json"])
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["rows"] == 81 and json.loads(again.stdout)["resumed"] > 0


@pytest.mark.parametrize("case", CASES)
def test_training(case: str, checkpoint: Path, tmp_path: Path) -> None:
    change, words = CASES[case]
    place = Place(tmp_path, checkpoint)
    change(place)
    command = place.ready()
    there = place.contents()
    refused(command, words)
    if place.tree.get("resume"):
        del there["run/config.yaml"]  # which says now that the run was resumed
    left = place.contents()
    assert {name: left.get(name) for name in there} == there, "something was overwritten"
    new = left.keys() - there.keys()
    assert not any(name.startswith(("run/final", "run/checkpoint")) for name in new)


def padded(line: dict[str, Any], bytes_: int) -> str:
    """A JSON object of so many bytes."""
    return json.dumps(line | {"x": "x" * (bytes_ - len(json.dumps(line | {"x": ""})))})


@contextmanager
def full_disk(most: int) -> Iterator[None]:
    """No file of this process may be longer than `most` bytes; Python ignores SIGXFSZ."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


FULL = {
    # what the run's folder holds before, as an earlier start left it; and what cannot be written
    "the config": ("config.yaml", None, 100),
    "the environment": ("environment.json", f"[{padded({}, MOST_BYTES)}]\n", MOST_BYTES),
    "figures, kept": ("metrics.jsonl", padded({"step": 0}, MOST_BYTES) + "\n", MOST_BYTES),
    "figures, added": ("metrics.jsonl", padded({"step": 0}, MOST_BYTES - 9) + "\n", MOST_BYTES),
}


@pytest.mark.parametrize("case", FULL)
def test_training_on_a_full_disk(case: str, checkpoint: Path, tmp_path: Path) -> None:
    name, held, most = FULL[case]
    place = Place(tmp_path, checkpoint)
    file = tmp_path / "run" / name
    file.parent.mkdir()
    if held is not None:
        file.write_text(held)
    command = [*place.ready(), "--log_steps=1"]
    with full_disk(most):
        refused(command, ["cannot", name if held else "output_dir", "File too large"])
    left = file.read_text() if file.exists() else None
    assert left == held if held is None else (left or "").startswith(held)
    assert not {
        p.name for p in file.parent.iterdir() if p.name.startswith((".conf", ".env", ".met"))
    }


def refused(command: list[str], words: list[str]) -> None:
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stdout == ""
    *log, error = result.stderr.splitlines()
    assert error.startswith("error: ") and all(word in error for word in words), result.stderr
    assert all(line.startswith(("the run is", "step ")) for line in log), result.stderr


def test_a_byte_order_mark_at_the_start_is_none_of_the_text(
    checkpoint: Path, tmp_path: Path
) -> None:
    place = Place(tmp_path, checkpoint)
    place.data = b"\xef\xbb\xbf" + place.data
    before(place)


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 40

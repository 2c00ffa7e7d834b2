"""An ordinary model has lookup drafts and says so; what cannot be is said before weights are
read."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from idlm import LLM, InputError
from idlm.cli import app
from tests.cli.test_serve import PROGRAM
from tests.waiting import HANG_SECONDS

SHORT = ("--max-tokens", "4", "--seed", "1", "--dtype", "float64")
BENCH = ("--concurrency", "1", "--requests", "2", "--repeats", "1")


SAID = "lookup drafts: "


def run(*arguments: object, text: str | None = None) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)], input=text)


@pytest.fixture(scope="module")
def weightless(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint's base without a MASK token, and without its weights: a command that reads
    them fails."""
    folder = tmp_path_factory.mktemp("weightless") / "base"
    shutil.copytree(checkpoint / "base", folder)
    (folder / "model.safetensors").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["mask_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def only_line(result: Result) -> str:
    (line,) = [line for line in result.stderr.splitlines() if line.startswith(SAID)]
    assert "idlm train" in line and "--adapter" in line
    return line


def test_generate_looks_drafts_up_and_says_so(checkpoint: Path) -> None:
    plain = run("generate", checkpoint / "base", "Tom", *SHORT, "--json")
    assert plain.exit_code == 0 and str(checkpoint / "base") in only_line(plain)
    report = json.loads(plain.stdout)
    assert (report["stride"], report["drafts"]) == (4, "lookup")
    ar = run("generate", checkpoint / "base", "Tom", *SHORT, "--stride", 1, "--json")
    lookup = run("generate", checkpoint / "base", "Tom", *SHORT, "--drafts", "lookup", "--json")
    for told in (ar, lookup):
        assert SAID not in told.stderr, "who asks need not be told"
    results = json.loads(ar.stdout)["results"]
    assert json.loads(ar.stdout)["tpf"] == 1
    for other in (report, json.loads(lookup.stdout)):
        assert other["results"][0]["token_ids"] == results[0]["token_ids"]
    lora = checkpoint / "lora"
    isd = run("generate", checkpoint / "base", "Tom", *SHORT, "--adapter", lora, "--json")
    assert SAID not in isd.stderr and json.loads(isd.stdout)["stride"] == 4
    assert json.loads(isd.stdout)["results"][0]["token_ids"] == results[0]["token_ids"]


def test_chat_and_bench_look_drafts_up_and_say_so(checkpoint: Path) -> None:
    chat = run("chat", checkpoint / "base", *SHORT, text="Tom\n")
    assert chat.exit_code == 0 and only_line(chat)
    bench = run("bench", checkpoint / "base", *BENCH, "--json")
    assert bench.exit_code == 0 and only_line(bench)
    assert [row["mode"] for row in json.loads(bench.stdout)["rows"]] == ["ar", "lookup"]


def test_serve_looks_drafts_up_and_says_so(checkpoint: Path) -> None:
    options = [
        "--port",
        "0",
        "--name",
        "small",
        "--threads",
        "1",
        "--max-num-seqs",
        "2",
        "--kv-memory",
        "32MiB",
    ]
    command, pipe = [*PROGRAM, str(checkpoint / "base"), *options], subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        announced = process.stdout.readline()
        process.terminate()
        _, errors = process.communicate(timeout=HANG_SECONDS)
    assert announced.startswith("idlm serves small at ")
    (line,) = [line for line in errors.splitlines() if line.startswith(SAID)]
    assert "idlm train" in line and "base" in line


@pytest.mark.parametrize(
    "options, asked",
    [
        (("--stride", "4"), "--stride 4"),
        (("--branches", "chain"), "--branches chain"),
        (("--branches", "all", "--stride", "2"), "--branches all"),
        (("--drafts", "masks"), "--drafts masks"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "serve", "chat"])
def test_asking_an_ordinary_model_for_drafts(
    command: str, options: tuple[str, str], asked: str, weightless: Path
) -> None:
    result = run(command, weightless, *(["hi"] if command == "generate" else []), *options)
    assert result.exit_code == 2
    assert asked in result.stderr and "--stride 1" in result.stderr
    assert result.stderr.count("\n") == 1


def test_asking_a_bench_of_an_ordinary_model_for_drafts(weightless: Path) -> None:
    for options in (("--modes", "ar,chain"), ("--simulate-acceptance", "0.9,0.8,0.7")):
        result = run("bench", weightless, *options)
        assert result.exit_code == 2
        assert options[0] in result.stderr and "--modes ar" in result.stderr


EARLY = {
    # case: options, what the message must name
    "no such adapter": (["--adapter", "{name}{dir}/nowhere"], "nowhere"),
    "an adapter that is none": (["--adapter", "{name}{dir}"], "adapter_config.json"),
    "an adapter of other sizes": (["--adapter", "{name}{wide}"], "has shape"),
    "a device that is not there": (["--device", "cuda:63"], "cuda:63"),
    "a device without memory": (["--device", "meta"], "meta"),
    "weights in a type that kernels lack": (
        ["--dtype", "float64", "--weights", "int8"],
        "weights='int8'",
    ),
}
SERVER_ONLY = {
    "hardly any memory": (["--kv-memory", "1KiB"], "kv_memory='1KiB'"),
    "memory for one page": (["--kv-memory", "7KiB"], "kv_memory='7KiB'"),
    "weights beside other kernels": (
        ["--deterministic", "--weights", "bfloat16"],
        "weights='bfloat16'",
    ),
}


@pytest.fixture(scope="module")
def wide(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter for a base with wider layers."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("wide") / "lora"
    shutil.copytree(checkpoint / "lora", folder)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: torch.cat([t, t], dim=-1) for name, t in tensors.items()}, file)
    return folder


@pytest.mark.parametrize(
    "command, case",
    [
        *((command, case) for command in ("generate", "serve", "chat", "bench") for case in EARLY),
        *(("serve", case) for case in SERVER_ONLY),
    ],
)
def test_what_is_said_before_weights_are_read(
    command: str, case: str, weightless: Path, wide: Path, tmp_path: Path
) -> None:
    options, named = (EARLY | SERVER_ONLY)[case]
    names = {"name": "x=" if command == "serve" else "", "dir": tmp_path, "wide": wide}
    filled = [option.format(**names) for option in options]
    prompt = ["hi"] if command == "generate" else []
    result = run(command, weightless, *prompt, *filled)
    assert result.exit_code == 2 and named in result.stderr, result.output
    assert "model.safetensors" not in result.stderr
    assert result.stderr.count("\n") == 1


def test_python_says_it_before_weights_are_read_too(weightless: Path) -> None:
    for options, named in (
        ({"kv_memory": "1KiB"}, "kv_memory"),
        ({"adapters": {"x": weightless / "none"}}, "none"),
        ({"device": "cuda:63"}, "cuda:63"),
        ({"weights": "int8", "dtype": "float64"}, "int8"),
    ):
        with pytest.raises(InputError, match=named):
            LLM(weightless, **options)
    with pytest.raises(InputError, match=r"model\.safetensors"):
        LLM(weightless)

"""Bad input: one line that names the value and the fix, exit status 2, and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from idlm import LLM, InputError, SamplingParams, load
from idlm.cli import app
from idlm.decoding.window import parse_branches
from idlm.models.gated_lora import LoraSpec
from idlm.training.read_config import load_config
from tests.waiting import HANG_SECONDS

COMMANDS: dict[str, tuple[list[str], str]] = {
    # case: the command line ({base}, {lora}, {dir} are filled in), what the message must name
    "unknown command": (["dance"], "dance"),
    "unknown option": (["demo", "--fast"], "--fast"),
    "generate without a model": (["generate"], "MODEL"),
    "generate without a prompt": (["generate", "{base}"], "--prompts"),
    "generate, no such model": (["generate", "{dir}/nowhere", "hi"], "nowhere"),
    "generate, stride 0": (["generate", "{base}", "hi", "--stride", "0"], "stride=0"),
    "generate, stride 65": (["generate", "{base}", "hi", "--stride", "65"], "stride=65"),
    "generate, stride of letters": (["generate", "{base}", "hi", "--stride", "four"], "four"),
    "generate, unknown branches": (["generate", "{base}", "hi", "--branches", "some"], "some"),
    "generate, unknown dtype": (["generate", "{base}", "hi", "--dtype", "int8"], "int8"),
    "generate, unknown device": (["generate", "{base}", "hi", "--device", "tpu9"], "tpu9"),
    "generate, negative temperature": (
        ["generate", "{base}", "hi", "--temperature", "-1"],
        "temperature=-1",
    ),
    "generate, temperature not a number": (
        ["generate", "{base}", "hi", "--temperature", "nan"],
        "temperature=nan",
    ),
    "generate, top_p 0": (["generate", "{base}", "hi", "--top-p", "0"], "top_p=0"),
    "generate, top_p 1.5": (["generate", "{base}", "hi", "--top-p", "1.5"], "top_p=1.5"),
    "generate, top_k -2": (["generate", "{base}", "hi", "--top-k", "-2"], "top_k=-2"),
    "generate, min_p 2": (["generate", "{base}", "hi", "--min-p", "2"], "min_p=2"),
    "generate, penalty 0": (
        ["generate", "{base}", "hi", "--repetition-penalty", "0"],
        "repetition_penalty=0",
    ),
    "generate, no tokens": (["generate", "{base}", "hi", "--max-tokens", "0"], "max_tokens=0"),
    "generate, a seed of 65 bits": (
        ["generate", "{base}", "hi", "--seed", str(2**64)],
        f"seed={2**64}",
    ),
    "generate, bias without a value": (["generate", "{base}", "hi", "--logit-bias", "7"], "'7'"),
    "generate, bias outside the vocabulary": (
        ["generate", "{base}", "hi", "--logit-bias", "99999=1"],
        "99999",
    ),
    "generate, ban outside the vocabulary": (
        ["generate", "{base}", "hi", "--banned-token", "99999"],
        "99999",
    ),
    "generate, relaxed without tau": (
        ["generate", "{base}", "hi", "--verification", "relaxed"],
        "tau=None",
    ),
    "generate, tau without relaxed": (["generate", "{base}", "hi", "--tau", "0.5"], "tau=0.5"),
    "generate, no such adapter": (["generate", "{base}", "hi", "--adapter", "{dir}/none"], "none"),
    "generate, an adapter as the model": (["generate", "{lora}", "hi"], "adapter"),
    "generate, no such prompts file": (
        ["generate", "{base}", "--prompts", "{dir}/none.txt"],
        "none.txt",
    ),
    "generate, prompts of another type": (
        ["generate", "{base}", "--prompts", "{dir}/config.json"],
        "config.json",
    ),
    "generate, empty prompts file": (
        ["generate", "{base}", "--prompts", "{dir}/empty.txt"],
        "empty.txt",
    ),
    "generate, broken line": (
        ["generate", "{base}", "--prompts", "{dir}/broken.jsonl"],
        "broken.jsonl:2",
    ),
    "generate, a line that is no prompt": (
        ["generate", "{base}", "--prompts", "{dir}/other.jsonl"],
        "other.jsonl:1",
    ),
    "generate, prompt longer than the context": (
        ["generate", "{base}", "--prompts", "{dir}/long.jsonl"],
        "500 tokens",
    ),
    "generate, prompt ids outside": (
        ["generate", "{base}", "--prompts", "{dir}/ids.jsonl"],
        "123456",
    ),
    "generate, pickled weights": (["generate", "{dir}/pickled", "hi"], "safetensors"),
    "verify, no such model": (["verify", "{dir}/nowhere"], "nowhere"),
    "verify, unknown rule": (["verify", "{base}", "--verification", "hopeful"], "hopeful"),
    "verify, stride 0": (["verify", "{base}", "--stride", "0"], "stride=0"),
    "verify, adapter for another base": (
        ["verify", "{other}", "--adapter", "{lora}"],
        "fingerprint",
    ),
    "inspect, nothing there": (["inspect", "{dir}/nowhere"], "nowhere"),
    "inspect, not a checkpoint": (["inspect", "{dir}/nothing"], "nothing"),
    "demo, no rounds": (["demo", "--rounds", "0"], "rounds"),
    "demo, stride 99": (["demo", "--stride", "99"], "stride=99"),
    "distill, prompts named before weights are read": (
        ["distill", "{dir}/weightless", "{dir}/none.jsonl", "-o", "{dir}/rows"],
        "none.jsonl",
    ),
    "distill, an option refused before weights are read": (
        ["distill", "{dir}/weightless", "{dir}/fine.txt", "-o", "{dir}/rows", "--stride", "65"],
        "stride=65",
    ),
    "distill, an adapter of another model before weights are read": (
        [
            *("distill", "{dir}/weightless", "{dir}/fine.txt", "-o", "{dir}/rows"),
            *("--adapter", "{dir}/nowhere"),
        ],
        "nowhere",
    ),
    "distill, formats that do not go together before weights are read": (
        [
            *("distill", "{dir}/weightless", "{dir}/fine.txt", "-o", "{dir}/rows"),
            *("--weights", "int8", "--dtype", "float64"),
        ],
        "float64",
    ),
    "train, no such config": (["train", "{dir}/none.yaml"], "none.yaml"),
    "train, not YAML": (["train", "{dir}/broken.yaml"], "broken.yaml"),
    "train, unknown key": (["train", "{dir}/typo.yaml"], "nearest"),
    "train, wrong type": (["train", "{dir}/run.yaml", "--batch_size=many"], "many"),
    "train, unknown override": (
        ["train", "{dir}/run.yaml", "--optimizer.rate=1"],
        "optimizer.rate",
    ),
    "train, no steps": (["train", "{dir}/run.yaml", "--stages=[]"], "stages"),
    "train, no such model": (["train", "{dir}/run.yaml", "--model.path={dir}/nowhere"], "nowhere"),
}


@pytest.fixture(scope="module")
def places(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files that the table names."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty.txt").write_text("\n\n")
    (folder / "fine.txt").write_text("Mia has 3 apples.\n")
    (folder / "weightless").mkdir()
    for file in (checkpoint / "base").glob("*.json"):
        (folder / "weightless" / file.name).write_text(file.read_text())
    (folder / "config.json").write_text("{}")
    (folder / "broken.jsonl").write_text('{"prompt": "fine"}\n{"prompt": \n')
    (folder / "other.jsonl").write_text('{"question": "fine"}\n')
    (folder / "long.jsonl").write_text(json.dumps({"prompt_token_ids": [5] * 500}) + "\n")
    (folder / "ids.jsonl").write_text(json.dumps({"prompt_token_ids": [1, 123456]}) + "\n")
    (folder / "broken.yaml").write_text("stages: [")
    run = {
        "output_dir": str(folder / "run"),
        "stages": [{"steps": 1}],
        "model": {"path": str(checkpoint / "base")},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    (folder / "typo.yaml").write_text(yaml.safe_dump(run | {"batch_sise": 3}))
    (folder / "nothing").mkdir()
    (folder / "pickled").mkdir()
    (folder / "pickled" / "config.json").write_text(
        (checkpoint / "base" / "config.json").read_text()
    )
    (folder / "pickled" / "pytorch_model.bin").write_bytes(b"pickle")
    other = folder / "other"
    model = load(checkpoint / "base")
    model.model.lm_head.weight.data.add_(1.0)
    model.model.save_pretrained(other)
    return {
        "base": str(checkpoint / "base"),
        "lora": str(checkpoint / "lora"),
        "other": str(other),
        "dir": str(folder),
    }


def one_line(text: str) -> str:
    """The message, which must be the only line."""
    assert text.count("\n") == 1 and text.startswith("error: "), text
    assert "Traceback" not in text
    return text


@pytest.mark.parametrize("case", COMMANDS)
def test_commands(case: str, places: dict[str, str]) -> None:
    arguments, named = COMMANDS[case]
    result = CliRunner().invoke(app, [argument.format(**places) for argument in arguments])
    assert result.exit_code == 2, result.output
    assert named in one_line(result.stderr)
    assert result.stdout == ""


@pytest.mark.parametrize(
    "arguments", [["demo", "--stride", "0"], ["generate", "nowhere/at-all", "hi"], ["dance"]]
)
def test_real_processes(arguments: list[str]) -> None:
    program = [sys.executable, "-c", "from idlm.cli import app; app(prog_name='idlm')"]
    result = subprocess.run(
        [*program, *arguments], capture_output=True, text=True, timeout=HANG_SECONDS
    )
    assert result.returncode == 2 and result.stdout == ""
    one_line(result.stderr)


def greedy(**values: object) -> Callable[[Path], object]:
    return lambda _: SamplingParams(**values)  # type: ignore[arg-type]


def generate(prompt: object, **values: object) -> Callable[[Path], object]:
    return lambda folder: LLM(str(folder / "base"), stride=1).generate(
        prompt, SamplingParams(**values)
    )  # type: ignore[arg-type]


CALLS: dict[str, tuple[Callable[[Path], object], str]] = {
    "temperature of letters": (greedy(temperature="hot"), "temperature='hot'"),
    "infinite penalty": (greedy(presence_penalty=float("inf")), "presence_penalty=inf"),
    "fractional top_k": (greedy(top_k=2.5), "top_k=2.5"),
    "true as a number of tokens": (greedy(max_tokens=True), "max_tokens=True"),
    "huge seed": (greedy(seed=2**63), "seed="),
    "bias as a list": (greedy(logit_bias=[1]), "logit_bias=[1]"),
    "bias of letters": (greedy(logit_bias={3: "x"}), "logit_bias[3]"),
    "stop ids as text": (greedy(stop_token_ids="ab"), "stop_token_ids='ab'"),
    "a negative stop id": (greedy(stop_token_ids=(-1,)), "-1"),
    "unknown verification": (greedy(verification="maybe"), "maybe"),
    "branches beyond the stride": (lambda _: parse_branches((0, 7), 4), "7"),
    "an empty prompt": (generate([[]]), "0 tokens"),
    "a prompt of words in a list of ids": (generate([[1, "two"]]), "'two'"),
    "a negative id": (generate([[-4]]), "-4"),
    "a stop id outside the vocabulary": (generate("hi", stop_token_ids=(10**6,)), "1000000"),
    "two params for one prompt": (
        lambda folder: LLM(str(folder / "base"), stride=1).generate(["hi"], [SamplingParams()] * 2),
        "2 sampling_params",
    ),
    "an adapter beside a loaded model": (
        lambda folder: LLM(load(folder / "base"), adapter="x"),
        "adapter='x'",
    ),
    "a dtype nobody has": (lambda folder: load(folder / "base", dtype="float7"), "float7"),
    "rank 0": (lambda _: LoraSpec(0, 1.0, ("q_proj",)), "rank 0"),
    "no targets": (lambda _: LoraSpec(4, 1.0, ()), "targets"),
    "a config that is a folder": (lambda folder: load_config(folder), "config"),
}


@pytest.mark.parametrize("case", CALLS)
def test_public_functions(case: str, checkpoint: Path) -> None:
    call, named = CALLS[case]
    with pytest.raises(InputError) as raised:
        call(checkpoint)
    message = str(raised.value)
    assert named in message and "\n" not in message


def test_the_table_has_at_least_forty_cases() -> None:
    assert len(COMMANDS) + len(CALLS) >= 40

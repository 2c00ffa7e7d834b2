"""Every command does its work and prints one JSON object on stdout."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from idlm.cli import app
from tests.waiting import HANG_SECONDS

ROOT = Path(__file__).parents[2]


def run(*arguments: object, status: int = 0) -> dict[str, Any]:
    """The object that a command prints."""
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == status, result.output
    assert result.stdout.count("\n") == 1
    report = json.loads(result.stdout)
    assert isinstance(report, dict)
    return report


def test_demo_of_a_fixed_plan() -> None:
    fixed = ("--stride", 4, "--branches", "all")
    report = run("demo", "--questions", 1, "--rounds", 1, "--threads", 1, *fixed)
    assert report["identical"] is True
    assert report["tpf"] > 3 and len(report["acceptance"]) == 3
    assert report["plan"] == "all-4: fixed" and list(report["plans"]) == ["all-4"]
    assert ("better" in report) == (report["speedup"] < 1)
    rates = report["isd_tokens_per_second"], report["ar_tokens_per_second"]
    assert report["speedup"] == pytest.approx(rates[0] / rates[1])


def test_demo_in_words() -> None:
    result = CliRunner().invoke(
        app, ["demo", "--questions", "1", "--rounds", "1", "--threads", "1"]
    )
    assert (
        result.exit_code == 0
        and "the same bytes" in result.stdout
        and "The answer is" in result.stdout
    )
    (plan,) = [line for line in result.stdout.splitlines() if line.startswith("plan: ")]
    assert "tok/s" in plan and "(steps by plan: " in plan  # what the planner runs, and why


def test_generate(checkpoint: Path) -> None:
    shared = (
        checkpoint / "base",
        "Mia has 3 apples.",
        "--adapter",
        checkpoint / "lora",
        "--seed",
        5,
        "--max-tokens",
        9,
    )
    isd, ar = run("generate", *shared, "--stride", 3), run("generate", *shared, "--stride", 1)
    assert isd["results"][0]["token_ids"] == ar["results"][0]["token_ids"]
    assert len(isd["results"][0]["token_ids"]) == 9 and ar["forwards"] == 9
    assert isd["results"][0]["seed"] == 5


def test_the_generation_config_gives_what_no_option_gives(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint / "base", tmp_path / "base")
    keys = {"do_sample": False, "max_new_tokens": 7, "suppress_tokens": list(range(4, 200))}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(keys))
    shared = ("generate", tmp_path / "base", "Mia has 3 apples.", "--stride", 1, "--ignore-eos")

    def tokens(*options: object) -> list[int]:
        return list(run(*shared, *options)["results"][0]["token_ids"])

    greedy = tokens()
    assert len(greedy) == 7 and min(greedy) >= 200
    assert greedy == tokens("--temperature", 0) == tokens("--seed", 1)
    sampled = tokens("--temperature", 1, "--seed", 1, "--max-tokens", 9)
    assert len(sampled) == 9 and sampled[:7] != greedy and min(sampled) >= 200
    plain = tokens("--generation-config", "none", "--max-tokens", 40, "--seed", 1)
    assert len(plain) == 40 and min(plain) < 200
    report = run("verify", tmp_path / "base", "--stride", 1, "--dtype", "float64", "--ignore-eos")
    assert report["identical"] and report["compared_tokens"] == 7 * report["prompts"]
    (tmp_path / "base" / "generation_config.json").write_text('{"top_p": 7}')
    shared = (tmp_path / "base", "--stride", 1, "--max-tokens", 3)
    refused = CliRunner().invoke(app, ["verify", *map(str, shared)])
    assert refused.exit_code == 2 and "top_p=7" in refused.stderr
    assert run("verify", *shared, "--generation-config", "none")["compared_tokens"] > 0


def test_generate_reads_every_form_of_prompt(checkpoint: Path, tmp_path: Path) -> None:
    forms = [
        {"prompt": "Tom"},
        {"messages": [{"role": "user", "content": "Tom"}]},
        {"prompt_token_ids": [5, 6]},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(form) + "\n" for form in forms))
    report = run(
        "generate", checkpoint / "base", "--prompts", file, "--stride", 1, "--max-tokens", 3
    )
    lengths = [len(result["prompt_token_ids"]) for result in report["results"]]
    assert (
        lengths[0] == lengths[1] and lengths[2] == 2
    )  # a text goes through the chat template unless --raw


def test_verify(checkpoint: Path) -> None:
    shared = (
        "verify",
        checkpoint / "base",
        "--adapter",
        checkpoint / "lora",
        "--dtype",
        "float64",
        "--max-tokens",
        12,
    )
    for plan in (
        ("--stride", 4),
        ("--stride", 3, "--branches", "chain", "--top-p", 0.8, "--presence-penalty", 0.5),
    ):
        report = run(*shared, *plan)
        assert (
            report["identical"] is True
            and report["compared_tokens"] > 12
            and report["dtype"] == "float64"
        )


def test_verify_says_where_outputs_differ(checkpoint: Path) -> None:
    loose = ("--verification", "relaxed", "--tau", 1e-9, "--stride", 4, "--max-tokens", 12)
    report = run("verify", checkpoint / "base", "--adapter", checkpoint / "lora", *loose, status=1)
    assert report["identical"] is False
    first = report["differences"][0]
    assert first["ar_token"] != first["isd_token"] and first["isd_margin"] < first["ar_margin"]


def test_verify_tests_the_law_of_the_ratio_rule(checkpoint: Path) -> None:
    report = run(
        "verify", checkpoint / "base", "--adapter", checkpoint / "lora", "--verification", "ratio"
    )
    assert report["same_law"] is True and report["statistic"] < report["bound"]


def test_inspect(checkpoint: Path) -> None:
    model, adapter = run("inspect", checkpoint / "base"), run("inspect", checkpoint / "lora")
    assert model["family"] == "qwen3" and model["can_decode_isd"] is False
    assert adapter["adapter_rank"] == 4 and adapter["max_stride"] == 4


def test_train(checkpoint: Path, tmp_path: Path) -> None:
    config = {
        "output_dir": str(tmp_path / "run"),
        "stages": [{"block_size": 1, "steps": 2}],
        "batch_size": 2,
        "eval_steps": 2,
        "save_steps": 2,
        "model": {"path": str(checkpoint / "base")},
        "data": {"held_out": 2, "max_length": 160},
        "lora": {"rank": 2, "alpha": 2, "targets": ["q_proj"]},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    report = run("train", tmp_path / "run.yaml", "--seed=3")
    assert run("inspect", report["output"])["max_stride"] == 2


def test_distill_and_train_on_what_it_wrote(checkpoint: Path, tmp_path: Path) -> None:
    names = ("Mia", "Tom", "Mia", "Ben", "Lily", "Sam")
    (tmp_path / "prompts.txt").write_text("".join(f"{name} has 3.\n" for name in names))
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{\n")
    given = (checkpoint / "base", tmp_path / "prompts.txt", bad, "-o", tmp_path / "rows")
    options = ("--max-tokens", 12, "--num-samples", 2, "--keep-truncated", "--keep-repetitive")
    command = ("distill", *given, *options, "--threads", 1)
    refused = CliRunner().invoke(app, list(map(str, command)))
    assert refused.exit_code == 2 and "bad.jsonl line 1 is not JSON" in refused.stderr
    assert not (tmp_path / "rows").exists()  # all prompts are read before one is answered
    report = run(*command, "--skip-bad-rows")
    found = {key: report[key] for key in ("prompts", "rows", "duplicates", "bad_rows", "dropped")}
    assert found == {"prompts": 5, "rows": 10, "duplicates": 1, "bad_rows": 1, "dropped": {}}
    assert report["tokens"] > 10 and report["resumed"] == 0
    words = CliRunner().invoke(app, [*map(str, command), "--skip-bad-rows"])
    assert words.exit_code == 0
    assert all(line.startswith("responses: ") for line in words.stderr.splitlines())  # if slow
    assert "10 rows of 5 prompts in" in words.stdout
    assert "left out: 1 duplicate prompts, 1 bad rows" in words.stdout
    config = {
        "output_dir": str(tmp_path / "run"),
        "stages": [{"steps": 1}],
        "batch_size": 2,
        "model": {"path": str(checkpoint / "base")},
        "data": {"source": "jsonl", "path": str(tmp_path / "rows"), "held_out": 2},
        "lora": {"rank": 2, "alpha": 2, "targets": ["q_proj"]},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    assert run("train", tmp_path / "run.yaml")["steps"] == 1


def test_version_and_help_come_without_torch() -> None:
    """They must answer before torch could be imported."""
    code = (
        "import sys; from idlm.cli import app; "
        "assert 'torch' not in sys.modules; app(['--version'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG_SECONDS
    )
    assert result.returncode == 0 and result.stdout.startswith("idlm "), result.stderr


def test_the_help_page_is_up_to_date(tmp_path: Path) -> None:
    page = tmp_path / "cli.md"
    command = [
        "idlm.cli",
        "utils",
        "docs",
        "--name",
        "idlm",
        "--title",
        "Command line",
        "--output",
        str(page),
    ]
    subprocess.run(
        [sys.executable, "-m", "typer", *command],
        check=True,
        capture_output=True,
        cwd=ROOT,
        timeout=HANG_SECONDS,
    )
    assert page.read_text() == (ROOT / "docs" / "cli.md").read_text(), "run `make pages`"

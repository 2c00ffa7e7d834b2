"""The config is read strictly, and every error names the key."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml

from idlm.errors import InputError
from idlm.training.config import WeightedPath
from idlm.training.read_config import load_config, parse_config
from idlm.training.strict import as_tree

TREE = {
    "output_dir": "out",
    "stages": [{"steps": 5, "block_size": 2}, {"steps": 7, "block_size": 3}],
    "model": {"path": "m"},
}
CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(TREE))
    return path


def test_defaults_types_and_round_trip(file: Path) -> None:
    config = load_config(file)
    assert config.steps == 12
    assert config.lora.targets == "all-linear"
    assert parse_config(as_tree(config)) == config
    assert parse_config(yaml.safe_load(yaml.safe_dump(as_tree(config)))) == config


def test_a_batch_has_rows_or_tokens_or_both(file: Path) -> None:
    for given, rows, tokens in [
        ([], 16, None),
        (["--batch_size=3"], 3, None),
        (["--batch_tokens=900"], None, 900),
        (["--batch_tokens=900", "--batch_size=3"], 3, 900),
    ]:
        config = load_config(file, given)
        assert (config.batch_rows, config.batch_tokens) == (rows, tokens)
        assert parse_config(as_tree(config)) == config


def test_paths_may_have_weights(file: Path) -> None:
    config = load_config(
        file, ["--data={source: jsonl, path: [{path: a, weight: 1}, {path: b, weight: 0.5}]}"]
    )
    assert config.data.path == (WeightedPath("a", 1.0), WeightedPath("b", 0.5))
    assert parse_config(yaml.safe_load(yaml.safe_dump(as_tree(config)))) == config


def test_targets_are_names_or_all_linear(file: Path) -> None:
    assert load_config(file, ["--lora.targets=[fc1, fc2]"]).lora.targets == ("fc1", "fc2")
    assert load_config(file, ["--lora.targets=all-linear"]).lora.targets == "all-linear"
    with pytest.raises(InputError, match="lora.targets is 'q_proj'; expected all-linear or a list"):
        load_config(file, ["--lora.targets=q_proj"])


def test_stage_is_a_function_of_the_step(file: Path) -> None:
    config = load_config(file)
    assert [config.stage(step).block_size for step in range(14)] == [2] * 5 + [3] * 9


def test_lambda_defaults_by_method(file: Path) -> None:
    full = load_config(file, ["--method=full"])
    assert full.lambda_of(full.stages[0]) == 0.2
    lora = load_config(file)
    assert lora.lambda_of(lora.stages[0]) == 0.0
    auto = load_config(file, ["--method=full", "--stages.0.lambda=auto"])
    assert auto.lambda_of(auto.stages[0]) == "auto"


def test_weights_change_linearly_over_a_stage(file: Path) -> None:
    annealed = ["--stages.1.ce=[1, 0]", "--stages.1.tv=[0, 3]"]
    config = load_config(file, annealed)
    weights = [config.row_weights(step, acceptance=0.0) for step in range(14)]
    assert [w.ce for w in weights] == pytest.approx(
        [1] * 5 + [1 - i / 6 for i in range(7)] + [0, 0]
    )
    assert [w.tv for w in weights] == pytest.approx([0] * 5 + [i / 2 for i in range(7)] + [3, 3])
    assert [stage.soft for stage in config.stages] == [False, True]
    one = load_config(file, ["--stages.0.steps=1", "--stages.0.tv=[0.5, 3]"])
    assert one.row_weights(0, acceptance=0.0).tv == 0.5


def test_lk_mixes_kl_and_tv_by_the_acceptance(file: Path) -> None:
    config = load_config(file, ["--stages.0.kl=2", "--stages.0.tv=0.5", "--stages.0.lk=3"])
    first, later = (config.row_weights(1, acceptance) for acceptance in (0.0, 0.6))
    assert (first.ce, first.kl, first.tv) == (1, 2, 0)
    assert later.kl == pytest.approx(2 * math.exp(-1.8))
    assert later.tv == pytest.approx(0.5 * (1 - math.exp(-1.8)))


def test_overrides(file: Path) -> None:
    overrides = [
        "--optimizer.lr=1e-4",
        "--stages.1.steps=9",
        "--resume=true",
        "--optimizer.betas=[0.8, 0.9]",
        "--threads=null",
    ]
    config = load_config(file, overrides)
    assert config.optimizer.lr == 1e-4
    assert config.optimizer.betas == (0.8, 0.9)
    assert config.stages[1].steps == 9
    assert config.resume is True


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--optimizr.lr=1", ["optimizr", "optimizer"]),
        ("--optimizer.warm_up=1", ["optimizer.warm_up", "nearest known key is optimizer.warmup"]),
        ("--optimizer.momentum=1", ["optimizer.momentum", "the known keys are name, lr, betas"]),
        ("--stages.0.blok_size=2", ["stages.0.blok_size", "stages.0.block_size"]),
        ("--stages.5.steps=2", ["stages.5.steps", "'5'", "2 items"]),
        ("--stages.one.steps=2", ["'one'"]),
        ("--stages.0.steps.x=2", ["--stages.0.steps.x"]),
        ("--stages=[]", ["stages", "at least 1"]),
        ("--stages=3", ["stages", "3", "list"]),
        ("--stages.0.epochs=1", ["stages.0", "steps and epochs", "one of"]),
        ("--stages.0.steps=null", ["stages.0", "no length"]),
        ("--stages.0.steps=0", ["stages.0.steps is 0", "at least 1"]),
        ("--stages.0={tokens: -5}", ["stages.0.tokens is -5", "at least 1"]),
        ("--stages.0={epochs: .inf}", ["stages.0.epochs is inf", "positive"]),
        ("--keep_checkpoints=0", ["keep_checkpoints", "at least 1"]),
        ("--eval_decode=-1", ["eval_decode is -1", "at least 0"]),
        ("--report_to=[wand]", ["report_to.0", "'wand'", "tensorboard or wandb or mlflow"]),
        ("--optimizer=3", ["optimizer", "3", "section"]),
        ("--optimizer.lr=fast", ["optimizer.lr", "'fast'", "float"]),
        ("--optimizer.lr=-1", ["optimizer.lr", "-1", "positive"]),
        ("--optimizer.lr=nan", ["optimizer.lr", "nan"]),
        ("--stages.1.steps=-3", ["stages.1.steps is -3", "at least 1"]),
        ("--stages.0.block_size=0", ["stages.0.block_size is 0", "at least 1"]),
        ("--stages.0.block_size=64", ["stages.0.block_size is 64", "at most 63"]),
        ("--lora.rank=0", ["lora.rank is 0", "at least 1"]),
        ("--lora.alpha=.inf", ["lora.alpha is inf", "positive"]),
        ("--lora.targets=[]", ["lora.targets", "all-linear"]),
        ("--seed=-1", ["seed is -1", "at least 0"]),
        ("--optimizer.warmup=-1", ["optimizer.warmup is -1", "at least 0"]),
        ("--optimizer.weight_decay=.nan", ["optimizer.weight_decay is nan", "at least 0"]),
        ("--optimizer.betas=[0.9, 1]", ["optimizer.betas.1 is 1.0", "at most 0.99999"]),
        ("--output_dir=", ["output_dir is None"]),
        ("--output_dir=''", ["output_dir is empty"]),
        ("--model.path=''", ["model.path is empty"]),
        ("--optimizer.betas=[0.9]", ["optimizer.betas", "list of 2"]),
        ("--optimizer.name=sgd", ["optimizer.name", "'sgd'", "adamw or muon"]),
        ("--batch_size=2.5", ["batch_size", "2.5", "int"]),
        ("--batch_size=true", ["batch_size", "True", "int"]),
        ("--batch_size=0", ["batch_size", "at least 1"]),
        ("--resume=1", ["resume", "1", "bool"]),
        ("--threads=0", ["threads", "at least 1"]),
        (
            "--stages.0.lambda=automatic",
            ["stages.0.lambda", "'automatic'", "float or auto or null"],
        ),
        ("--stages.0.lambda=0.2", ["lambda", "method: lora"]),
        ("--stages.0.tv=.nan", ["stages.0.tv", "nan", "finite"]),
        ("--stages.1.ce=[1, -1]", ["stages.1.ce", "[1.0, -1.0]", "0 or more"]),
        ("--stages.0.kl=[1, 0, 1]", ["stages.0.kl", "a list of 2"]),
        ("--batch_size=0", ["batch_size", "at least 1"]),
        ("--batch_tokens=0", ["batch_tokens", "at least 1"]),
        ("--data.path=x", ["data.path is for data.source: jsonl", "nano"]),
        ("--data={source: jsonl, path: [3]}", ["data.path.0 is 3", "str or a mapping"]),
        ("--data={source: jsonl, path: [{path: a}]}", ["data.path.0.weight is missing"]),
        (
            "--data={source: jsonl, path: [{path: a, weigth: 1}]}",
            ["data.path.0.weigth", "nearest known key is data.path.0.weight"],
        ),
        (
            "--data={source: jsonl, path: [{path: a, weight: 0}]}",
            ["data.path.0.weight is 0.0", "positive"],
        ),
        (
            "--data={source: jsonl, path: [{path: a, weight: 1}, b]}",
            ["data.path", "with a weight and without"],
        ),
        ("--stages.0.lk=-1", ["stages.0.lk", "-1"]),
        ("--stages.0.lk=3", ["stages.0.lk", "stages.0.kl", "stages.0.tv"]),
        ("--stages.0.depth_weights=decay", ["depth_weights", "uniform or exponential or dpace"]),
        ("--stages.0.depth_gamma=0", ["stages.0.depth_gamma", "above 0"]),
        ("--stages.0.dpace_alpha=1.5", ["stages.0.dpace_alpha", "1.5", "at most 1"]),
        ("--stages.0.dpace_alpha=0", ["stages.0.dpace_alpha", "above 0"]),
        ("--data.source=jsonl", ["data.path"]),
        ("--data.temperature=-1", ["data.temperature", "-1"]),
        ("--data.max_length=1", ["data.max_length", "at least 2"]),
        ("--model.path=null", ["model.path", "model.architecture"]),
        ("--objective=ar", ["method", "full"]),
        ("--optimizer.decay=1.5", ["optimizer.decay", "1.5"]),
        ("--model.dtype=float16", ["model.dtype", "bfloat16 or float32 or float64"]),
        ("--batch_size", ["--batch_size", "--key=value"]),
        ("batch_size=3", ["batch_size=3", "--key=value"]),
        ("--batch_size=[", ["--batch_size=[", "YAML"]),
    ],
)
def test_wrong_overrides_are_refused_in_one_line(
    file: Path, override: str, words: list[str]
) -> None:
    with pytest.raises(InputError) as caught:
        load_config(file, [override])
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("text", ["- 1", "a: [", "", "stages: 3"])
def test_wrong_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(InputError):
        load_config(path)


def test_missing_file_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="nowhere.yaml"):
        load_config("nowhere.yaml")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_the_project_own_configs_are_valid(path: Path) -> None:
    assert load_config(path).steps > 0

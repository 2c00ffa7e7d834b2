"""Self-distillation: the model's own responses, the same each time, whatever happens meanwhile."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from idlm.config import EngineConfig
from idlm.decoding import reference
from idlm.engine.build import build_engine
from idlm.engine.engine import Engine
from idlm.errors import InputError
from idlm.models.idlm_model import Idlm
from idlm.models.loading import load
from idlm.nano.tokenizer import train_tokenizer
from idlm.params import SamplingParams
from idlm.training.config import DataConfig
from idlm.training.corpus import corpus
from idlm.training.data import Example
from idlm.training.distill import Recipe, distill, repeats
from idlm.training.prompts import Encoding, Prompts
from idlm.training.shards import shards
from idlm.training.tables import Tables
from tests.training import tiny
from tests.waiting import HANG_SECONDS

PROMPTS = [[3 + at % 7, 4 + at // 7, 5][: 1 + at % 3] for at in range(24)]
PARAMS = SamplingParams(max_tokens=8, logit_bias={2: 3.0})  # 2 ends a response
RECIPE = Recipe(PARAMS, samples=2, shard_rows=7)


def prompts_file(folder: Path, prompts: list[Any], name: str = "prompts.jsonl") -> str:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    return str(folder / name)


def prompts(idlm: Idlm, *names: object, **options: Any) -> Prompts:
    return Prompts(Tables(tuple(map(str, names))).rows, Encoding(idlm), **options)


def engine_of(idlm: Idlm, **options: Any) -> Callable[[], Engine]:
    return lambda: build_engine(idlm, EngineConfig(**{"stride": 1, "threads": 1, **options}))


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in shards(folder) for line in file.read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    files = [file for file in folder.rglob("*.json*") if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def write(folder: Path, recipe: Recipe = RECIPE, given: list[Any] | None = None) -> dict[str, Any]:
    """A distillation with the tiny model in float64."""
    idlm = tiny.model()
    path = prompts_file(folder.parent / "in", PROMPTS if given is None else given)
    return distill(prompts(idlm, path), recipe, folder, engine_of(idlm, max_num_seqs=3))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "out"
    report = write(folder)
    assert len({tuple(ids) for ids in PROMPTS}) == report["prompts"]
    assert report["rows"] + sum(report["dropped"].values()) == 2 * report["prompts"]
    assert report["dropped"]["truncated"] > 3 and report["rows"] > 14  # three shards and drops
    assert report["tokens_per_second"] > 0 and report["tpf"] == 1
    return folder


def test_rows_are_what_the_model_decodes_with_their_seed(whole: Path) -> None:
    idlm = tiny.model()
    ends = idlm.eos_ids
    dropped = [json.loads(one) for one in (whole / "dropped/rows.jsonl").read_text().splitlines()]
    places = sorted((row["index"], row["sample"]) for row in rows(whole) + dropped)
    assert places == [(at, sample) for at in range(len(places) // 2) for sample in range(2)]
    assert len({row["seed"] for row in rows(whole) + dropped}) == len(places)
    for row in rows(whole) + dropped:
        bias = {"2": 3.0}
        assert row["sampling"] == {"temperature": 1.0, "max_tokens": 8, "logit_bias": bias}
        assert row["model"] == "tiny" and len(row["fingerprint"]) == 64
        ar = reference.ar(idlm.forward, row["prompt"], PARAMS, idlm.mask_id, ends, row["seed"])
        assert row["response"] == ar.tokens
        truncated = row["response"][-1] not in ends
        assert row["finish_reason"] == ("length" if truncated else "stop")
        assert row.get("reason") == ("truncated" if truncated else None)


@pytest.mark.parametrize("share", range(0, 1000, 230))
def test_a_run_cut_off_anywhere_goes_on_to_the_same_files(
    whole: Path, tmp_path: Path, share: int
) -> None:
    """All rows in the order of their writing are cut after a share of their bytes."""
    lines = [(row, "rows", line) for row, line in numbered(shards(whole))]
    lines += [(row, "dropped", line) for row, line in numbered([whole / "dropped/rows.jsonl"])]
    lines.sort()
    left = sum(len(line) for _, _, line in lines) * share // 1000
    folder = tmp_path / "out"
    (folder / "dropped").mkdir(parents=True)
    (folder / "distill.json").write_bytes((whole / "distill.json").read_bytes())
    kept = 0
    for _, kind, line in lines:
        name = f"rows-{kept // 7:05}.jsonl" if kind == "rows" else "dropped/rows.jsonl"
        if left > 0:
            with (folder / name).open("ab") as file:
                file.write(line[:left])
        kept, left = kept + (kind == "rows"), left - len(line)
    report = write(folder)
    assert contents(folder) == contents(whole)
    assert (report["resumed"] > 0) == (share > 0)


def numbered(files: list[Path]) -> list[tuple[tuple[int, int], bytes]]:
    found = [line for file in files for line in file.read_bytes().splitlines(keepends=True)]
    return [((row["index"], row["sample"]), line) for line in found if (row := json.loads(line))]


def killed(folder: Path) -> None:
    """Run in a process of its own: kill -9 children at random places until none is left to kill."""
    torch.set_num_threads(1)
    rng, kills = random.Random(time.time_ns()), 0
    for attempt in range(9):
        before = written(folder)
        child = os.fork()
        if child == 0:
            write(folder)
            os._exit(0)
        more = rng.choice([0, 1, 200, 1500, 4000])
        ended = 0
        while not ended and (attempt == 8 or written(folder) < before + more):
            ended, status = os.waitpid(child, os.WNOHANG)
            time.sleep(0.001)
        if ended:
            assert status == 0
            break
        time.sleep(rng.random() * 0.01)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        kills += os.WIFSIGNALED(status)
    print(kills)


def written(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.jsonl")) if folder.exists() else 0


def test_kill_9_loses_and_doubles_no_row(whole: Path, tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from tests.training.test_distill import killed; "
    code += "killed(Path(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0
    assert contents(tmp_path / "out") == contents(whole)


def test_more_prompts_go_on_where_fewer_ended(whole: Path, tmp_path: Path) -> None:
    idlm = tiny.model()
    path = prompts_file(tmp_path, PROMPTS)
    for number in (3, 5, None, 2):
        given = prompts(idlm, path, number=number)
        report = distill(given, RECIPE, tmp_path / "out", engine_of(idlm))
    assert contents(tmp_path / "out") == contents(whole)
    assert report["tokens"] == 0


def test_what_is_written_is_what_training_reads(whole: Path, tmp_path: Path) -> None:
    idlm = tiny.model()
    config = DataConfig(source="jsonl", path=str(whole), held_out=3)
    data = corpus(config, idlm, 10, tmp_path / "run")
    expected = [(row["prompt"], row["response"]) for row in rows(whole)]
    assert [
        (tiny.prompt(e), tiny.response(e)) for e in [*data.training, *data.held_out]
    ] == expected
    several = replace(config, path=tuple(str(file) for file in shards(whole)))
    other = corpus(several, idlm, 10, tmp_path / "other")
    assert list(other.training) == list(data.training)
    assert list(other.held_out) == list(data.held_out)


def test_a_chat_row_is_trained_on_as_it_was_decoded(checkpoint: Path, tmp_path: Path) -> None:
    """Its ids are read, not its messages, whose tokens may differ."""
    idlm = load(str(checkpoint / "base"))
    forms = [
        {"messages": [{"role": "user", "content": "Tom"}, {"role": "assistant", "content": "x"}]},
        {"question": "Mia", "prompt": "not this"},
    ]
    (tmp_path / "a.jsonl").write_text(json.dumps(forms[0]))
    (tmp_path / "b.jsonl").write_text(json.dumps(forms[1]))
    (tmp_path / "c.txt").write_text("Tom\n\nBen\n")
    recipe = replace(RECIPE, keep_truncated=True, keep_repetitive=True, samples=1)
    for name, encoding, question in [
        ("a.jsonl", Encoding(idlm), "Tom"),
        ("b.jsonl", Encoding(idlm, chat=True, column="question"), "Mia"),
        ("c.txt", Encoding(idlm, chat=True), "Tom"),
    ]:
        given = Prompts(Tables((str(tmp_path / name),)).rows, encoding)
        distill(given, recipe, tmp_path / f"{name}.out", engine_of(idlm))
        first = rows(tmp_path / f"{name}.out")[0]
        user = {"role": "user", "content": question}
        answer = {"role": "assistant", "content": first["messages"][-1]["content"]}
        assert first["messages"] == [user, answer]
        assert first["prompt"] == idlm.encoder.chat([user])
        example = tiny.read(tmp_path / f"{name}.out", idlm)[0]
        assert (tiny.prompt(example), tiny.response(example)) == (
            first["prompt"],
            first["response"],
        )
    lines = rows(tmp_path / "c.txt.out")
    assert [row["messages"][0]["content"] for row in lines] == ["Tom", "Ben"]
    raw = Prompts(Tables((str(tmp_path / "c.txt"),)).rows, Encoding(idlm))
    distill(raw, recipe, tmp_path / "raw", engine_of(idlm))
    first = rows(tmp_path / "raw")[0]
    assert first["prompt_text"] == "Tom" and first["response_text"] and "messages" not in first
    assert first["prompt"] == idlm.encoder.text("Tom", trusted=True)


def test_ids_of_another_tokenizer_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    idlm = load(str(checkpoint / "base"))
    (tmp_path / "in.txt").write_text("Tom\n")
    words = SamplingParams(max_tokens=8, allowed_token_ids=tuple(range(300, 380)))
    recipe = Recipe(words, keep_truncated=True, keep_repetitive=True)
    other = replace(idlm, tokenizer=train_tokenizer(vocab_size=300, problems=50))
    for chat in (True, False):
        encoding, out = Encoding(idlm, chat=chat), tmp_path / f"out-{chat}"
        given = Prompts(Tables((str(tmp_path / "in.txt"),)).rows, encoding)
        distill(given, recipe, out, engine_of(idlm))
        assert len(tiny.read(out, idlm)) == 1
        with pytest.raises(InputError, match="line 1: the response's ids are .* another tokenizer"):
            tiny.read(out, other)


def test_drafts_change_no_row(checkpoint: Path, tmp_path: Path) -> None:
    """ISD writes what AR writes."""
    idlm = load(str(checkpoint / "base"), str(checkpoint / "lora"), dtype=torch.float64)
    (tmp_path / "in.txt").write_text("Tom\nBen\nMia has 3 apples.\n")
    recipe = replace(RECIPE, keep_truncated=True, keep_repetitive=True)
    for name, options in [("ar", {"stride": 1}), ("isd", {"stride": 4, "branches": "all"})]:
        given = prompts(idlm, tmp_path / "in.txt")
        report = distill(given, recipe, tmp_path / name, engine_of(idlm, **options))
    assert report["tpf"] > 1
    assert contents(tmp_path / "ar") == contents(tmp_path / "isd")


def test_duplicates_and_bad_rows_are_counted(tmp_path: Path) -> None:
    idlm = tiny.model()
    path = prompts_file(tmp_path, [[3], [3], [99], [4], [], [tiny.MASK], [3]])
    with Path(path).open("a") as file:
        file.write('{\n{"response": [3]}\n[]\n{"text": [3, 4]}\n')
    given = prompts(idlm, path, skip_bad=True)
    report = distill(given, RECIPE, tmp_path / "out", engine_of(idlm))
    assert (report["prompts"], report["duplicates"], report["bad_rows"]) == (2, 2, 7)
    given = prompts(idlm, path, skip_bad=True, dedup=False)
    report = distill(given, RECIPE, tmp_path / "all", engine_of(idlm))
    assert (report["prompts"], report["duplicates"], report["bad_rows"]) == (4, 0, 7)


@pytest.mark.parametrize(
    ("tokens", "share"),
    [
        (list(range(40)), 0.0),
        ([1, 2] * 20, 1 - 2 / 33),
        ([*range(20), *range(20)], 13 / 33),
        ([1] * 7, 0.0),
        ([], 0.0),
    ],
)
def test_repeats(tokens: list[int], share: float) -> None:
    assert repeats(tokens) == pytest.approx(share)


def test_a_response_that_repeats_itself_is_left_out(tmp_path: Path) -> None:
    loop = Recipe(SamplingParams(max_tokens=40, logit_bias={7: 1e4}), keep_truncated=True)
    report = write(tmp_path / "out", loop, [[3]])
    assert (report["rows"], report["dropped"]) == (0, {"repetitive": 1})
    report = write(tmp_path / "kept", replace(loop, keep_repetitive=True), [[3]])
    assert (report["rows"], report["dropped"]) == (1, {})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, "made with seed 0, now it is 1; restore"),
        ({"samples": 3}, "made with samples 2, now it is 3"),
        ({"shard_rows": 9}, "made with shard_rows 7"),
        (
            {"params": SamplingParams(max_tokens=9)},
            r"sampling {'max_tokens': 8, 'temp.*'max_tokens",
        ),
    ],
    ids=lambda value: "".join(value) if isinstance(value, dict) else "",
)
def test_a_folder_of_other_settings_is_left_alone(
    whole: Path, change: dict[str, Any], said: str
) -> None:
    before = contents(whole)
    with pytest.raises(InputError, match=said):
        write(whole, replace(RECIPE, **change))
    assert contents(whole) == before


def test_a_folder_of_other_prompts_is_left_alone(whole: Path, tmp_path: Path) -> None:
    before = contents(whole)
    given = [PROMPTS[0], [9, 9], *PROMPTS[2:]]
    path = prompts_file(tmp_path, given)
    with pytest.raises(InputError, match="sample 0 of prompt 1 where now is .* another prompt"):
        distill(prompts(tiny.model(), path), RECIPE, whole, engine_of(tiny.model()))
    assert contents(whole) == before


def test_a_missing_row_is_noticed(whole: Path, tmp_path: Path) -> None:
    for name, content in contents(whole).items():
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_bytes(content)
    lines = (whole / "rows-00000.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "out" / "rows-00000.jsonl").write_text("".join(lines[:2] + lines[3:]))
    with pytest.raises(InputError, match="give the same prompts in the same order"):
        write(tmp_path / "out")
    (tmp_path / "out" / "rows-00000.jsonl").write_text("".join(lines[:2])[:-9])
    with pytest.raises(InputError, match="rows-00000.jsonl line 2 is no row of a distillation"):
        write(tmp_path / "out")


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with (
        FileLock(tmp_path / "out" / ".lock"),
        pytest.raises(InputError, match="another run writes to"),
    ):
        write(tmp_path / "out")
    (tmp_path / "out" / "rows-00000.jsonl").write_text("mine\n")
    with pytest.raises(InputError, match="holds rows without distill.json; name another folder"):
        write(tmp_path / "out")
    assert (tmp_path / "out" / "rows-00000.jsonl").read_text() == "mine\n"
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write .*; make room or name another folder"):
        write(tmp_path / "file")


def test_a_full_disk_is_one_line_and_the_run_goes_on_later(whole: Path, tmp_path: Path) -> None:
    """A limit of the size of files stands for the disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(InputError, match="cannot write .*rows.*; make room or"):
            write(tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    write(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(whole)


def test_tables_of_parquet(whole: Path, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("datasets")
    from pyarrow import parquet

    table = pyarrow.table({"prompt": PROMPTS, "text": [None] * len(PROMPTS)})
    parquet.write_table(table, tmp_path / "a.parquet")
    idlm = tiny.model()
    distill(prompts(idlm, tmp_path / "a.parquet"), RECIPE, tmp_path / "out", engine_of(idlm))
    assert contents(tmp_path / "out") == contents(whole)
    (tmp_path / "b.parquet").write_text("no table")
    with pytest.raises(InputError, match=r"cannot read .*b.parquet' \(.*; give a Parquet file"):
        list(Tables((str(tmp_path / "b.parquet"),)).rows())


def test_a_dataset_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub cannot be there; what it gives is a streamed dataset."""
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*names: object, **options: object) -> Any:
        asked.append((names, options))
        rows = datasets.Dataset.from_list([{"question": "a"}, {"question": "b"}])
        return rows.to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = list(Tables(("some/name",), "main", "test").rows())
    assert found == [
        ("dataset some/name row 1", {"question": "a"}),
        ("dataset some/name row 2", {"question": "b"}),
    ]
    assert asked == [(("some/name", "main"), {"split": "test", "streaming": True})]


def test_a_dataset_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="no file 'no/such', and the dataset of that name"):
        list(Tables(("no/such",)).rows())


@pytest.mark.parametrize("name", ["a/b/c.jsonl", "no.txt", "x?", "~/nothing/here/at/all"])
def test_names_that_are_nothing(name: str) -> None:
    with pytest.raises(InputError, match=f"cannot read '{name}'".replace("?", r"\?")):
        list(Tables((name,)).rows())


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no .jsonl, .parquet, .txt file"):
        list(Tables((str(tmp_path),)).rows())


def test_a_column_that_is_not_there(tmp_path: Path) -> None:
    path = prompts_file(tmp_path, [[3]])
    given = Prompts(Tables((path,)).rows, Encoding(tiny.model(), column="question"))
    with pytest.raises(InputError, match="line 1 has no 'question'; it has prompt"):
        list(given)


def own(folder: Path, idlm: Idlm, **changes: Any) -> list[Example]:
    """The examples of `data.source: self`."""
    keys = {"source": "self", "examples": 10, "max_tokens": 8, "held_out": 1, **changes}
    data = corpus(DataConfig(**keys), idlm, 10, folder)
    return [*data.training, *data.held_out]


def test_own_responses_are_a_function_of_the_seed(tmp_path: Path) -> None:
    idlm = tiny.model()
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    first = own(tmp_path / "a", idlm)
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == threads
    torch.rand(3)
    assert [tiny.response(e) for e in own(tmp_path / "b", idlm)] == [
        tiny.response(e) for e in first
    ]
    assert contents(tmp_path / "a" / "responses") == contents(tmp_path / "b" / "responses")
    other = own(tmp_path / "c", idlm, seed=1)
    assert not {tuple(tiny.response(e)) for e in first} & {tuple(tiny.response(e)) for e in other}
    assert all(tiny.prompt(e) == [1] and 1 <= len(tiny.response(e)) <= 8 for e in first)
    assert len(first) == 10 and all(2 not in tiny.response(e)[:-1] for e in first)


def test_complete_responses_are_read_without_the_model(tmp_path: Path) -> None:
    idlm = tiny.model()
    first = own(tmp_path, idlm)
    digest = json.loads((tmp_path / "responses/distill.json").read_text())["fingerprint"]
    with torch.no_grad():
        idlm.model.get_input_embeddings().weight.zero_()
    with pytest.raises(InputError, match=f"made with fingerprint '{digest}', now it is"):
        own(tmp_path, idlm)  # another model's
    again = own(tmp_path, tiny.model())
    assert again == first


def test_bad_prompts_of_a_run_are_named(tmp_path: Path) -> None:
    idlm = tiny.model()
    for given, said in [
        ([[3], []], "line 2: the prompt has no tokens"),
        ([[3] * tiny.CONTEXT], "line 1: the prompt has 48 tokens, the limit is 48"),
        ([[3, tiny.MASK]], "line 1: a prompt holds the MASK token"),
    ]:
        path = prompts_file(tmp_path, given)
        with pytest.raises(InputError, match=said):
            own(tmp_path / "run", idlm, prompts=path, examples=None)
    with pytest.raises(InputError, match="data.examples is missing"):
        own(tmp_path / "run", idlm, examples=None)
    with pytest.raises(InputError, match=r"cannot read 'no/where.jsonl'"):
        own(tmp_path / "run", idlm, prompts="no/where.jsonl")
    assert not list((tmp_path / "run").rglob("*.jsonl"))


DEFAULTS: dict[str, dict[str, Any]] = {
    "penalty": {"repetition_penalty": 1.7, "do_sample": False},
    "bans": {"suppress_tokens": [3, 4, 5, 6], "bad_words_ids": [[7], [8]], "do_sample": False},
    "longer": {"min_new_tokens": 6, "eos_token_id": [2, 9, 10, 11, 12], "do_sample": False},
    "nothing transformers alone applies": {"no_repeat_ngram_size": 1, "do_sample": False},
}


@pytest.mark.parametrize("keys", DEFAULTS.values(), ids=DEFAULTS)
def test_own_responses_are_what_the_model_decodes(tmp_path: Path, keys: dict[str, Any]) -> None:
    """With the defaults of its generation config and its ends, and nothing else."""
    idlm = tiny.model()
    idlm.model.generation_config.update(**keys)
    given = [[3], [4, 5, 6, 7], [8, 9, 8]]
    path = prompts_file(tmp_path, given)
    examples = own(tmp_path / "run", idlm, prompts=path, examples=None)
    params = idlm.sampling({"max_tokens": 8})
    assert params.greedy
    for prompt, example in zip(given, examples, strict=True):
        ar = reference.ar(idlm.forward, prompt, params, idlm.mask_id, idlm.eos_ids, 0)
        assert (tiny.prompt(example), tiny.response(example)) == (prompt, ar.tokens)


def test_the_temperature_of_a_run_and_a_length_limit(tmp_path: Path) -> None:
    idlm = tiny.model()
    plain = own(tmp_path / "plain", idlm)
    same = own(tmp_path / "same", idlm, temperature=1.0)
    assert [tiny.response(e) for e in same] == [tiny.response(e) for e in plain]
    short = own(tmp_path / "short", idlm, max_length=4)
    assert [tiny.response(e) for e in short] == [tiny.response(e)[:3] for e in plain]
    idlm = tiny.model()
    idlm.model.generation_config.update(top_k=1, temperature=5.0)
    narrow = own(tmp_path / "narrow", idlm)
    assert len({tuple(tiny.response(e)) for e in narrow}) == 1  # the likeliest each time
    settings = json.loads((tmp_path / "narrow/responses/distill.json").read_text())
    assert settings["sampling"] == {"max_tokens": 8, "temperature": 5.0, "top_k": 1}
    with pytest.raises(InputError, match="'temperature': 5.0, .* now it is"):
        own(tmp_path / "narrow", idlm, temperature=0.5)

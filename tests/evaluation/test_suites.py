"""Every suite reads its published files, asks each item, and grades right and wrong answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from idlm.errors import InputError
from tests.evaluation import suite_files

pytest.importorskip("lm_eval")

from lm_eval.api.model import LM  # noqa: E402

from idlm.evaluation import runner  # noqa: E402
from idlm.evaluation.harness_model import Answer, Ask, Journaled  # noqa: E402
from idlm.evaluation.journal import Journal, key  # noqa: E402
from idlm.evaluation.suites import SUITES, named  # noqa: E402
from idlm.evaluation.tasks import Way, build  # noqa: E402


class Knows(Journaled, LM):  # type: ignore[misc]
    """A model that knows the answers, or none of them; likelihoods favour what is right."""

    tokenizer_name = "none"

    def __init__(self, right: bool) -> None:
        super().__init__()
        self.right = right
        self.start(Journal())

    def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
        return "\n".join(message["content"] for message in chat_history)

    def generate_until(self, requests: Any) -> list[str]:
        return self.answers("generate_until", requests, self._say)

    def _say(self, asks: list[Ask]) -> Any:
        for at, ask in enumerate(asks):
            text = suite_files.answer(ask.arguments[0]) if self.right else "no, it is, Z"
            yield Answer(at, text, {"tokens": 3, "forwards": 2})

    def loglikelihood(self, requests: Any) -> Any:
        return self.answers("loglikelihood", requests, self._score)

    def _score(self, asks: list[Ask]) -> Any:
        for at, ask in enumerate(asks):
            context, continuation = ask.arguments
            said = suite_files.answer(context)
            good = f"({continuation.strip(' ()')})" in said.replace("\\boxed{D}", "(D)")
            good |= ("green" in context) and "tree" in continuation
            good |= ("hard" in context) and "stone" in continuation
            yield Answer(at, [0.0 if good == self.right else -9.0, False], {})

    def loglikelihood_rolling(self, requests: Any) -> Any:
        raise NotImplementedError


def show(label: str, total: int) -> Any:
    return lambda: None


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return suite_files.write(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("generative", [True, False])
def test_every_suite(data: Path, tmp_path: Path, right: bool, generative: bool) -> None:
    way = Way(data, chat=True, generative=generative, run_code=True)
    model = Knows(right)
    report = runner.run(model, list(SUITES.values()), way, tmp_path, {"seed": 0}, show)
    assert list(report["suites"]) == list(SUITES) and len(SUITES) == 15
    for name, found in report["suites"].items():
        suite = SUITES[name]
        if suite.speed:
            assert found["answers"] == 4
            continue
        metrics = found["metrics"]
        main = suite.metrics[-1 if generative or suite.harness is None else 0]
        main = main if "," in main else f"{main},none"
        assert metrics[main]["value"] == float(right), (name, metrics)
        assert metrics[main]["n"] == 2, name
    lines = (tmp_path / "gsm8k.samples.jsonl").read_text().splitlines()
    assert len(lines) == 2 * len({json.loads(line)["filter"] for line in lines})


def test_the_first_items_alone(data: Path, tmp_path: Path) -> None:
    way = Way(data, limit=1, run_code=True)
    found = runner.run(Knows(True), named(["gsm8k", "mt-bench"]), way, tmp_path, {"seed": 0}, show)
    assert found["suites"]["gsm8k"]["metrics"]["exact_match,strict-match"]["n"] == 1
    assert found["suites"]["mt-bench"]["answers"] == 2


def test_what_the_harness_would_choose_by_chance_is_the_same_each_time(data: Path) -> None:
    def orders() -> list[Any]:
        (task,), _ = build(SUITES["gpqa"], Way(data))
        return [document["choice1"] for document in task.eval_docs]

    first = orders()
    assert orders() == first


def test_examples_that_are_not_there(tmp_path: Path) -> None:
    folder = suite_files.write(tmp_path)
    (folder / "gsm8k" / "train.jsonl").unlink()
    with pytest.raises(InputError, match=r"gsm8k shows 5 examples; put a file like \*train\*"):
        build(SUITES["gsm8k"], Way(folder))


def test_options_of_a_task_are_replaced(data: Path) -> None:
    way = Way(data, generation={"max_gen_toks": 7, "do_sample": True, "temperature": 1.0})
    (task,), _ = build(SUITES["gsm8k"], way)
    assert task.config.generation_kwargs["max_gen_toks"] == 7
    assert task.config.generation_kwargs["until"]


def test_a_base_model_sees_examples_and_stops(data: Path) -> None:
    (task,), _ = build(SUITES["mbpp"], Way(data, chat=False, run_code=True))
    texts = [document["text"] for document in task.eval_docs]
    assert len(texts) == 2 and texts[0].count("[DONE]") == 3 and texts[0].endswith("[BEGIN]\n")
    assert task.config.generation_kwargs["until"] == ["[DONE]"]


@pytest.mark.parametrize(
    ("names", "way", "words"),
    [
        (["nothing"], {}, "suite 'nothing' is unknown; use arc-c, mmlu"),
        (["mbpp"], {}, "suite mbpp runs code that the model writes; allow it with --run-code"),
        (["arc-c"], {"scores": False}, "suite arc-c compares likelihoods"),
        (["mathbench"], {"data": None}, "local files only"),
        (["aime-24"], {"data": Path("/nowhere")}, "no data in '/nowhere/aime24'"),
    ],
)
def test_what_cannot_be_asked(
    data: Path, names: list[str], way: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        runner.check(named(names), Way(**{"data": data, **way}))


def test_a_folder_of_other_settings(data: Path, tmp_path: Path) -> None:
    suites, way = named(["aime-25"]), Way(data)
    runner.run(Knows(True), suites, way, tmp_path, {"seed": 0}, show)
    with pytest.raises(InputError, match=r"written with seed=0, and this run has 1; use another"):
        runner.run(Knows(True), suites, way, tmp_path, {"seed": 1}, show)


def test_a_journal_drops_a_line_that_a_kill_cut(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path)
    name = key("generate_until", ("a", {}), 0)
    journal.put(name, "text \ud800", tokens=1)
    journal.put(key("generate_until", ("a", {}), 1), "other")
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:20])
    again = Journal(path)
    assert again.answers == journal.answers and path.read_bytes() == whole

"""Order, batches, and the errors of bad rows."""

from __future__ import annotations

import copy
import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

import idlm.nano.source  # noqa: F401  # registers `source: nano`
from idlm.errors import InputError
from idlm.nano.problems import held_out_problems, is_held_out, problem, training_problems
from idlm.nano.tokenizer import END, train_tokenizer
from idlm.training.config import DataConfig
from idlm.training.corpus import corpus
from idlm.training.data import (
    SOURCES,
    Draw,
    Example,
    Phased,
    chat_examples,
    collate,
    exchange,
    fit,
)
from idlm.training.plan import Drawn
from tests.training import tiny


def test_the_phase_of_a_draw_is_the_same_in_any_batch() -> None:
    examples = tiny.examples(80)
    draws = [Drawn(at, at, one.length) for at, one in enumerate(examples)]
    texts = Phased(examples, seed=3, random_phase=True)
    alone = {at: texts.batch([[one]]).texts.phase[0, 0] for at, one in enumerate(draws)}
    together = texts.batch([draws[at : at + 3] for at in range(0, 80, 3)])
    starts = (together.texts.position == 0) & (together.texts.document >= 0)
    assert together.texts.phase[starts].tolist() == list(alone.values())
    assert together.indices == list(range(80))
    assert {int(phase) % 4 for phase in alone.values()} == {0, 1, 2, 3}
    never = Phased(examples, seed=3, random_phase=False).batch([draws]).texts
    assert set(never.phase.flatten().tolist()) == {0}


def test_collate_pads_on_the_right() -> None:
    batch = collate([[Draw(3, exchange([5], [6, 7]), 9)], [Draw(0, exchange([1, 2], [3, 4]), 2)]])
    texts = batch.texts
    assert texts.tokens.tolist() == [[5, 6, 7, 0], [1, 2, 3, 4]]
    assert texts.document.tolist() == [[0, 0, 0, -1], [0, 0, 0, 0]]
    assert texts.position.tolist() == [[0, 1, 2, 0], [0, 1, 2, 3]]
    assert texts.answer.tolist() == [[-1, 0, 0, -1], [-1, -1, 0, 0]]
    assert texts.phase.tolist() == [[9, 9, 9, 0], [2, 2, 2, 2]] and batch.indices == [3, 0]


def test_collate_packs_documents_with_several_answers() -> None:
    two = Example([1, 2, 3, 4, 5, 6], ((1, 3), (3, 4)))
    batch = collate([[Draw(4, two, 7), Draw(2, exchange([8], [9]), 1)], [Draw(4, two, 3)]])
    texts = batch.texts
    assert texts.tokens.tolist() == [[1, 2, 3, 4, 5, 6, 8, 9], [1, 2, 3, 4, 5, 6, 0, 0]]
    assert texts.document[0].tolist() == [0, 0, 0, 0, 0, 0, 1, 1]
    assert texts.position[0].tolist() == [0, 1, 2, 3, 4, 5, 0, 1]
    assert texts.answer[0].tolist() == [-1, 0, 0, 1, -1, -1, -1, 2]
    assert texts.phase[0].tolist() == [7] * 6 + [1] * 2
    assert batch.indices == [4, 2, 4]
    assert texts.masked.int().sum(1).tolist() == [1, 1]
    assert texts.supervised.int().sum(1).tolist() == [4, 3]


def test_long_responses_are_cut_and_long_prompts_refused() -> None:
    assert fit(exchange([1, 2], [3, 4, 5]), 4) == exchange([1, 2], [3, 4])
    two = Example([1, 2, 3, 4, 5, 6, 7], ((1, 2), (4, 6)))
    assert fit(two, 9) == fit(two, 6) == Example([1, 2, 3, 4, 5, 6], ((1, 2), (4, 6)))
    assert fit(two, 5) == Example([1, 2, 3, 4, 5], ((1, 2), (4, 5)))
    assert fit(two, 4) == Example([1, 2], ((1, 2),))
    for example, word in [
        (exchange([1] * 4, [2], "row 7"), "row 7: the prompt has 4 tokens"),
        (exchange([], [2], "row 7"), "row 7: the prompt has no tokens"),
        (exchange([1], [], "row 7"), "row 7: the response has no tokens"),
    ]:
        with pytest.raises(InputError, match=word):
            fit(example, 4)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": [1], "response": []}', ["line 2", "no response"]),
        ('{"prompt": [1]}', ["line 2", "no response"]),
        ('{"prompt": [], "response": [1]}', ["line 2", "prompt has no tokens"]),
        ('{"response": [1]}', ["line 2", "no prompt"]),
        (
            '{"prompt": [99], "response": [1]}',
            ["line 2", "prompt token 99 is outside the vocabulary 0..22"],
        ),
        ('{"prompt": 3, "response": [1]}', ["line 2", "the prompt"]),
        ('{"prompt": "text", "response": [1]}', ["tokenizer"]),
        ('{"messages": [{"role": "user", "content": "x"}], "response": [1]}', ["tokenizer"]),
        ('{"messages": [], "response": [1]}', ["line 2", "no message"]),
        ("[1, 2]", ["line 2", "not an object"]),
        ("{", ["line 2", "not JSON"]),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, line: str, words: list[str]) -> None:
    path = tmp_path / "data.jsonl"
    row = json.dumps({"prompt": [1], "response": [2, 3]})
    path.write_text("\n".join([row, line, row, row]))
    with pytest.raises(InputError) as caught:
        corpus(DataConfig(source="jsonl", path=str(path), held_out=1), tiny.model(), 10, tmp_path)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_rows_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    good = json.dumps({"prompt": [1], "response": [2, 3]})
    long = json.dumps({"prompt": [1] * tiny.CONTEXT, "response": [2]})
    lines = [
        good,
        "{",
        '{"prompt": [99], "response": [1]}',
        good,
        long,
        "[]",
        '{"prompt": 3}',
        good,
    ]
    path.write_text("\n".join(lines))
    config = DataConfig(source="jsonl", path=str(path), held_out=1, skip_bad_rows=True)
    data = corpus(config, tiny.model(), 10, tmp_path)
    assert (len(data.training), len(data.held_out), data.tally.bad) == (2, 1, 5)
    assert [e.row for e in [*data.training, *data.held_out]] == [
        f"{path} line {n}" for n in (1, 4, 8)
    ]


def test_last_rows_are_held_out(tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "data.jsonl", tiny.examples(10))
    data = corpus(
        DataConfig(source="jsonl", path=str(path), held_out=3), tiny.model(), 10, tmp_path
    )
    assert [tiny.prompt(e) for e in [*data.training, *data.held_out]] == [
        tiny.prompt(e) for e in tiny.examples(10)
    ]
    assert len(data.held_out) == 3
    with pytest.raises(InputError, match="held_out is 10 but there are 10 rows"):
        corpus(DataConfig(source="jsonl", path=str(path), held_out=10), tiny.model(), 10, tmp_path)


def test_nano_examples_are_chats_with_worked_solutions() -> None:
    tokenizer, idlm = train_tokenizer(problems=200), tiny.model()
    idlm.tokenizer = tokenizer
    problems = [problem(0, i) for i in range(5)]
    for example, p in zip(
        chat_examples([(p.question, p.solution) for p in problems], idlm),
        problems,
        strict=True,
    ):
        assert (
            tokenizer.decode(tiny.prompt(example))
            == f"<|im_start|>user\n{p.question}<|im_end|>\n<|im_start|>assistant\n"
        )
        assert tokenizer.decode(tiny.response(example)) == p.solution + END
    stream = training_problems(0)
    assert not any(is_held_out(next(stream).question) for _ in range(200))


def test_the_registered_source_is_the_projects_problems(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    idlm = tiny.model()
    idlm.tokenizer = tokenizer
    idlm.model.config.max_position_embeddings = 600
    data = corpus(DataConfig(source="nano", examples=6, held_out=3, seed=5), idlm, 10, tmp_path)
    answers = [tokenizer.decode(tiny.response(e)) for e in data.training]
    assert answers == [p.solution + END for p in islice(training_problems(5), 6)]
    assert [tokenizer.decode(tiny.response(e)) for e in data.held_out] == [
        p.solution + END for p in held_out_problems(3)
    ]
    assert SOURCES["nano"].tokenizer is train_tokenizer


def test_an_unknown_source_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="data.source is 'nanno'; expected nano or jsonl or self"):
        corpus(DataConfig(source="nanno"), tiny.model(), 10, tmp_path)


@pytest.mark.parametrize("eos, turn, plain, chat", [
    ("<|endoftext|>", "<|im_end|>", 0, 2),
    ("<|im_end|>", "<|im_end|>", 2, 2),
    ("<|im_end|>", "", 2, 2),
    (None, "<|im_end|>", 2, 2),
    (None, "", 7, 7),
])  # fmt: skip
def test_a_response_ends_with_what_ends_it_when_the_model_decodes(
    eos: str | None,
    turn: str,
    plain: int,
    chat: int,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    idlm = tiny.model()
    idlm.tokenizer = copy.deepcopy(tokenizer)
    idlm.tokenizer.eos_token = eos
    idlm.tokenizer.chat_template = "{{ messages[-1].content }}" + turn
    idlm.model.generation_config.eos_token_id = 7
    rows: list[dict[str, Any]] = [
        {"prompt": "\n", "response": "\n"},
        {"messages": [{"role": "user", "content": "\n"}], "response": "\n"},
        {"prompt": [5], "response": [6]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples = tiny.read(path, idlm)
    assert [tiny.response(e)[-1] for e in examples] == [plain, chat, 6]
    assert {plain, chat} <= idlm.eos_ids
    (example,) = chat_examples([("\n", "\n")], idlm)
    assert tiny.response(example)[-1] == chat


def test_a_model_without_an_end_trains_without_one(tmp_path: Path) -> None:
    idlm = tiny.model()
    idlm.tokenizer = train_tokenizer(problems=50)
    idlm.tokenizer.eos_token = idlm.tokenizer.chat_template = None
    idlm.model.generation_config.eos_token_id = idlm.model.config.eos_token_id = None
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": [5], "response": "abc"}))
    (example,) = tiny.read(path, idlm)
    assert tiny.response(example) == idlm.tokenizer("abc").input_ids

"""Several answers in one document, and templates that do not allow it."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from idlm.errors import InputError
from idlm.models.idlm_model import Idlm
from idlm.models.loading import load
from idlm.training.config import DataConfig
from idlm.training.corpus import Corpus, corpus
from idlm.training.data import Draw, Example, collate, row_example, row_examples
from idlm.training.objective import Objective, Wanted
from idlm.training.rows import read_row
from tests.training import tiny

END = "<|im_end|>"
OPENED = "{% if add_generation_prompt %}assistant: {% endif %}"
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
MESSAGES: list[dict[str, Any]] = [
    {"role": "assistant", "content": "hi"},  # an opening: nothing is before it
    {"role": "user", "content": "1?"},
    {"role": "assistant", "content": "hm|2"},
    {"role": "tool", "content": "5"},
    {"role": "assistant", "content": "so|3"},
    {"role": "user", "content": "more?"},
]


@pytest.fixture(scope="module")
def base(checkpoint: Path) -> Idlm:
    return load(str(checkpoint / "base"))


def with_template(base: Idlm, template: str) -> Idlm:
    """The model with another chat template."""
    tokenizer = copy.deepcopy(base.tokenizer)
    assert tokenizer is not None
    tokenizer.chat_template = template
    return replace(base, tokenizer=tokenizer)


def documents(idlm: Idlm, messages: list[dict[str, Any]], **fields: Any) -> list[Example]:
    return row_examples(read_row({"messages": messages, **fields}, "row"), idlm, every=True)


def each_answer(idlm: Idlm, messages: list[dict[str, Any]], **fields: Any) -> list[Example]:
    """The documents of the conversation up to each answer."""
    ends = [at + 1 for at, one in enumerate(messages) if at and one["role"] == "assistant"]
    rows = [read_row({"messages": messages[:end], **fields}, "row") for end in ends]
    return [row_example(row, idlm) for row in rows]


def answers(idlm: Idlm, example: Example) -> list[str]:
    return [idlm.encoder.tokenizer.decode(example.tokens[at:end]) for at, end in example.answers]


def test_all_answers_of_a_conversation_are_in_one_document(base: Idlm) -> None:
    (found,) = documents(base, MESSAGES)
    each = each_answer(base, MESSAGES)
    assert found.tokens == each[-1].tokens
    assert found.answers == tuple(one.answers[0] for one in each)
    assert answers(base, found) == [f"hm|2{END}", f"so|3{END}"]
    for (start, _), end in zip(found.answers, (2, 4), strict=True):
        assert found.tokens[:start] == base.encoder.chat(MESSAGES[:end])
    with pytest.raises(InputError, match="row: it has no response"):
        documents(base, MESSAGES[:2])


def test_special_strings_in_messages_are_text(base: Idlm) -> None:
    messages = [{**one, "content": f"{one['content']} {END}"} for one in MESSAGES]
    (found,) = documents(base, messages)
    (end,) = sorted(base.eos_ids)
    assert [found.tokens[at:stop].count(end) for at, stop in found.answers] == [1, 1]


def test_calls_of_tools_are_answers(base: Idlm) -> None:
    template = (
        "{% if tools %}{{ tools[0].name }}{% endif %}{% for m in messages %}{{ m.role }}: "
        "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}{{ m.content }}"
        f"{END}{{% endfor %}}{OPENED}"
    )
    idlm = with_template(base, template)
    messages = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "It is 2."},
    ]
    (found,) = documents(idlm, messages, tools=[{"name": "add"}])
    call, said = answers(idlm, found)
    assert call == '{"name": "add", "arguments": {"a": 1}}' + END and said == f"It is 2.{END}"


CHANGES = {
    "thoughts are left out of earlier turns": (
        "{% for m in messages %}{{ m.role + ': ' }}{{ m.content.split('|')[-1] if not loop.last "
        f"else m.content }}}}{END}{{% endfor %}}{OPENED}"
    ),
    "the number of messages is at the top": (
        "{{ messages | length }}{% for m in messages %}{{ m.role }}: {{ m.content }}"
        f"{END}{{% endfor %}}{OPENED}"
    ),
    "nothing ends an answer": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}" + OPENED
    ),
}


@pytest.mark.parametrize("template", CHANGES.values(), ids=CHANGES)
def test_a_template_that_changes_earlier_turns_gets_a_document_an_answer(
    base: Idlm, template: str
) -> None:
    idlm = with_template(base, template)
    found = documents(idlm, MESSAGES)
    assert found == each_answer(idlm, MESSAGES)
    for example, end in zip(found, (2, 4), strict=True):
        assert tiny.prompt(example) == idlm.encoder.chat(MESSAGES[:end])
        text = idlm.encoder.tokenizer.decode(tiny.response(example), skip_special_tokens=True)
        assert text.strip() == MESSAGES[end]["content"]


def test_one_pass_is_the_sum_of_a_document_an_answer(checkpoint: Path) -> None:
    idlm = load(str(checkpoint / "base"), dtype=torch.float64)
    whole, each = documents(idlm, MESSAGES), each_answer(idlm, MESSAGES)
    objective = Objective(idlm, trains_clean=True)
    wanted = Wanted(3, clean=True, soft=True)

    def terms(examples: list[Example]) -> torch.Tensor:
        texts = collate([[Draw(0, one, 2)] for one in examples]).texts
        return torch.stack([term.detach().double() for term in objective(texts, wanted)])

    torch.testing.assert_close(terms(whole), terms(each), rtol=1e-6, atol=0)


MARKED = (
    "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}ANSWER"
    "{% else %}{{ m.content }}" + END + "{% endif %}\n{% endfor %}" + OPENED.replace(": ", ":")
)
MARKS = {
    "the answer and its end": (
        "{% generation %}{{ m.content }}" + END + "{% endgeneration %}",
        [f"hm|2{END}", f"so|3{END}"],
    ),
    "without its end": (
        "{%- generation -%}{{ m.content }}{% endgeneration %}" + END,
        [f"hm|2{END}", f"so|3{END}"],
    ),
    "a part of it": (
        "{{ m.content[:3] }}{% generation %}{{ m.content[3:] }}" + END + "{% endgeneration %}",
        [f"2{END}", f"3{END}"],
    ),
    "two parts": (
        "{% generation %}{{ m.content[:2] }}{% endgeneration %}{{ m.content[2] }}"
        "{% generation %}{{ m.content[3:] }}" + END + "{% endgeneration %}",
        ["hm", f"2{END}", "so", f"3{END}"],
    ),
    "one answer of two": (
        "{% if loop.last %}{% generation %}{{ m.content }}" + END + "{% endgeneration %}"
        "{% else %}{{ m.content }}" + END + "{% endif %}",
        [f"so|3{END}"],
    ),
}


@pytest.mark.parametrize("marks", MARKS)
def test_generation_marks_say_what_the_model_wrote(base: Idlm, marks: str) -> None:
    template, expected = MARKS[marks]
    idlm = with_template(base, MARKED.replace("ANSWER", template))
    (found,) = documents(idlm, MESSAGES[1:5])
    assert answers(idlm, found) == expected
    assert found.tokens == each_answer(idlm, MESSAGES[1:5])[-1].tokens


def test_marks_around_nothing_are_refused(base: Idlm) -> None:
    template = "{{ m.content }}" + END + "{% generation %}{% endgeneration %}"
    idlm = with_template(base, MARKED.replace("ANSWER", template))
    with pytest.raises(InputError, match="row: the chat template marks no token of its answers"):
        documents(idlm, MESSAGES[1:5])


def read(idlm: Idlm, rows: list[list[dict[str, Any]]], folder: Path, **keys: Any) -> Corpus:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in rows))
    keys = {"held_out": 1, "answers": "all", **keys}
    return corpus(DataConfig("jsonl", str(path), **keys), idlm, 10, folder / "run")


def test_what_is_trained_as_one_text_an_answer_is_said(base: Idlm, tmp_path: Path) -> None:
    short = [*MESSAGES[1:2], {"role": "assistant", "content": "1"}]
    plain = [{**one, "content": one["content"][-1]} for one in MESSAGES]
    rows = [short, plain, MESSAGES, MESSAGES, short]
    idlm = with_template(base, CHANGES["thoughts are left out of earlier turns"])
    data = read(idlm, rows, tmp_path)
    path = tmp_path / "rows.jsonl"
    assert data.tally.notes == [
        f"the chat template writes 2 of 3 conversations differently later ({path} line 3): "
        "they are trained as one text an answer"
    ]
    assert [len(one.answers) for one in data.training] == [1, 2, 1, 1, 1, 1]
    same = read(base, rows, tmp_path)
    assert same.tally.notes == []
    assert [len(one.answers) for one in same.training] == [1, 2, 2, 2]


def test_all_documents_of_a_row_are_held_out_together(base: Idlm, tmp_path: Path) -> None:
    idlm = with_template(base, CHANGES["thoughts are left out of earlier turns"])
    data = read(idlm, [MESSAGES, MESSAGES], tmp_path)
    assert {one.row for one in data.held_out} == {f"{tmp_path / 'rows.jsonl'} line 2"}
    assert [len(data.training), len(data.held_out)] == [2, 2]


def test_a_conversation_is_cut_at_the_limit_in_either_form(base: Idlm, tmp_path: Path) -> None:
    for idlm in (base, with_template(base, CHANGES["the number of messages is at the top"])):
        whole = documents(idlm, MESSAGES)
        limit = whole[-1].answers[-1][0]  # the second answer begins there
        data = read(idlm, [MESSAGES, MESSAGES], tmp_path, max_length=limit)
        assert [len(one.answers) for one in data.training] == [1]
        assert answers(idlm, data.training[0]) == [f"hm|2{END}"]
        assert data.tally.cut == 2


def test_a_template_without_assistant_turns_is_one_error(base: Idlm, tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% if m.role != 'assistant' %}{{ m.role }}: {{ m.content }}"
        f"{END}{{% endif %}}{{% endfor %}}{OPENED}"
    )
    idlm = with_template(base, template)
    for key in ("last", "all"):
        with pytest.raises(InputError, match="writes no assistant turns; give the model another"):
            read(idlm, [MESSAGES] * 4, tmp_path, answers=key, skip_bad_rows=True)


def test_the_first_reasons_of_bad_rows_are_said(base: Idlm, tmp_path: Path) -> None:
    broken: list[list[dict[str, Any]]] = [[], MESSAGES[1:2], [{"role": "user"}], [], []]
    data = read(base, [MESSAGES, *broken, MESSAGES], tmp_path, skip_bad_rows=True)
    (note,) = data.tally.notes
    assert note.startswith("5 bad rows were left out, the first: ")
    assert [f"line {line}" in note for line in (2, 3, 4, 5, 6)] == [True] * 3 + [False] * 2

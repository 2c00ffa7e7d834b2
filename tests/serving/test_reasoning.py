"""Thoughts told from the answer, in text that comes in any pieces, and how they are turned on."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from idlm import InputError
from idlm.params import Thinking
from idlm.serving.errors import ApiError
from idlm.serving.prompts import Prompts
from idlm.serving.reasoning import ThoughtParser, effort_options, find_reasoner
from idlm.serving.schema_chat import ChatRequest

TEMPLATE = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)


@pytest.fixture(scope="module")
def thinker(tokenizer: PreTrainedTokenizerBase) -> Prompts:
    """Prompts of a model whose template and vocabulary have the tokens of Qwen3."""
    thinking = copy.deepcopy(tokenizer)
    thinking.add_tokens(["<think>", "</think>"])
    thinking.chat_template = TEMPLATE
    return Prompts(thinking, "thinker", 160)


CASES: dict[str, tuple[bool, str, str, str]] = {
    # case: the prompt ends within thoughts, the output, its thoughts, its content
    "both": (False, "<think>\nab c\n</think>\n\nyes\n", "ab c", "yes\n"),
    "the end alone": (True, "ab\n\nc</think>yes", "ab\n\nc", "yes"),
    "both within": (True, "<think>\nab</think>yes", "ab", "yes"),
    "none": (False, " \nyes <think>a</think>", "", " \nyes <think>a</think>"),
    "nothing in it": (False, "<think>\n\n</think>\n\nyes", "", "yes"),
    "no end": (False, "<think>ab </thi", "ab </thi", ""),
    "no end within": (True, "ab\n", "ab", ""),
    "no answer": (True, "ab</think>\n\n", "ab", ""),
    "the end twice": (True, "a</think>b</think>c", "a", "b</think>c"),
    "a beginning": (False, "<thin", "", "<thin"),
    "a beginning within": (True, "<thin", "<thin", ""),
    "nothing": (False, "", "", ""),
    "a call in the thoughts": (True, "<tool_call>{}</think>x", "<tool_call>{}", "x"),
}


def pieces(case: str, cuts: list[int], **how: bool) -> list[tuple[str, str]]:
    """Thoughts and content that each piece of the text adds."""
    open, text, _, _ = CASES[case]
    parser = ThoughtParser("<think>", "</think>", open, **how)
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    parts = [parser.push(text[start:end]) for start, end in pairwise(places)]
    return [*parts, parser.finish()]


def split(case: str, cuts: list[int], **how: bool) -> tuple[str, str]:
    thoughts, contents = zip(*pieces(case, cuts, **how), strict=True)
    return "".join(thoughts), "".join(contents)


@given(st.sampled_from(sorted(CASES)), st.lists(st.integers(0, 40)))
def test_thoughts_are_told_from_the_answer(case: str, cuts: list[int]) -> None:
    assert split(case, cuts) == split(case, []) == CASES[case][2:]


@given(st.sampled_from(sorted(CASES)), st.lists(st.integers(0, 40)), st.booleans())
def test_raw_thoughts_and_content_are_the_text(case: str, cuts: list[int], whole: bool) -> None:
    thoughts, content = split(case, cuts, raw=True, whole=whole)
    assert thoughts + content == CASES[case][1]
    assert content.strip() == CASES[case][3].strip()


@given(st.sampled_from(sorted(CASES)), st.lists(st.integers(0, 40)))
def test_whole_thoughts_come_in_one_piece(case: str, cuts: list[int]) -> None:
    found = pieces(case, cuts, whole=True)
    thoughts = [thought for thought, _ in found if thought]
    assert thoughts == [CASES[case][2]] * bool(CASES[case][2])
    assert "".join(content for _, content in found) == CASES[case][3]
    if "</think>" not in CASES[case][1]:
        assert not any(thought for thought, _ in found[:-1])


def test_whether_a_prompt_ends_within_thoughts(thinker: Prompts) -> None:
    reasoner, always = (find_reasoner(name, thinker) for name in ("auto", "deepseek_r1"))
    assert reasoner is not None and always is not None
    start, end = (thinker.tokenizer.convert_tokens_to_ids(t) for t in ("<think>", "</think>"))
    history = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "<think>a</think>b"},
        {"role": "user", "content": "<think>"},
    ]
    hybrid = thinker.chat(history)
    assert reasoner.thinking(hybrid, 3) == Thinking(start, end, False, 3)
    assert always.thinking(hybrid, None) == Thinking(start, end, True)
    for one in (reasoner, always):
        assert one.thinking(hybrid + thinker.text("<think>\n", trusted=True), None) == Thinking(
            start, end, True
        )
        assert one.thinking(thinker.chat(history, options={"enable_thinking": False}), 3) is None
    going_on = thinker.chat(
        [*history, {"role": "assistant", "content": "<think>so"}],
        add_generation_prompt=False,
        continue_final_message=True,
    )
    assert reasoner.thinking(going_on, None) == Thinking(start, end, True)


def test_which_models_have_thoughts(thinker: Prompts, tokenizer: PreTrainedTokenizerBase) -> None:
    plain = Prompts(tokenizer, "plain", 160)
    assert find_reasoner("auto", plain) is find_reasoner("none", thinker) is None
    assert find_reasoner("auto", Prompts(None, "none", 16)) is None
    with pytest.raises(InputError, match="'plain' has no tokens <think> and </think>; use none"):
        find_reasoner("qwen3", plain)
    with pytest.raises(InputError, match="'r1' is unknown; use one of auto, none, qwen3"):
        find_reasoner("r1", thinker)


@pytest.mark.parametrize(
    ("effort", "template", "options"),
    [
        (None, TEMPLATE, {}),
        ("none", TEMPLATE, {"enable_thinking": False}),
        ("low", TEMPLATE, {"enable_thinking": True}),
        ("high", "{{ reasoning_effort }}", {"reasoning_effort": "high"}),
        ("none", "{% if thinking %}{% endif %}", {"thinking": False}),
        ("low", "thinking {% set enable_thinking = 1 %}{{ enable_thinking }}", {}),
        ("low", "{% generation %}{{ thinking }}{% endgeneration %}", {"thinking": True}),
    ],
)
def test_effort_is_said_to_the_template(
    effort: str | None, template: str, options: dict[str, Any]
) -> None:
    assert effort_options(effort, template) == options


def request(**fields: Any) -> ChatRequest:
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "so  "}]
    return ChatRequest.model_validate({"model": "m", "messages": messages, **fields})


def test_effort_in_the_prompt(thinker: Prompts) -> None:
    def text(**fields: Any) -> str:
        return thinker.decode(request(**fields).encoder(thinker)())

    assert text(reasoning_effort="high").endswith("assistant\n")
    assert text(reasoning_effort="none").endswith("<think>\n\n</think>\n\n")
    own = {"enable_thinking": True}
    assert text(reasoning_effort="none", chat_template_kwargs=own).endswith("assistant\n")


def test_the_last_message_is_continued(thinker: Prompts) -> None:
    def text(**fields: Any) -> str:
        return thinker.decode(request(**fields).encoder(thinker)())

    assert text(continue_final_message=True).endswith("<|im_start|>assistant\nso  ")
    assert text(add_generation_prompt=False).endswith("so  <|im_end|>\n")
    assert text(continue_final_message=False).endswith("<|im_start|>assistant\n")
    with pytest.raises(ApiError, match="continue_final_message with add_generation_prompt"):
        text(continue_final_message=True, add_generation_prompt=True)


def test_a_budget_needs_known_thoughts() -> None:
    assert request().thoughts(None, []) is None
    for name in ("thinking_token_budget", "thinking_budget"):
        with pytest.raises(ApiError, match="a budget of 5 thinking tokens, and this server knows"):
            request(**{name: 5}).thoughts(None, [])

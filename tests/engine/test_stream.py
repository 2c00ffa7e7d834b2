"""`LLM.stream`: every token's source comes with it, and drafting can be left out."""

from __future__ import annotations

import pytest

from idlm import LLM, SamplingParams
from idlm.engine.request import Update
from idlm.errors import InputError


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("nano", dtype="float64", max_num_seqs=2, kv_memory="32MiB", branches="all")


def stream(llm: LLM, params: SamplingParams, drafting: bool = True) -> list[Update]:
    question = (
        "Mia has 14 apples. Then she buys 9 more apples at the market. "
        "How many apples does Mia have now?"
    )
    prompt = llm.encode_chat([{"role": "user", "content": question}])
    return list(llm.stream(prompt, params, drafting=drafting))


@pytest.mark.parametrize("stop", [(), ("apples",)])
def test_updates_bring_the_sources_of_their_tokens(llm: LLM, stop: tuple[str, ...]) -> None:
    updates = stream(llm, SamplingParams(seed=3, max_tokens=40, stop=stop))
    result = updates[-1].result
    assert (
        result is not None
        and [token for one in updates for token in one.tokens] == result.token_ids
    )
    assert [source for one in updates for source in one.sources] == result.sources
    assert "".join(one.text for one in updates) == result.text


def test_without_drafting_the_tokens_are_the_same_one_a_forward(llm: LLM) -> None:
    params = SamplingParams(seed=3, max_tokens=40, ignore_eos=True)
    drafted, plain = stream(llm, params)[-1].result, stream(llm, params, drafting=False)[-1].result
    assert drafted is not None and plain is not None and plain.token_ids == drafted.token_ids
    assert plain.forwards == len(plain.token_ids) > drafted.forwards


def test_a_template_that_refuses_is_an_input_error(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "{{ raise_exception('no such role') }}"
    monkeypatch.setattr(llm.idlm.tokenizer, "chat_template", template)
    with pytest.raises(InputError, match="no such role.*change them"):
        llm.chat([{"role": "user", "content": "hi"}])

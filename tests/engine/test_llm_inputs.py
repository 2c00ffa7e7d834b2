"""What users of vLLM hand to `LLM`, and what it refuses with one sentence."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from idlm import LLM, SamplingParams
from idlm.errors import InputError
from idlm.params import Guide

GREEDY = SamplingParams(temperature=0, max_tokens=4)
TEXT = "1 + 1 ="
USER = {"role": "user", "content": "1 + 1?"}
SURROGATE = "a\ud800b"


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> LLM:
    options: Any = {"stride": 2, "branches": "all", "threads": 1, "max_num_seqs": 4}
    return LLM(checkpoint / "base", checkpoint / "lora", dtype="float64", **options)


PROMPTS: dict[str, Callable[[list[int]], Any]] = {
    "a text": lambda ids: TEXT,
    "a dict of a text": lambda ids: {"prompt": TEXT},
    "a dict of ids": lambda ids: {"prompt_token_ids": ids},
    "a dict of both": lambda ids: {"prompt": TEXT, "prompt_token_ids": ids, "cache_salt": None},
    "a dict of ids as prompt": lambda ids: {"prompt": ids},
    "a list of dicts": lambda ids: [{"prompt": TEXT}],
    "a generator of texts": lambda ids: (text for text in [TEXT]),
    "a tuple": lambda ids: (TEXT,),
    "ids": lambda ids: ids,
    "a generator of ids": lambda ids: (token for token in ids),
    "NumPy ids": np.array,
    "rows of NumPy ids": lambda ids: np.array([ids]),
    "a list of NumPy ids": lambda ids: [np.int32(token) for token in ids],
    "a tensor": lambda ids: torch.tensor(ids),
}


@pytest.mark.parametrize("form", PROMPTS)
def test_forms_of_a_prompt(form: str, llm: LLM) -> None:
    ids = llm.encode(TEXT)
    (expected,) = llm.generate([ids], GREEDY)
    (result,) = llm.generate(PROMPTS[form](ids), GREEDY)
    assert result.prompt_token_ids == ids and result.token_ids == expected.token_ids
    assert all(type(token) is int for token in result.prompt_token_ids)


def test_forms_of_a_conversation(llm: LLM) -> None:
    expected = llm.chat([USER], GREEDY)
    assert llm.chat("1 + 1?", GREEDY).token_ids == expected.token_ids
    assert llm.chat(iter([USER]), GREEDY).token_ids == expected.token_ids
    parts = {"role": "user", "content": [{"type": "text", "text": "1 + 1?"}]}
    results = llm.chat(([message] for message in (USER, parts)), GREEDY)
    assert [result.token_ids for result in results] == [expected.token_ids] * 2


def test_tools_and_variables_reach_the_template(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{{ tools[0].function.name }} {{ mood }} {{ messages[0].content }}"
    monkeypatch.setattr(llm.idlm.tokenizer, "chat_template", template)
    tools = [{"type": "function", "function": {"name": "add"}}]
    result = llm.chat([USER], GREEDY, tools=tools, chat_template_kwargs={"mood": "glad"})
    assert llm.idlm.tokenizer is not None
    assert llm.idlm.tokenizer.decode(result.prompt_token_ids) == "add glad 1 + 1?"


def test_results_have_the_samples_as_outputs(llm: LLM) -> None:
    (result,) = llm.generate(TEXT, SamplingParams(n=2, seed=1, max_tokens=4))
    assert [output.text for output in result.outputs] == [result.text, result.samples[0].text]
    assert result.outputs[1].finish_reason == result.samples[0].finish_reason


@pytest.mark.parametrize("name", SamplingParams.__dataclass_fields__)
def test_none_is_the_default(name: str) -> None:
    assert SamplingParams(**{name: None}) == SamplingParams()


def test_numbers_of_numpy() -> None:
    given = SamplingParams(
        max_tokens=np.int64(5),
        temperature=np.float32(0.5),
        top_k=torch.tensor(3),
        seed=np.uint64(2**40),
        ignore_eos=np.bool_(True),
        logit_bias={np.int64(3): np.float64(1.5)},
        stop_token_ids=np.array([4, 5]),
        banned_tokens=[np.int32(6)],
    )
    assert given == SamplingParams(
        max_tokens=5,
        temperature=0.5,
        top_k=3,
        seed=2**40,
        ignore_eos=True,
        logit_bias={3: 1.5},
        stop_token_ids=(4, 5),
        banned_tokens=(6,),
    )
    assert type(given.max_tokens) is int and type(next(iter(given.logit_bias))) is int


REFUSED: dict[str, Callable[[LLM], object]] = {
    "half of a surrogate pair": lambda llm: llm.generate(SURROGATE),
    "surrogate pair, which is no text": lambda llm: llm.chat(SURROGATE),
    "surrogate": lambda llm: llm.chat([{"role": "user", "content": [SURROGATE]}]),
    "stop holds": lambda llm: SamplingParams(stop=SURROGATE),
    "text of a guide": lambda llm: Guide("regex", SURROGATE),
    "multi_modal_data": lambda llm: llm.generate({"prompt": "x", "multi_modal_data": {}}),
    "holds no prompt": lambda llm: llm.generate([{}]),
    "is no prompt": lambda llm: llm.generate(7),  # type: ignore[arg-type]
    "no prompt; give text": lambda llm: llm.generate(b"x"),
    "neither text nor token ids": lambda llm: llm.generate([None]),  # type: ignore[list-item]
    "1.5 is not a whole number": lambda llm: llm.generate([[1.5]]),  # type: ignore[list-item]
    "True.* is not a whole number": lambda llm: llm.generate([[np.True_]]),  # type: ignore[list-item]
    "part of type 'image_url'": lambda llm: llm.chat(
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    ),
    "holds no message": lambda llm: llm.chat([]),
    r"messages\[0\] is no message: 7": lambda llm: llm.chat([[7]]),  # type: ignore[list-item]
}


@pytest.mark.parametrize("said", REFUSED)
def test_refused_with_one_sentence(said: str, llm: LLM) -> None:
    with pytest.raises(InputError, match=said) as error:
        REFUSED[said](llm)
    assert "\n" not in str(error.value)
    str(error.value).encode()  # it can be printed


@pytest.mark.parametrize("dtype", ["float16", torch.float16])
def test_float16_is_a_type_of_weights(dtype: Any, checkpoint: Path) -> None:
    options: Any = {"stride": 2, "branches": "all", "threads": 1, "max_num_seqs": 1}
    half = LLM(str(checkpoint / "base"), str(checkpoint / "lora"), dtype=dtype, **options)
    (result,) = half.generate(TEXT, GREEDY)
    assert half.idlm.dtype is torch.float16 and len(result.token_ids) == 4

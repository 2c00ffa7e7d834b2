"""`SamplingParams`: what is stored, and what is refused with a line that names the field and the
fix."""

import dataclasses

import pytest

from idlm.errors import InputError
from idlm.params import SEED_LIMIT, SamplingParams

REFUSED = [
    {"n": 0},
    {"n": 1025},
    {"n": True},
    {"max_tokens": 0},
    {"max_tokens": 1.5},
    {"min_tokens": -1},
    {"min_tokens": 9, "max_tokens": 8},
    {"logprobs": 21},
    {"logprobs": -1},
    {"prompt_logprobs": 21},
    {"prompt_logprobs": 2.0},
    {"seed": -SEED_LIMIT - 1},
    {"seed": SEED_LIMIT},
    {"top_k": -2},
    {"temperature": -0.1},
    {"temperature": float("nan")},
    {"top_p": 0.0},
    {"min_p": 1.1},
    {"repetition_penalty": 0.0},
    {"presence_penalty": float("inf")},
    {"frequency_penalty": "1"},
    {"logit_bias": [1]},
    {"logit_bias": {-1: 1.0}},
    {"banned_tokens": "12"},
    {"allowed_token_ids": ()},
    {"allowed_token_ids": [-1]},
    {"bad_words": "word"},
    {"bad_words": ["word", " "]},
    {"bad_words": [()]},
    {"bad_words": [[1, -2]]},
    {"bad_words": [[1] * 17]},
    {"bad_words": ["a"] * 257},
    {"stop_token_ids": 5},
    {"stop": ""},
    {"stop": ("a", "")},
    {"stop": ("a", 7)},
    {"stop": 7},
    {"ignore_eos": "no"},
    {"skip_special_tokens": "no"},
    {"stop": "\ud800"},
    {"include_stop_str_in_output": 1},
    {"verification": "lenient"},
    {"tau": 0.5},
]


@pytest.mark.parametrize("fields", REFUSED, ids=str)
def test_refused_with_one_line_that_names_the_field(fields):
    with pytest.raises(InputError) as error:
        SamplingParams(**fields)
    name = next(iter(fields))
    message = str(error.value)
    assert name in message and "\n" not in message and ";" in message


def test_the_edges_of_each_range_are_allowed():
    SamplingParams(
        n=64, max_tokens=1, min_tokens=1, logprobs=0, prompt_logprobs=20, seed=SEED_LIMIT - 64
    )
    SamplingParams(max_tokens=8, min_tokens=8, logprobs=20, prompt_logprobs=0, seed=SEED_LIMIT - 1)


def test_the_last_sample_needs_a_seed_as_well():
    with pytest.raises(InputError, match="seed \\+ n - 1"):
        SamplingParams(n=2, seed=SEED_LIMIT - 1)


@pytest.mark.parametrize(
    ("given", "kept"), [((), ()), ("ab", ("ab",)), (iter("ab"), ("a", "b")), (("\n",), ("\n",))]
)
def test_stop_is_stored_as_a_tuple_of_strings(given, kept):
    assert SamplingParams(stop=given).stop == kept


def test_a_copy_with_another_seed_keeps_everything_else():
    params = SamplingParams(n=3, seed=5, stop="x", min_tokens=2, stop_token_ids=[4], logprobs=1)
    sample = dataclasses.replace(params, n=1, seed=7)
    assert sample == SamplingParams(
        n=1, seed=7, stop=("x",), min_tokens=2, stop_token_ids=(4,), logprobs=1
    )


@pytest.mark.parametrize("name", ["logit_bias", "banned_tokens", "stop_token_ids"])
def test_ids_the_model_does_not_have_are_named(name):
    params = SamplingParams(**{name: {9: 1.0} if name == "logit_bias" else (9,)})
    params.check_vocabulary(10)
    with pytest.raises(InputError, match=f"{name} names token 9; the model's ids are 0..8"):
        params.check_vocabulary(9)

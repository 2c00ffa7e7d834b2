"""`TextStream` against one decode of all tokens, for tokenizers of every kind."""

from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from idlm.engine.request import Request, Result, Timing
from idlm.engine.text import TextStream
from idlm.params import SamplingParams
from tests.engine.kinds import KINDS, of_kind

every_kind = pytest.mark.parametrize("kind", KINDS)
cleaned_or_not = pytest.mark.parametrize("clean_up", [False, True], ids=["as is", "cleaned"])
UNKNOWN = 5
"""Rows that a model has after its tokenizer's last token."""


def whole(tokenizer, tokens: list[int], skip: bool = True) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=skip)


def streamed(stream: TextStream, tokens: list[int], cuts: list[int]) -> str:
    places = [0, *sorted({min(cut, len(tokens)) for cut in cuts}), len(tokens)]
    parts = [stream.push(tokens[start:end]) for start, end in pairwise(places)]
    return "".join([*parts, stream.finish()])


@st.composite
def random_tokens(draw, tokenizer):
    size = len(tokenizer) + UNKNOWN
    any_token = st.integers(0, size - 1)
    some = draw(st.lists(any_token, min_size=1, max_size=6))  # so that tokens come again
    tokens = st.lists(st.one_of(any_token, st.sampled_from(some)), max_size=60)
    text = st.lists(
        st.sampled_from(["n", "'", "n't", "'s", "'ve", "é世🏁", ".", "a", "is", "the", ",", "'m"]),
        max_size=20,
    )
    written = text.map(lambda words: tokenizer(" ".join(words), add_special_tokens=False).input_ids)
    return draw(st.one_of(tokens, written))


@every_kind
@cleaned_or_not
def test_any_tokens_in_any_pieces_give_the_text_of_all(kind, clean_up):
    tokenizer = of_kind(kind, clean_up)

    @given(random_tokens(tokenizer), st.lists(st.integers(0, 60), max_size=30), st.booleans())
    @settings(max_examples=60, deadline=None)
    def check(tokens, cuts, skip):
        stream = TextStream(tokenizer, skip_special_tokens=skip)
        assert streamed(stream, tokens, cuts) == whole(tokenizer, tokens, skip) == stream.text
        assert stream.finish() == "" and stream.stopped_at is None

    check()


@every_kind
@cleaned_or_not
def test_a_stop_string_cuts_the_text_of_all(kind, clean_up):
    tokenizer = of_kind(kind, clean_up)
    words = st.sampled_from(
        ["'", " '", "t", "n't", " n", "\ufffd", "é", "世", ". ", "a", "the", " "]
    )

    @given(random_tokens(tokenizer), st.lists(words, min_size=1, max_size=3), st.booleans())
    @settings(max_examples=60, deadline=None)
    def check(tokens, stops, include):
        text = whole(tokenizer, tokens)
        found = [(text.find(stop) + len(stop), len(stop)) for stop in stops if stop in text]
        end, size = min(found, key=lambda place: (place[0], -place[1]), default=(len(text), 0))
        answers = []
        for cuts in ([], list(range(60))):
            stream = TextStream(tokenizer, stop=stops, include_stop=include)
            answers.append((streamed(stream, tokens, cuts), stream.stopped_at, stream.stopped_by))
        assert answers[0] == answers[1]  # whatever the pieces
        assert answers[0][0] == text[: end if include else end - size]
        assert (answers[0][1] is not None) == bool(found)
        assert answers[0][2] == (text[end - size : end] if found else "")

    check()


@every_kind
@cleaned_or_not
def test_the_text_comes_while_the_tokens_come(kind, clean_up):
    """At most one word is held back."""
    tokenizer = of_kind(kind, clean_up)
    tokens = tokenizer("the other one ran on in a van " * 9, add_special_tokens=False).input_ids
    stream = TextStream(tokenizer)
    for number, token in enumerate(tokens, start=1):
        stream.push([token])
        so_far = whole(tokenizer, tokens[:number])
        assert so_far.startswith(stream.text)
        assert len(so_far) - len(stream.text) < 8
        assert len(stream._decoder._window) < 40


@given(st.text("n'tmsvre .,?!ax", max_size=24), st.lists(st.integers(0, 24), max_size=24))
@example("x n ' t", [3, 5])
@example("a  ' m", [2, 4])
@settings(max_examples=200, deadline=None)
def test_the_clean_up_in_pieces_is_that_of_the_whole(text, cuts):
    tokenizer = of_kind("byte_level", clean_up=True)
    assert whole(tokenizer, tokenizer("is n't").input_ids) == "isn't"
    tokens = tokenizer(text).input_ids
    assert streamed(TextStream(tokenizer), tokens, cuts) == tokenizer.clean_up_tokenization(text)


def test_a_stop_string_in_the_text_that_was_held_to_the_end():
    tokenizer = of_kind("byte_fallback")
    stream = TextStream(tokenizer, stop=["世"])
    tokens = tokenizer("a 世", add_special_tokens=False).input_ids
    assert [stream.push(tokens), stream.finish()] == ["a ", ""]
    assert (stream.stopped_at, stream.stopped_by) == (len(tokens), "世")


@pytest.mark.parametrize(
    ("reason", "end"), [(None, ("stop", "世")), ("abort", ("abort", "世"))], ids=["limit", "abort"]
)
def test_a_request_that_ends_so_has_stopped(reason, end):
    tokenizer = of_kind("byte_fallback")
    tokens = tokenizer("a 世", add_special_tokens=False).input_ids
    result = Result([1], 0, [0], [0], Timing(0.0))
    request = Request(
        id="1",
        prompt=[1],
        params=SamplingParams(stop="世"),
        result=result,
        limit=1 + len(tokens),
        stop_ids=frozenset(),
        adapter=0,
        drafting=True,
        looking=False,
        order=(0, 0),
        deadline=None,
        stream=TextStream(tokenizer, stop=["世"]),
    )
    kept, text = request.extend(tokens, 0, 0)
    assert (kept, text, request.complete) == (tokens, "a ", True)
    assert request.finish(reason) == "" and result.text == "a "
    assert (result.finish_reason, result.stop_reason) == end

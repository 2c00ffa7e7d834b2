"""`TextStream` against `tokenizer.decode` of everything, whatever the pieces, and stop strings
against plain search."""

from functools import cache
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from idlm.engine.text import TextStream
from idlm.models.loading import load
from idlm.nano.problems import held_out_problems

WORLD = "Grüße, 世界! 👩‍👩‍👧 €5 – naïve\n🏁🏁🏁🏁🏁🏁🏁🏁🏁🏁🏁 fin �."
END = "<|end|>"


@cache
def byte_level() -> PreTrainedTokenizerBase:
    """One token a byte, the space joined to a letter, two thirds of a euro sign, and a special
    token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pair, space = ["".join(name) for name in (("â", "Ĥ"), ("Ġ", "a"))]
    vocabulary = {name: number for number, name in enumerate([*alphabet, pair, space])}
    bpe = Tokenizer(models.BPE(vocabulary, [("â", "Ĥ"), ("Ġ", "a")]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END)


@cache
def byte_fallback() -> PreTrainedTokenizerBase:
    """Letters and "▁" for the space, all else byte by byte, as SentencePiece models have it."""
    names = [
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abcdefghijklmnopqrstuvwxyz",
    ]
    bpe = Tokenizer(
        models.BPE(
            {name: i for i, name in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True
        )
    )
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    bpe.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, unk_token="<unk>")


@cache
def nano() -> PreTrainedTokenizerBase:
    tokenizer = load("nano").tokenizer
    assert tokenizer is not None
    return tokenizer


def ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def pieces(tokens: list[int], cuts: list[int]) -> list[list[int]]:
    places = [0, *sorted(min(cut, len(tokens)) for cut in cuts), len(tokens)]
    return [tokens[start:end] for start, end in pairwise(places)]


def streamed(stream: TextStream, parts: list[list[int]]) -> str:
    return "".join([*(stream.push(part) for part in parts), stream.finish()])


any_bytes = st.one_of(
    st.lists(st.integers(0, 258), max_size=60),
    st.text(max_size=40).map(lambda text: ids(byte_level(), text)),
    st.lists(st.sampled_from([*ids(byte_level(), "€🏁a"), 258]), max_size=90),
)
cuts = st.lists(st.integers(0, 90), max_size=40)


@given(any_bytes, cuts, st.booleans())
@example(ids(byte_level(), "🏁")[:2] * 60 + ids(byte_level(), "a€"), list(range(124)), True)
@example([*ids(byte_level(), "ab"), *[258] * 40, *ids(byte_level(), " a")], list(range(60)), True)
@example([258] * 60 + ids(byte_level(), "€"), list(range(60)), True)
@example(ids(byte_level(), "🏁")[:1] * 9 + ids(byte_level(), "🏁a"), list(range(60)), True)
@example([172, 253, 253, 258, 253], list(range(5)), True)  # a special token within a character
@settings(max_examples=300, deadline=None)
def test_any_tokens_in_any_pieces_give_the_text_of_all(tokens, places, skip):
    tokenizer = byte_level()
    stream = TextStream(tokenizer, skip_special_tokens=skip)
    whole = tokenizer.decode(tokens, skip_special_tokens=skip)
    assert streamed(stream, pieces(tokens, places)) == whole == stream.text
    assert stream.finish() == "" and stream.stopped_at is None


@given(st.lists(st.sampled_from([*"ab c€世🏁é", " ", "🏁🏁🏁🏁"]), max_size=40).map("".join), cuts)
@example("🏁" * 30 + "世" * 30 + "é" * 30 + "世🏁é" * 20 + " a", list(range(500)))
@example("€" + "🏁" * 12, [34])
@example(("世🏁" + "é" * 3) * 20, list(range(1, 500, 4)))
@example(" a", [1, 2])
@settings(deadline=None)
def test_text_of_a_byte_fallback_tokenizer(text, places):
    tokenizer = byte_fallback()
    tokens = ids(tokenizer, text)
    assert (
        streamed(TextStream(tokenizer), pieces(tokens, places)) == tokenizer.decode(tokens) == text
    )


@pytest.mark.parametrize("phase", [1, 2, 3, 4])
def test_pieces_that_always_end_within_a_character(phase):
    tokens = ids(byte_level(), "🏁" * 30)
    stream, taken = TextStream(byte_level()), 0
    for piece in pieces(tokens, list(range(phase, len(tokens), 4))):
        stream.push(piece)
        taken += len(piece)
        assert stream.text == "🏁" * (taken // 4)
    assert stream.text == "🏁" * 30


def test_a_run_of_byte_tokens_comes_when_it_has_ended():
    """One broken character in it would break all."""
    run, end = ids(byte_fallback(), "a" + "🏁" * 30), ids(byte_fallback(), "b")[-1:]
    stream = TextStream(byte_fallback())
    assert [stream.push([token]) for token in run] == ["", "a", *[""] * 120]
    assert stream.undecided() == "🏁" * 30
    assert stream.push(end) == "🏁" * 30 + "b" and stream.undecided() == ""
    assert streamed(TextStream(byte_fallback()), [run, run[-1:], end]).endswith(
        "\ufffd" * 121 + "b"
    )


@pytest.mark.parametrize(
    "tokenizer", [byte_level, byte_fallback, nano], ids=lambda make: make.__name__
)
def test_each_piece_is_returned_as_soon_as_it_is_whole(tokenizer):
    tokenizer, text = tokenizer(), WORLD.replace("�", "")
    stream, tokens = TextStream(tokenizer), ids(tokenizer, text)
    for number, token in enumerate(tokens, start=1):
        stream.push([token])
        so_far = tokenizer.decode(tokens[:number])
        assert text.startswith(stream.text)
        in_run = tokenizer.convert_ids_to_tokens(token).startswith("<0x")
        if text.startswith(so_far) and not in_run:
            assert stream.text == so_far
    assert stream.text + stream.undecided() == text


def test_a_real_replacement_character_comes_through():
    assert (
        streamed(TextStream(byte_level()), [[token] for token in ids(byte_level(), WORLD)]) == WORLD
    )


def test_half_a_character_at_the_end_is_what_the_tokenizer_makes_of_it():
    tokens = ids(byte_level(), "5€")[:-1]
    stream = TextStream(byte_level())
    assert [stream.push(tokens), stream.finish()] == ["5", byte_level().decode(tokens)[1:]]


@pytest.mark.parametrize("stop", [(), ("never",)])
def test_the_bundled_tokenizer_on_its_own_problems(stop):
    for problem in held_out_problems(3):
        tokens = [*ids(nano(), problem.question + "\n" + problem.solution), nano().eos_token_id]
        stream = TextStream(nano(), stop=stop)
        assert streamed(stream, pieces(tokens, list(range(0, 400, 3)))) == nano().decode(
            tokens[:-1]
        )
        shown = TextStream(nano(), skip_special_tokens=False, stop=stop)
        assert streamed(shown, [[token] for token in tokens]).endswith("<|im_end|>")


@pytest.mark.parametrize(
    ("tokenizer", "text"),
    [
        (byte_level, "a"),
        (byte_level, END),
        (byte_level, "half 🏁"),
        (byte_fallback, "世🏁"),
        (byte_fallback, "éé a"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_the_window_stays_short(tokenizer, text):
    tokenizer = tokenizer()
    tokens = ids(tokenizer, "begin" + 100 * text)
    if text == "half 🏁":
        tokens = 100 * ids(tokenizer, "🏁")[:2]
    stream = TextStream(tokenizer)
    for token in tokens:
        stream.push([token])
        assert len(stream._decoder._window) < 40
    stream.finish()
    assert stream.text == tokenizer.decode(tokens, skip_special_tokens=True)


def first_stop(
    tokens: list[int], stops: list[str], include: bool, least: int
) -> tuple[str, int | None]:
    """The text up to the first stop string completed after `least` tokens, by looking at every
    beginning."""
    whole = byte_level().decode(tokens, skip_special_tokens=True)
    length = 0
    for number in range(1, len(tokens) + 1):
        text = byte_level().decode(tokens[:number], skip_special_tokens=True).rstrip("�")
        for end in range(length + 1, len(text) + 1):
            found = [stop for stop in stops if text[:end].endswith(stop)]
            if found and number > least:
                return text[: end if include else end - max(map(len, found))], number
        length = max(length, len(text))
    return whole, None


words = st.one_of(st.text("ab€", min_size=1, max_size=4), st.text("ab", min_size=2, max_size=5))
stops = st.lists(words, min_size=1, max_size=4)
texts = st.one_of(st.text("ab €", max_size=30), st.text("ab", max_size=30))
stop_tokens = texts.map(lambda text: ids(byte_level(), text))


@given(stop_tokens, stops, cuts, st.booleans(), st.integers(0, 12))
@example(ids(byte_level(), "aaab"), ["aab"], [], False, 0)
@example(ids(byte_level(), "aaa"), ["aa"], [], False, 2)
@settings(max_examples=400, deadline=None)
def test_the_first_stop_string_ends_the_text(tokens, strings, places, include, least):
    stream = TextStream(byte_level(), stop=strings, include_stop=include, min_tokens=least)
    text = streamed(stream, pieces(tokens, places))
    assert (text, stream.stopped_at) == first_stop(tokens, strings, include, least)
    assert stream.text == text


@given(stop_tokens, stops)
@settings(deadline=None)
def test_only_the_beginning_of_a_stop_string_is_held(tokens, strings):
    stream = TextStream(byte_level(), stop=strings)
    for number, token in enumerate(tokens, start=1):
        stream.push([token])
        if stream.stopped_at is not None:
            return
        so_far = byte_level().decode(tokens[:number]).rstrip("�")
        beginnings = [
            stop[:size]
            for stop in strings
            for size in range(len(stop))
            if so_far.endswith(stop[:size])
        ]
        assert stream.text == so_far[: len(so_far) - max(map(len, beginnings))]


def test_nothing_comes_after_a_stop():
    stream = TextStream(byte_level(), stop=("c",))
    tokens = ids(byte_level(), "abcd")
    assert stream.push(tokens) == "ab" and stream.stopped_at == 3
    assert stream.push(tokens) == "" and stream.finish() == "" and stream.stopped_at == 3


def test_a_stop_string_longer_than_the_text_is_given_back_at_the_end():
    stream = TextStream(byte_level(), stop=("bcde",))
    assert [stream.push(ids(byte_level(), "abc")), stream.finish(), stream.finish()] == [
        "a",
        "bc",
        "",
    ]


def test_many_special_tokens_do_not_cost_a_space():
    tokenizer = byte_fallback()
    head = ids(tokenizer, "a") + 60 * [tokenizer.eos_token_id]
    stream = TextStream(tokenizer)
    assert [stream.push(head), stream.push(ids(tokenizer, "b"))] == ["a", " b"]

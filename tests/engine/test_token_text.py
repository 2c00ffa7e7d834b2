"""Texts of single tokens and their offsets, for tokenizers of every kind."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idlm.engine.token_text import Offsets, TokenTexts
from tests.engine.kinds import KINDS, of_kind

WITH_BYTES = ["byte_level", "byte_fallback", "unigram_bytes"]
every_kind = pytest.mark.parametrize("kind", KINDS)


def tokens_of(kind: str, text: str) -> list[int]:
    return of_kind(kind)(text, add_special_tokens=False).input_ids


def offsets_of(kind: str, tokens: list[int]) -> list[int]:
    return list(map(Offsets(of_kind(kind)).push, tokens))


@pytest.mark.parametrize("kind", WITH_BYTES)
@given(text=st.text("the was n' é世🏁\u0301", max_size=30))
@settings(max_examples=80, deadline=None)
def test_tokens_begin_where_their_bytes_do(kind, text):
    tokens, texts = tokens_of(kind, text), TokenTexts(of_kind(kind))
    parts = [texts.bytes(token) for token in tokens]
    whole, decoded = b"".join(parts), of_kind(kind).decode(tokens)
    dropped = len(whole.decode()) - len(decoded)  # SentencePiece drops a space at the start
    assert dropped in (0, 1) and whole.decode()[dropped:] == decoded
    before = [b"".join(parts[:at]).decode(errors="ignore") for at in range(len(parts))]
    assert offsets_of(kind, tokens) == [max(0, len(text) - dropped) for text in before]


@every_kind
def test_the_tokens_of_a_text_cut_it(kind):
    tokens, texts = tokens_of(kind, "the other one ran on in a van."), TokenTexts(of_kind(kind))
    text = of_kind(kind).decode(tokens)
    begin = offsets_of(kind, tokens)
    cut = [text[start:end] for start, end in zip(begin, [*begin[1:], None], strict=True)]
    assert "".join(cut) == text
    shown = [texts.text(token) for token in tokens]
    if kind == "end_of_word":  # its space comes after a word, and only before another one
        shown, cut = [part.strip() for part in shown], [part.strip() for part in cut]
    assert shown[0].strip() == cut[0].strip() and shown[1:] == cut[1:]


@pytest.mark.parametrize(
    ("kind", "shown", "begin"),
    [
        ("byte_level", ["bytes:\\xe4", "bytes:\\xb8", "bytes:\\x96", "a"], [0, 0, 0, 1]),
        ("byte_fallback", [" ", "bytes:\\xe4", "bytes:\\xb8", "bytes:\\x96", "a"], [0, 0, 0, 0, 1]),
    ],
)
def test_parts_of_a_character_are_shown_as_bytes(kind, shown, begin):
    tokenizer = of_kind(kind)
    tokens = tokens_of(kind, "世a")
    if kind == "byte_level":
        tokens = [tokenizer.convert_tokens_to_ids(name) for name in ("ä", "¸", "ĸ", "a")]
    assert tokenizer.decode(tokens) == "世a"
    assert [TokenTexts(tokenizer).text(token) for token in tokens] == shown
    assert offsets_of(kind, tokens) == begin


def test_a_special_token_is_shown_and_takes_no_place():
    tokenizer = of_kind("byte_level")
    end = tokenizer.eos_token_id
    tokens = [*tokens_of("byte_level", "é"), end, *tokens_of("byte_level", "b")]
    assert TokenTexts(tokenizer).text(end) == "<|end|>"
    assert offsets_of("byte_level", tokens)[-2:] == [1, 1]
    with_special = Offsets(tokenizer, skip_special_tokens=False, start=10)
    assert list(map(with_special.push, tokens))[-2:] == [11, 18]


def test_a_replacement_character_is_text():
    tokens, texts = tokens_of("byte_level", "\ufffd"), TokenTexts(of_kind("byte_level"))
    assert b"".join(map(texts.bytes, tokens)).decode() == "\ufffd"

"""Texts in requests that cannot be encoded."""

import pytest

from idlm.serving.errors import ApiError
from idlm.serving.strict import decode


@pytest.mark.parametrize(
    ("text", "half"),
    [
        (rb'{"a": "\ud800"}', r"\ud800"),
        (rb'{"a": "x\uDC00y"}', r"\uDC00"),
        (rb'{"a": "\ud83dx"}', r"\ud83d"),
        (rb'{"a": "\ud83d\ude00\ud83e"}', r"\ud83e"),
        (rb'{"\udfff": 1}', r"\udfff"),
    ],
)
def test_half_a_surrogate_pair_is_named(text: bytes, half: str) -> None:
    with pytest.raises(ApiError) as error:
        decode(text, "the request body")
    assert f"{half} is half of a surrogate pair; take it out" in str(error.value.detail)
    assert error.value.status_code == 400


def test_whole_pairs_are_characters() -> None:
    assert decode(rb'{"a": "\ud83d\ude00"}', "the request body") == {"a": "😀"}
    with pytest.raises(ApiError, match="not valid JSON"):
        decode(rb'{"a": "\ud83d\ude00"', "the request body")

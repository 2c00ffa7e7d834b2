"""Text in the colours of its tokens: no text is lost, and tokens have their own colours."""

from __future__ import annotations

import re
from colorsys import rgb_to_hsv
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.text import Text

from idlm.cli.serve import AR_SUFFIX
from idlm.ui import chat_remote
from idlm.ui.colours import COLOURS, LEGEND, Painter, harmless

WEB = Path(__file__).parents[2] / "web" / "src"
HUES = {"red": 0, "yellow": 60, "green": 120, "cyan": 180, "blue": 240, "magenta": 300}
"""Of a terminal's colours, in degrees."""
SOURCES = st.sampled_from(sorted(COLOURS))


def parts(text: Text) -> list[tuple[str, str]]:
    """Pieces and their colours."""
    return [(text.plain[span.start : span.end], str(span.style)) for span in text.spans]


def test_each_token_has_its_colour_also_where_its_space_is_left_out() -> None:
    painted = Painter().paint(
        "Mia has 3", [("Mia", "first"), ("has", "accepted"), (" 3", "corrected")]
    )
    assert parts(painted) == [("Mia", "bright_black"), (" has", "green"), (" 3", "bold red")]


def test_text_that_was_held_back_has_the_colour_of_its_own_token() -> None:
    painter = Painter()
    assert painter.paint("", [(" sto", "accepted")]).plain == ""
    assert parts(painter.paint(" stone", [("ne", "bonus")])) == [
        (" sto", "green"),
        ("ne", "bold cyan"),
    ]


def test_a_character_of_two_tokens_has_the_colour_of_the_last() -> None:
    painted = Painter().paint("é!", [("\ufffd", "accepted"), ("\ufffd", "corrected")])
    assert parts(painted) == [("é!", "bold red")]


@given(
    st.lists(
        st.tuples(
            st.text(max_size=4), st.lists(st.tuples(st.text(max_size=3), SOURCES), max_size=3)
        )
    )
)
def test_no_text_is_lost_whatever_the_tokens_say(
    pieces: list[tuple[str, list[tuple[str, str]]]],
) -> None:
    painter = Painter()
    painted = [painter.paint(text, tokens).plain for text, tokens in pieces]
    assert painted == [Text(harmless(text)).plain for text, _ in pieces]


def test_control_characters_are_shown_and_not_obeyed() -> None:
    assert harmless("a\x1b[2J\x9b1m\r\n\tb \u200d") == "a\ufffd[2J\ufffd1m\ufffd\n\tb \u200d"


def test_the_name_without_drafts_is_the_servers() -> None:
    assert chat_remote.AR_SUFFIX == AR_SUFFIX


def test_words_are_those_of_the_page() -> None:
    block = (WEB / "lib" / "api.ts").read_text().split("MEANING", 1)[1].split("};")[0]
    assert dict(re.findall(r'^  (\w+): "(.*)",$', block, re.MULTILINE)) == LEGEND


def terminal_colour(shade: str) -> str:
    """The terminal's colour nearest to #rrggbb; grey where it has next to no colour."""
    red, green, blue = (int(shade[at : at + 2], 16) / 255 for at in (1, 3, 5))
    if max(red, green, blue) - min(red, green, blue) < 0.12:
        return "bright_black"
    hue = 360 * rgb_to_hsv(red, green, blue)[0]
    return min(HUES, key=lambda name: min(abs(hue - HUES[name]), 360 - abs(hue - HUES[name])))


@pytest.mark.parametrize("source", COLOURS)
def test_colours_are_those_of_the_page(source: str) -> None:
    """In its light and in its dark form."""
    pattern = rf"--{source}: light-dark\((#\w{{6}}), (#\w{{6}})\);"
    (shades,) = re.findall(pattern, (WEB / "app.css").read_text())
    for shade in shades:
        assert terminal_colour(shade) == COLOURS[source].split()[-1]

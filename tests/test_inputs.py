"""Lines of users' files, whole texts, and the numbers of NumPy."""

from pathlib import Path

import pytest

from idlm.cli.prompts import read
from idlm.errors import InputError
from idlm.inputs import check_text, read_lines
from idlm.training.read_config import load_config
from idlm.training.rows import read_fields, read_jsonl

NOT_LINES = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\r"
BOM = "\ufeff"


@pytest.mark.parametrize("bom", ["", BOM], ids=["plain", "BOM"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
def test_lines_end_with_line_feeds_only(tmp_path: Path, bom: str, end: str) -> None:
    file = tmp_path / "prompts.txt"
    text = f"a{NOT_LINES}b"
    file.write_bytes((bom + text + end + "c" + end).encode())
    assert list(read_lines(file)) == [text, "c"]
    assert [prompt.text for prompt in read(file)] == [text, "c"]


@pytest.mark.parametrize("bom", ["", BOM], ids=["plain", "BOM"])
def test_rows_may_hold_separators(tmp_path: Path, bom: str) -> None:
    text = f"a{NOT_LINES}b".replace("\x0b", "").replace("\x0c", "").replace("\r", "")
    text = "".join(one for one in text if one not in "\x1c\x1d\x1e")  # JSON escapes these
    file = tmp_path / "rows.jsonl"
    file.write_text(bom + f'{{"prompt": "{text}", "response": "c"}}\n\n', encoding="utf-8")
    assert [read_fields(row, name)["prompt"] for name, row in read_jsonl(file)] == [text]
    assert [prompt.text for prompt in read(file)] == [text]


def test_a_config_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(BOM + "no_such_key: 1\n", encoding="utf-8")
    with pytest.raises(InputError, match="'?no_such_key"):
        load_config(file)


@pytest.mark.parametrize("data", [b"\xff\xfea\x00", b"caf\xe9"])
def test_other_encodings_are_refused(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "rows.txt"
    file.write_bytes(data)
    for reader in (read_lines, read):
        with pytest.raises(InputError, match=r"rows.txt' \(it is not UTF-8\)"):
            list(reader(file))
    with pytest.raises(InputError, match="none.txt"):
        list(read_lines(tmp_path / "none.txt"))


@pytest.mark.parametrize("text", ["\ud800", "a\udc80", "\udbff\ud800"])
def test_half_a_surrogate_pair_is_no_text(text: str) -> None:
    with pytest.raises(InputError, match=r"^the x holds '\\u.*; take it out$"):
        check_text(text, "the x")
    check_text("🏁 é", "the x")

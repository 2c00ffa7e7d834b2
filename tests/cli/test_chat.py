"""`idlm chat` in this process, with an idlm server, and with other servers."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase
from typer.testing import CliRunner, Result

from idlm.cli import app
from idlm.cli.sampling import sampling_options
from idlm.ui.chat_remote import request_fields
from tests.cli.test_serve import running
from tests.waiting import HANG_SECONDS

QUESTION = (
    "Mia has 14 apples. Then she buys 9 more apples at the market. "
    "How many apples does Mia have now?"
)
GREEDY = ("--temperature", "0", "--dtype", "float64", "--max-tokens", "40")
REMOTE = ("--temperature", "0", "--max-tokens", "40")
LONG = [*["w " * 150] * 3, "w " * 600, QUESTION]
"""More than the context, bit by bit; then at once."""
TPF = re.compile(r"tokens, TPF ([0-9.]+), [0-9]+ tok/s")


def chat(*arguments: str, lines: list[str]) -> Result:
    """The result of a chat with these lines of input."""
    return CliRunner().invoke(
        app, ["chat", *arguments], input="".join(line + "\n" for line in lines)
    )


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running("--name", "small", IDLM_API_KEY="k") as (_, url):
        yield url


def test_a_conversation_keeps_its_history_until_reset() -> None:
    result = chat("nano", *GREEDY, lines=[QUESTION, QUESTION, "/reset", QUESTION, "/exit", "never"])
    assert result.exit_code == 0, result.output
    first, second, third = result.stdout.splitlines()
    assert first == third != second  # the second answer has seen the first
    assert len(TPF.findall(result.stderr)) == 3 and "cut: length" in result.stderr


def test_ar_gives_the_same_answer_one_token_a_forward() -> None:
    drafts = ("--branches", "all")  # the planner may choose AR
    result = chat("nano", *GREEDY, *drafts, lines=[QUESTION, "/ar", "/reset", QUESTION, "/ar"])
    first, second = result.stdout.splitlines()
    drafted, plain = map(float, TPF.findall(result.stderr))
    assert first == second and drafted > 2 and plain == 1
    assert result.stderr.index("drafting is off") < result.stderr.index("drafting is on")


def test_instructions_change_the_answer_and_commands_explain_themselves() -> None:
    lines = [
        QUESTION,
        "/reset",
        "/system 9 9 9",
        QUESTION,
        "/system",
        "/reset",
        QUESTION,
        "/help",
        "/fly",
        "",
    ]
    result = chat("nano", *GREEDY, lines=lines)
    first, second, third = result.stdout.splitlines()
    assert first == third != second
    assert "ctrl-D" in result.stderr and "error: '/fly' is no command" in result.stderr


def test_a_full_context_forgets_the_oldest_turns() -> None:
    result = chat("nano", *GREEDY, lines=LONG)
    assert result.exit_code == 0 and len(TPF.findall(result.stderr)) == 4
    assert "turns forgotten, the oldest first: 1" in result.stderr
    assert (
        "leave room for an answer; say less" in result.stderr
    )  # what fits nowhere is refused, and the chat goes on


def test_a_mask_in_a_message_is_text(tokenizer: PreTrainedTokenizerBase) -> None:
    result = chat("nano", *GREEDY, lines=[f"a {tokenizer.mask_token} b", "/reset", QUESTION])
    assert (
        result.exit_code == 0
        and len(TPF.findall(result.stderr)) == 2
        and "error" not in result.stderr
    )
    assert (
        result.stdout.splitlines()[-1]
        == chat("nano", *GREEDY, lines=[QUESTION]).stdout.splitlines()[0]
    )


def test_bytes_that_are_no_text_and_control_characters_do_no_harm() -> None:
    result = CliRunner().invoke(
        app, ["chat", "nano", *GREEDY], input=b"\xff\xfe 14 apples \x1b[2J\n"
    )
    assert result.exit_code == 0 and result.stdout and "\x1b" not in result.stdout


MISTAKES: dict[str, tuple[list[str], str]] = {
    # case: the command line, what the message must name
    "neither": ([], "--url"),
    "both": (["nano", "--url", "http://127.0.0.1:9/v1"], "--url"),
    "no such model": (["no/where/at-all"], "no/where/at-all"),
    "a name without a URL": (["nano", "--model", "x"], "'x'"),
    "an adapter of a server": (["--url", "http://127.0.0.1:9/v1", "--adapter", "runs/x"], "runs/x"),
    "several answers": (["nano", "--n", "2"], "--n 2"),
    "stride 0": (["nano", "--stride", "0"], "stride=0"),
    "no URL": (["--url", "localhost:8000"], "localhost:8000"),
    "a URL without a path": (["--url", "http://127.0.0.1:9"], "http://127.0.0.1:9/v1"),
    "nobody there": (["--url", "http://127.0.0.1:9/v1"], "http://127.0.0.1:9/v1"),
    "a field that requests lack": (
        ["--url", "http://127.0.0.1:9/v1", "--banned-token", "5"],
        "--logit-bias",
    ),
    "another's defaults": (
        ["--url", "http://127.0.0.1:9/v1", "--generation-config", "none"],
        "--generation-config none",
    ),
    "colours without drafts": (["nano", "--stride", "1", "--colors"], "nano"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_line(case: str) -> None:
    arguments, named = MISTAKES[case]
    result = chat(*arguments, lines=[])
    assert result.exit_code == 2, result.output
    assert (
        result.stderr.count("\n") == 1
        and result.stderr.startswith("error: ")
        and named in result.stderr
    )


def test_a_model_without_a_chat_template_is_named_and_the_way_out(
    checkpoint: Path, tmp_path: Path
) -> None:
    for file in (checkpoint / "base").iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    result = chat(str(tmp_path), lines=["hi"])
    assert (
        result.exit_code == 2
        and "no chat template" in result.stderr
        and "idlm generate" in result.stderr
    )


def test_our_server_answers_as_the_model_itself(url: str) -> None:
    lines = [QUESTION, "/ar", "/reset", QUESTION, "/ar", QUESTION]
    here, there = (
        chat("nano", *GREEDY, lines=lines),
        chat("--url", url, "--api-key", "k", *REMOTE, lines=lines),
    )
    assert there.exit_code == 0 and there.stdout == here.stdout, there.output
    assert TPF.findall(there.stderr)[1] == "1.00" != TPF.findall(there.stderr)[0]


def test_our_server_with_a_full_context(url: str) -> None:
    result = chat("--url", url, "--api-key", "k", *REMOTE, lines=LONG)
    assert result.exit_code == 0 and len(TPF.findall(result.stderr)) == 4
    assert "turns forgotten" in result.stderr and "say less" in result.stderr


def test_what_our_server_refuses_is_one_line(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    for arguments, named in (
        (["--api-key", "bad"], "--api-key"),
        ([], "--api-key"),
        (["--model", "x"], "x"),
    ):
        key = ["--api-key", "k"] if "--model" in arguments else []
        result = chat("--url", url, *key, *arguments, lines=[QUESTION])
        assert result.exit_code == 2 and result.stderr.count("\n") == 1 and named in result.stderr
    monkeypatch.setenv("IDLM_API_KEY", "k")
    assert chat("--url", url, "--model", "small:ar", *REMOTE, lines=["hi"]).exit_code == 0


class Terminal:
    """The other end of a terminal."""

    def __init__(self, file: int) -> None:
        self._file, self._seen = file, b""

    def wait_for(self, *wanted: bytes) -> None:
        """Read up to these, one after the other."""
        for one in wanted:
            self.first_of(one)

    def first_of(self, *wanted: bytes) -> bytes:
        """Read up to the first of these, and return it."""
        while not any(one in self._seen for one in wanted):
            assert select.select([self._file], [], [], HANG_SECONDS)[0], self._seen
            self._seen += os.read(self._file, 65536)
        first = min(wanted, key=lambda one: self._seen.find(one) % (1 << 30))
        self._seen = self._seen.partition(first)[2]
        return first

    def type(self, keys: bytes) -> None:
        os.write(self._file, keys)


@contextmanager
def on_a_terminal(*arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], Terminal]]:
    """A chat with a terminal."""
    ours, theirs = pty.openpty()
    program = [
        sys.executable,
        "-c",
        "from idlm.cli import app; app(prog_name='idlm')",
        "chat",
        *arguments,
    ]
    settings = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    settings |= {"TERM": "xterm-256color", "COLUMNS": "200"}
    with subprocess.Popen(
        program, stdin=theirs, stdout=theirs, stderr=theirs, env=settings
    ) as process:
        os.close(theirs)
        try:
            yield process, Terminal(ours)
        finally:
            process.kill()
            os.close(ours)


@pytest.mark.parametrize("where", ["here", "there"])
def test_on_a_terminal_tokens_have_colours_and_ctrl_c_ends_the_answer_only(
    where: str, url: str
) -> None:
    who = ["nano"] if where == "here" else ["--url", url, "--api-key", "k"]
    long = ("--temperature", "0", "--ignore-eos", "--max-tokens", "300")
    with on_a_terminal(*who, "--colors", *long) as (process, terminal):
        terminal.wait_for(b"> ")
        for _ in range(50):  # on a fast machine an answer may end before the signal comes
            terminal.type(QUESTION.encode() + b"\n")
            terminal.wait_for(b"\x1b[32m")  # an accepted draft is green
            process.send_signal(signal.SIGINT)
            if terminal.first_of(b"interrupted", b"ctrl-D ends the chat") == b"interrupted":
                break
            terminal.wait_for(b"> ")
        else:
            pytest.fail("no answer was interrupted")
        terminal.wait_for(b"> ")
        terminal.type(b"/reset\n")
        terminal.wait_for(b"a new conversation", b"> ")
        terminal.type(b"\x04")  # ctrl-D
        assert process.wait(HANG_SECONDS) == 0


class Foreign(BaseHTTPRequestHandler):
    """Another server with OpenAI's API: no /tokenize, and at most two turns."""

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        models = [{"id": "theirs", "object": "model", "created": 0, "owned_by": "them"}]
        self._send(200, json.dumps({"object": "list", "data": models}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        assert "idlm" not in body
        if len(body["messages"]) > 3:
            error = {"message": "This model's maximum context length is 10 tokens.", "code": 400}
            self._send(400, json.dumps({"error": error}).encode())
            return
        text = f"{len(body['messages'])} messages, top_k {body.get('top_k')}\x1b[2J"
        chunk = {
            "choices": [{"index": 0, "delta": {"content": text}}],
            "id": "1",
            "created": 0,
            "model": "theirs",
        }
        breaks = "break" in body["messages"][-1]["content"]
        last = (
            b'data: {"error": {"message": "out of steam"}}\n\n' if breaks else b"data: [DONE]\n\n"
        )
        self._send(
            200, b"data: " + json.dumps(chunk).encode() + b"\n\n" + last, "text/event-stream"
        )

    def _send(self, status: int, body: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def foreign() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Foreign) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        server.shutdown()
        thread.join()


def test_any_server_with_this_api_will_do(foreign: str) -> None:
    result = chat(
        "--url", foreign, "--top-k", "7", lines=["a", "b", "break", "c", "/ar", "/colors", "d"]
    )
    assert result.exit_code == 0, result.output
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["1", "3", "3", "3", "3"]
    assert "top_k 7" in result.stdout and "\x1b" not in result.stdout
    for said in (
        "turns forgotten",
        "out of steam",
        "no drafting to switch off",
        "does not say where tokens come from",
    ):
        assert said in result.stderr


@pytest.mark.parametrize("options, fields", [
    ({}, {"max_tokens": 256, "extra_body": {}}),
    (
        {"temperature": 1.0, "top_p": 1.0, "max_tokens": 9, "stop": ["a"]},
        {"temperature": 1.0, "top_p": 1.0, "max_tokens": 9, "stop": ("a",), "extra_body": {}},
    ),
    (
        {"top_k": 0, "repetition_penalty": 1.0, "ignore_eos": True, "seed": 0},
        {
            "max_tokens": 256,
            "seed": 0,
            "extra_body": {"top_k": 0, "repetition_penalty": 1.0, "ignore_eos": True},
        },
    ),
])  # fmt: skip
def test_a_server_has_its_own_defaults(options: dict[str, Any], fields: dict[str, Any]) -> None:
    """Only what was given is sent, also where it is the default here."""
    assert request_fields(sampling_options(**options).given) == fields

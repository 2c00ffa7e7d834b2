"""docs/serving.md and docs/security.md match the server's fields, routes, metrics and limits."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from idlm.config import EngineConfig
from idlm.params import MOST_LOGPROBS
from idlm.serving import (
    adapters,
    apis,
    info,
    limits,
    page,
    schema,
    server,
    strict,
    supervisor,
    wire,
)
from idlm.serving.app import router
from idlm.serving.client import EngineClient
from idlm.serving.config import Limits, WorkerConfig
from idlm.serving.document import ERRORS
from idlm.serving.observe import Meters
from idlm.serving.schema import DEFAULT_MAX_TOKENS, CompletionRequest
from idlm.serving.schema_chat import ChatRequest
from idlm.serving.schema_messages import MessagesRequest
from idlm.serving.schema_responses import ResponsesRequest
from idlm.serving.schema_translated import Translated

DOCS = Path(__file__).parents[2] / "docs"
SERVING, SECURITY = ((DOCS / name).read_text() for name in ("serving.md", "security.md"))
BOUNDS = Limits()


def table(heading: str) -> list[list[str]]:
    """The cells of the table in a section of serving.md."""
    section = SERVING.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@pytest.mark.parametrize(("column", "request_type"), [(1, ChatRequest), (2, CompletionRequest)])
def test_the_table_of_fields_is_complete(
    column: int, request_type: type[schema.Generation]
) -> None:
    documented = [name for row in table("Fields") if row[column] for name in names(row[0])]
    assert sorted(documented) == sorted(request_type.model_fields)


def test_the_table_of_routes_is_complete() -> None:
    documented = {name.split()[1] for row in table("Routes") for name in names(row[0])}
    routers = router, apis.router, info.router, adapters.router, page.router
    routes = [route for one in routers for route in one.routes]
    there = {getattr(route, "path", "").replace(":path", "") for route in routes}
    assert documented == there | {"/openapi.json"}


@pytest.mark.parametrize("request_type", [ResponsesRequest, MessagesRequest])
def test_the_tables_of_the_other_apis_are_complete(request_type: type[schema.Generation]) -> None:
    """Of their own fields; extensions are those of chat."""
    title = request_type.__name__.removesuffix("Request")
    documented = {name for row in table(title) for name in names(row[0])}
    shared = Translated.model_fields.keys()
    assert request_type.model_fields.keys() - shared == documented - shared


def test_the_table_of_metrics_is_complete() -> None:
    text = Meters(EngineClient(WorkerConfig("nano"), BOUNDS)).render().decode()
    documented = [name for row in table("Metrics") for name in names(row[0])]
    assert sorted(documented) == sorted(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))


def test_the_table_of_errors_is_complete() -> None:
    documented = {int(status) for row in table("Errors") for status in row[0].split(", ")}
    assert documented == set(ERRORS) | {431}


def test_the_limits_are_the_defaults() -> None:
    documented = {
        names(row[0])[0]: row[1].split()[0] for row in table("Limits") if row[1][0].isdigit()
    }
    assert documented == {
        "--queue-requests": str(BOUNDS.queue_requests),
        "--queue-tokens": str(BOUNDS.queue_tokens),
        "--max-n": str(BOUNDS.n),
        "--max-prompts": str(BOUNDS.prompts),
        "--max-body": str(BOUNDS.body_bytes),
        "--timeout": f"{BOUNDS.timeout:g}",
        "--drain-seconds": f"{BOUNDS.drain_seconds:g}",
    }
    assert f"{DEFAULT_MAX_TOKENS} (completions)" in SERVING
    assert f"{schema.MOST_STOPS} texts at most, of {schema.LONGEST_STOP} characters" in SERVING


def test_the_numbers_of_the_threat_model_are_the_servers() -> None:
    said = " ".join(SECURITY.split())
    for claim in (
        f"Headers have {BOUNDS.header_seconds:g} s (408) "
        f"and {limits.HEADER_BYTES // 1024} KiB (431)",
        f"A body has {BOUNDS.body_seconds:g} s (408) and {BOUNDS.body_bytes} bytes (413)",
        f"{server.MOST_CONNECTIONS} connections at once",
        f"closed after {server.KEEP_ALIVE_SECONDS} s",
        f"full for {BOUNDS.body_seconds:g} s the connection is cut",
        f"{BOUNDS.queue_requests} samples and {BOUNDS.queue_tokens} tokens",
        f"{BOUNDS.n} samples of a prompt and {BOUNDS.prompts} prompts in a request",
        f"ends after {BOUNDS.timeout:g} s",
        f"deeper than {strict.DEEPEST} levels and no object with more than {strict.MOST_KEYS} keys",
        f"{schema.MOST_STOPS} stop texts of {schema.LONGEST_STOP} characters",
        f"{MOST_LOGPROBS} log-probabilities a token",
        f"have {BOUNDS.schema_bytes} bytes at most",
        f"frames of at most {wire.MAX_FRAME // 2**20} MiB",
        f"silent for {supervisor.STALL_SECONDS:g} s",
        f"{EngineConfig().page_size} tokens at a time",
    ):
        assert claim in said, claim


def test_links_lead_somewhere() -> None:
    for text in (SERVING, SECURITY):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
            assert (DOCS / target).exists(), target

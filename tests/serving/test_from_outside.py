"""The server from outside: the probe of deploy/, and a web page of another origin."""

from __future__ import annotations

import runpy
from pathlib import Path

import httpx2 as httpx
import pytest

from idlm.cli.serve import KEY_VARIABLE
from tests.serving.conftest import KEY, Running
from tests.waiting import HANG_SECONDS

PROBE = Path(__file__).parents[2] / "deploy" / "probe.py"


def test_the_probe_tells_a_server_that_is_ready(
    served: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = runpy.run_path(str(PROBE))["probe"]
    monkeypatch.setitem(probe.__globals__, "SECONDS", HANG_SECONDS)
    root = served.url.removesuffix("/v1")
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert probe("/health", root) == 0 and probe("/ready", root) == 1
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    assert probe("/ready", root) == 0 and probe("/none", root) == 1
    assert probe("/health", "http://127.0.0.1:9") == 1


@pytest.mark.parametrize(
    "content_type", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"]
)
def test_a_web_page_has_nothing_generated(http: httpx.Client, content_type: str | None) -> None:
    """With the content types that a browser sends to another origin without a preflight, and with
    one."""
    headers = {"Origin": "http://elsewhere.example"} | (
        {"Content-Type": content_type} if content_type else {}
    )
    answer = http.post(
        "/v1/completions", content=b'{"model": "nano", "prompt": "a"}', headers=headers
    )
    assert answer.status_code == 415
    asked = http.options("/v1/completions", headers={"Origin": "http://elsewhere.example"})
    assert asked.status_code == 405 and not any(
        name.startswith("access-control") for name in asked.headers
    )

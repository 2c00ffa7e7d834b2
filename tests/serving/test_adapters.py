"""/v1/load_lora_adapter and /v1/unload_lora_adapter, over a real server."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from idlm.config import EngineConfig
from idlm.serving.adapters import allowed
from idlm.serving.config import WorkerConfig
from idlm.serving.errors import ApiError
from idlm.serving.prompts import Prompts
from tests.serving.conftest import CONFIG, Running, running, workers
from tests.waiting import wait_until

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
TENSORS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def shelf(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a good adapter and others that have to be refused, and a secret beside."""
    place = tmp_path_factory.mktemp("shelf")
    root = place / "loras"

    def copied(name: str, folder: Path = root) -> Path:
        return Path(shutil.copytree(checkpoint / "lora", folder / name))

    def changed(name: str, change: Any) -> None:
        file = copied(name) / TENSORS
        save_file({key: change(key, tensor) for key, tensor in load_file(file).items()}, file)

    copied("good")
    copied("inner", root / "deep")
    copied("outside", place)
    (copied("no tensors") / TENSORS).unlink()
    (copied("no config") / "adapter_config.json").unlink()
    (copied("no mask row") / "mask_row.safetensors").unlink()
    (copied("cut") / TENSORS).write_bytes((checkpoint / "lora" / TENSORS).read_bytes()[:-7])
    (copied("no safetensors") / TENSORS).write_bytes(b"\x10" * 999)
    (copied("no json") / "adapter_config.json").write_text("{")
    changed("wide", lambda _, tensor: torch.cat([tensor, tensor], dim=-1))
    changed("nan", lambda _, tensor: tensor * float("nan"))
    changed("other layers", lambda _, tensor: tensor)
    file = root / "other layers" / TENSORS
    save_file({k.replace("q_proj", "r_proj"): t for k, t in load_file(file).items()}, file)
    for name, key, value in (
        ("other base", "base_fingerprint", "0" * 64),
        ("other mask", "mask_token_id", 7),
    ):
        path = copied(name) / "idlm.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    settings_file = copied("other rank") / "adapter_config.json"
    settings_file.write_text(json.dumps(json.loads(settings_file.read_text()) | {"r": 5}))
    (root / "link in").symlink_to(root / "good")
    (root / "link out").symlink_to(place / "outside")
    (root / "loop").symlink_to(root / "loop")
    (copied("file out") / TENSORS).unlink()
    (root / "file out" / TENSORS).symlink_to(place / "outside" / TENSORS)
    (root / "a file").write_text("x")
    return root


@pytest.fixture(scope="module")
def server(checkpoint: Path, shelf: Path) -> Iterator[Running]:
    """Without an adapter at its start."""
    base = str(checkpoint / "base")
    engine = EngineConfig(branches="all", max_num_seqs=4, threads=1, kv_memory="16MiB")
    worker = WorkerConfig(base, dtype="float64", engine=engine, lora_dirs=(str(shelf),))
    config = replace(CONFIG, worker=worker, name="base")
    with running(Prompts.load(base), engine=True, config=config) as started:
        yield started


@pytest.fixture
def http(server: Running) -> Iterator[httpx.Client]:
    """A client; what a test has loaded is unloaded."""
    with server.open() as client:
        yield client
        for name in set(models(client)) - {"base", "base:ar"}:
            assert unload(client, name).status_code == 200


def models(http: httpx.Client) -> list[str]:
    return [card["id"] for card in http.get("/v1/models").json()["data"]]


def load(http: httpx.Client, name: str, path: str = "good", **more: Any) -> httpx.Response:
    return http.post(LOAD, json={"lora_name": name, "lora_path": path} | more)


def unload(http: httpx.Client, name: str) -> httpx.Response:
    return http.post(UNLOAD, json={"lora_name": name})


def ask(http: httpx.Client, model: str, max_tokens: int = 30) -> tuple[str, int]:
    """The text, and the number of forwards that verified drafts."""
    body = {"model": model, "prompt": "Tom has", "seed": 5, "max_tokens": max_tokens}
    answer = http.post("/v1/completions", json=body | {"ignore_eos": True}).json()
    metrics = answer["metrics"]["speculative_decoding"]
    return answer["choices"][0]["text"], metrics["num_spec_steps"]


def message(answer: httpx.Response, status: int) -> str:
    assert answer.status_code == status, answer.text
    text: str = answer.json()["error"]["message"]
    return text


def test_load_ask_unload(http: httpx.Client) -> None:
    plain, drafted = ask(http, "base")
    assert drafted == 0, "there is no adapter yet"
    answer = load(http, "math")
    assert answer.status_code == 200
    assert answer.text == "Success: LoRA adapter 'math' added successfully."
    assert models(http) == ["base", "base:ar", "math"]
    document = http.get("/openapi.json").json()
    names = document["components"]["schemas"]["ChatRequest"]["properties"]["model"]["enum"]
    assert names == [*models(http), None], "the model may be left out"
    text, drafted = ask(http, "math")
    assert text == plain and drafted > 0
    assert ask(http, "base") == (plain, 0)

    assert "'math' is taken" in message(load(http, "math"), 400)
    answer = unload(http, "math")
    assert answer.status_code == 200
    assert answer.text == "Success: LoRA adapter 'math' removed successfully."
    assert models(http) == ["base", "base:ar"]
    assert "'math' is not served" in message(
        http.post("/v1/completions", json={"model": "math", "prompt": "x"}), 404
    )
    assert "'math' is not loaded" in message(unload(http, "math"), 404)
    assert load(http, "math", "deep/inner").status_code == 200, "again, from another folder"
    assert ask(http, "math")[0] == plain


def test_requests_in_flight_are_not_touched(http: httpx.Client, server: Running) -> None:
    load(http, "math")
    want = {name: ask(http, name, 120) for name in ("base", "math")}
    body = {"prompt": "Tom has", "seed": 5, "max_tokens": 120, "ignore_eos": True, "stream": True}
    with server.open() as other:
        streams = []
        for name in want:
            request = other.build_request("POST", "/v1/completions", json=body | {"model": name})
            streams.append(other.send(request, stream=True))
        assert load(http, "late").status_code == 200
        assert unload(http, "math").status_code == 200
        for name, stream in zip(want, streams, strict=True):
            events = [line.removeprefix("data: ") for line in stream.iter_lines() if line]
            assert events[-1] == "[DONE]"
            chunks = [json.loads(event) for event in events[:-1]]
            assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == want[name][0]
    assert ask(http, "late", 120) == want["math"]


REFUSED = {
    # path: the status, and what the message must name
    "nowhere": (400, "nowhere"),
    "a file": (400, "a file"),
    "": (400, "lora_path"),
    ".": (400, "no folder"),
    "no tensors": (400, TENSORS),
    "no config": (400, "adapter_config.json"),
    "no mask row": (400, "mask_row.safetensors"),
    "cut": (400, "bytes"),
    "no safetensors": (400, "truncated"),
    "no json": (400, "JSON"),
    "wide": (400, "has shape"),
    "nan": (400, "not finite"),
    "other layers": (400, "r_proj"),
    "other base": (400, "fingerprint"),
    "other mask": (400, "mask_token_id 7"),
    "other rank": (400, "has shape"),
    "../outside": (403, "outside"),
    "good/../../outside": (403, "outside"),
    "link out": (403, "outside"),
    "file out": (403, "outside"),
    "loop": (403, "outside"),
    "/etc": (403, "outside"),
    "/etc/nowhere-at-all": (403, "outside"),
    "x" * 4000: (403, "outside"),
    "good\0": (403, "outside"),
}


@pytest.mark.parametrize("path", REFUSED, ids=lambda path: path[:20])
def test_what_is_refused(path: str, http: httpx.Client) -> None:
    status, named = REFUSED[path]
    before = ask(http, "base", 5)
    answer = load(http, "bad", path)
    assert named in message(answer, status)
    assert models(http) == ["base", "base:ar"] and ask(http, "base", 5) == before


def test_the_path_may_be_absolute_or_a_link_inside(http: httpx.Client, shelf: Path) -> None:
    assert load(http, "one", str(shelf / "good")).status_code == 200
    assert load(http, "two", "link in").status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"lora_name": "x"},
        {"lora_name": "", "lora_path": "good"},
        {"lora_name": "x" * 129, "lora_path": "good"},
        {"lora_name": "a\nb", "lora_path": "good"},
        {"lora_name": " a", "lora_path": "good"},
        {"lora_name": 5, "lora_path": "good"},
        {"lora_name": "base", "lora_path": "good"},
        {"lora_name": "base:ar", "lora_path": "good"},
        {"lora_name": "default", "lora_path": "good"},
        {"lora_name": "x", "lora_path": ["good"]},
        {"lora_name": "x", "lora_path": "good", "load_inplace": True},
        {"lora_name": "x", "lora_path": "good", "more": 1},
    ],
)
def test_bad_bodies(body: dict[str, Any], http: httpx.Client) -> None:
    assert message(http.post(LOAD, json=body), 400)
    assert models(http) == ["base", "base:ar"]


def test_keys_and_names_that_cannot_be_unloaded(http: httpx.Client, server: Running) -> None:
    for name in ("base", "base:ar", "default", "nothing"):
        assert f"{name!r} is not loaded" in message(unload(http, name), 404)
    with server.open(key=None) as stranger:
        assert load(stranger, "x").status_code == unload(stranger, "x").status_code == 401


def test_it_is_off_by_default(served: Running) -> None:
    with served.open() as client:
        assert load(client, "x").status_code == unload(client, "math").status_code == 404
        assert LOAD not in client.get("/openapi.json").json()["paths"]


def test_another_engine_has_the_same_adapters(http: httpx.Client, server: Running) -> None:
    plain = ask(http, "base")
    for name in ("kept", "dropped"):
        assert load(http, name).status_code == 200
    unload(http, "dropped")
    drafted = ask(http, "kept")
    restarts = server.client.restarts
    for process in workers():
        if str(server.client.config.model) in " ".join(process.cmdline()):
            os.kill(process.pid, signal.SIGKILL)
    wait_until(lambda: server.client.restarts > restarts and server.client.ready)
    assert models(http) == ["base", "base:ar", "kept"]
    assert ask(http, "kept") == drafted and ask(http, "base") == plain


PIECES = st.sampled_from(
    ["..", ".", "good", "deep", "inner", "link in", "link out", "outside", "loras", "~", "", "\0"]
)


@settings(max_examples=300)
@given(st.lists(PIECES, max_size=7).map("/".join) | st.text(max_size=60), st.booleans())
def test_no_path_leads_out(shelf: Path, path: str, absolute: bool) -> None:
    root = shelf.resolve()
    try:
        found = allowed(f"{root}/{path}" if absolute else path, (str(root),))
    except ApiError as error:
        assert error.status_code in (400, 403)
    else:
        assert found.is_dir() and root in found.resolve().parents

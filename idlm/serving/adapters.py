"""Adapters at run time: from which folders they may come, and under which names.

It is off unless the server was started with directories for it. Whoever has a key can use it.
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import Request, Response
from pydantic import Field

from idlm.models import heads
from idlm.models.adapter import CONFIG, EXTRA, MASK_ROW, TENSORS
from idlm.serving import responses
from idlm.serving.document import READS, answers, strict_router
from idlm.serving.errors import ApiError
from idlm.serving.jobs import Server, the_server
from idlm.serving.strict import Boolean, Strict
from idlm.serving.wire import LoadAdapter, UnloadAdapter

FILES = (CONFIG, TENSORS, EXTRA, MASK_ROW, heads.FILE)
SENTENCE: dict[int | str, dict[str, Any]] = {
    200: {"description": "Done.", "content": {"text/plain": {}}}
}
router = strict_router()
Name = Annotated[str, Field(min_length=1, max_length=128)]


class LoadRequest(Strict):
    """vLLM's body of /v1/load_lora_adapter."""

    lora_name: Name
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    load_inplace: Annotated[Literal[False], Boolean] = False


class UnloadRequest(Strict):
    """vLLM's body of /v1/unload_lora_adapter; the number is not used."""

    lora_name: Name
    lora_int_id: int | None = None


@router.post(
    "/v1/load_lora_adapter", responses=answers(responses.Status, *READS, 403, 503) | SENTENCE
)
async def load_lora_adapter(request: Request, body: LoadRequest) -> Response:
    """Load an adapter from a directory that was named at the start."""
    sentence = await load(the_server(request), body)
    request.app.openapi_schema = None  # it lists the models
    return Response(sentence, media_type="text/plain")


@router.post(
    "/v1/unload_lora_adapter", responses=answers(responses.Status, *READS, 404, 503) | SENTENCE
)
async def unload_lora_adapter(request: Request, body: UnloadRequest) -> Response:
    """Take an adapter's name away; requests that run with it end with it."""
    sentence = await unload(the_server(request), body)
    request.app.openapi_schema = None
    return Response(sentence, media_type="text/plain")


async def load(server: Server, body: LoadRequest) -> str:
    """Load an adapter under a new name; returns vLLM's sentence.

    Raises:
        ApiError: 400: the name is taken, or the engine refuses the adapter, which then has changed
            nothing; 403: the path is not allowed. EngineDown: there is no engine now.
    """
    name = body.lora_name
    if not name.isprintable() or name != name.strip():
        raise ApiError(400, f"lora_name {name!r} is no name; use printable characters", "lora_name")
    server.engine()
    if name in server.targets or name == "default":
        raise ApiError(
            400,
            f"lora_name {name!r} is taken; unload that adapter first, or use another name",
            "lora_name",
        )
    folder = allowed(body.lora_path, server.config.worker.lora_dirs)
    error = await server.client.change(LoadAdapter(secrets.token_hex(8), name, str(folder)))
    if error is not None:
        raise ApiError(400, error, "lora_path")
    return f"Success: LoRA adapter '{name}' added successfully."


async def unload(server: Server, body: UnloadRequest) -> str:
    """Take an adapter's name away; returns vLLM's sentence.

    Raises:
        ApiError: 404: there is no such adapter. EngineDown: there is no engine now.
    """
    name = body.lora_name
    server.engine()
    error = (
        await server.client.change(UnloadAdapter(secrets.token_hex(8), name))
        if name in server.client.adapters
        else f"adapter {name!r} is not loaded; GET /v1/models lists those that are"
    )
    if error is not None:
        raise ApiError(404, error, "lora_name", "model_not_found")
    return f"Success: LoRA adapter '{name}' removed successfully."


def allowed(path: str, directories: tuple[str, ...]) -> Path:
    """The real folder of `path`, which may be relative to one of the directories.

    Raises:
        ApiError: 403: the folder, or a file of it, is outside the directories; whether it exists is
            not said. 400: it is inside and there is no such folder.
    """
    refused = ApiError(
        403, f"lora_path {path[:200]!r} is outside the directories of --lora-dir", "lora_path"
    )
    missing = None
    for directory in directories:
        try:
            root = Path(directory).resolve(strict=True)
            folder = (root / path).resolve()
            if not folder.is_relative_to(root):
                continue
            if folder == root or not folder.is_dir():
                missing = ApiError(400, f"lora_path {path[:200]!r} is no folder", "lora_path")
                continue
            if not all((folder / file).resolve().is_relative_to(root) for file in FILES):
                raise refused
            return folder
        except (OSError, RuntimeError, ValueError):  # a loop of links, a name too long, a NUL
            continue
    raise missing or refused

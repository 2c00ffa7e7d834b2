"""`idlm serve MODEL`: an OpenAI-compatible server."""

from __future__ import annotations

import ipaddress
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import typer

from idlm.cli import common, drafts
from idlm.errors import InputError
from idlm.extras import need
from idlm.serving.config import AR_SUFFIX, WAITING_ROOM, Limits, ServeConfig, WorkerConfig

KEY_VARIABLE = "IDLM_API_KEY"
BOUNDS = Limits()
MOST_PORT = 65535


def _option(panel: str, help: str, **settings: Any) -> Any:
    return typer.Option(help=help, rich_help_panel=panel, **settings)


def serve(
    model: common.Model,
    adapter: Annotated[
        list[str] | None,
        _option("Model", "A gated LoRA and its name; can be repeated.", metavar="NAME=PATH"),
    ] = None,
    lora_dir: Annotated[
        list[str] | None,
        _option(
            "Model",
            "Adapters may be loaded from here while the server runs; can be repeated.",
            metavar="FOLDER",
        ),
    ] = None,
    host: Annotated[str, _option("Network", "The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, _option("Network", "The port; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        _option("Network", f"A key that opens all routes; can be repeated. Or ${KEY_VARIABLE}."),
    ] = None,
    allowed_origins: Annotated[
        list[str] | None,
        _option(
            "Network",
            "A web page's origin that may use the server, a JSON list of them, or *; can be "
            "repeated.",
            metavar="ORIGIN",
        ),
    ] = None,
    name: Annotated[
        str | None, _option("Model", "What requests call the model; MODEL if not given.")
    ] = None,
    reasoning_parser: Annotated[
        str,
        _option("Model", "How thoughts are told from the answer: auto, none, qwen3, deepseek_r1."),
    ] = "auto",
    stride: drafts.Stride = None,
    branches: drafts.Branches = None,
    draft_source: drafts.Source = None,
    dtype: common.Dtype = "auto",
    device: common.Device = "cpu",
    max_model_len: common.MaxModelLen = None,
    max_num_seqs: Annotated[int, _option("Engine", "The most samples at once; others wait.")] = 64,
    kv_memory: Annotated[
        str | None, _option("Engine", "Memory of the KV cache: bytes, or such as 512MiB.")
    ] = None,
    tensor_parallel_size: Annotated[
        int, _option("Engine", "The GPUs, or CPU processes, that hold a part of the model each.")
    ] = 1,
    threads: Annotated[
        int | None, _option("Engine", "Threads of the engine; measured if not given.")
    ] = None,
    weights: common.Weights = "auto",
    generation_config: Annotated[
        Literal["auto", "none"],
        _option("Model", "Whether its generation_config.json gives the defaults of requests."),
    ] = "auto",
    deterministic: Annotated[
        bool, _option("Engine", "Batch-invariant kernels: the same bytes, slower.")
    ] = False,
    logprobs_mode: Annotated[
        Literal["processed_logprobs", "raw_logprobs"],
        _option("Engine", "Log-probabilities of the law that tokens are chosen by; the model's."),
    ] = "processed_logprobs",
    salt_by_key: Annotated[
        bool, _option("Network", "Share cached prefixes only within a key.")
    ] = False,
    log_prompts: Annotated[
        bool, _option("Network", "Write prompts and outputs to the log.")
    ] = False,
    ui: Annotated[bool, _option("Network", "Give the playground at /, a page for people.")] = False,
    vllm_metrics: Annotated[
        bool, _option("Network", "Give /metrics under vLLM's names too, for its boards and tools.")
    ] = False,
    parse_special: Annotated[
        bool, _option("Network", "Special strings in a completions prompt are special tokens.")
    ] = False,
    queue_requests: Annotated[
        int | None,
        _option("Limits", "Samples running or waiting.", show_default="4 x max-num-seqs"),
    ] = None,
    queue_tokens: Annotated[
        int, _option("Limits", "Tokens that they may come to.")
    ] = BOUNDS.queue_tokens,
    max_tokens: Annotated[
        int | None, _option("Limits", "Tokens of a sample.", show_default="the context")
    ] = None,
    max_n: Annotated[int, _option("Limits", "Samples of a prompt.")] = BOUNDS.n,
    max_prompts: Annotated[int, _option("Limits", "Prompts of a request.")] = BOUNDS.prompts,
    max_body: Annotated[int, _option("Limits", "Bytes of a request.")] = BOUNDS.body_bytes,
    timeout: Annotated[float, _option("Limits", "Seconds of a request.")] = BOUNDS.timeout,
    drain_seconds: Annotated[
        float, _option("Limits", "For what runs when the server ends.")
    ] = BOUNDS.drain_seconds,
) -> None:
    """Serve a model over an OpenAI-compatible API."""
    need("serve", "idlm serve")
    room = max(WAITING_ROOM * max_num_seqs, max_n, max_prompts)
    queue = room if queue_requests is None else queue_requests
    bounds = (queue, queue_tokens, max_tokens, max_n, max_prompts, max_body)
    limits = Limits(*bounds, timeout=timeout, drain_seconds=drain_seconds)
    _check(limits)
    _at_least("--max-num-seqs", max_num_seqs, 1)
    _at_least("--threads", 1 if threads is None else threads, 1)
    _at_least("--tensor-parallel-size", tensor_parallel_size, 1)
    wanted = drafts.Drafts(stride, branches, draft_source)
    engine = wanted.config(
        max_num_seqs=max_num_seqs,
        kv_memory=kv_memory,
        deterministic=deterministic,
        weights=weights,
        logprobs_mode=logprobs_mode,
        threads=threads,
        max_model_len=max_model_len,
        tensor_parallel_size=tensor_parallel_size,
        generation_config=generation_config,
    )
    adapters = _adapters(adapter or [])
    worker = WorkerConfig(model, adapters, dtype, device, engine, _directories(lora_dir or []))
    keys = _keys(api_key or [])
    name = _name(name or model, adapters)
    config = ServeConfig(
        worker,
        name,
        host,
        port,
        keys,
        salt_by_key,
        log_prompts,
        parse_special,
        limits,
        _origins(allowed_origins or []),
        reasoning_parser,
        vllm_metrics,
        ui,
    )
    check_port(port)
    launch(config, wanted)


def launch(
    config: ServeConfig, wanted: drafts.Drafts, opened: Callable[[str], None] | None = None
) -> None:
    """Serve until a signal. `opened` is called with the page's URL once the engine is ready.

    Raises:
        InputError: the address is not available, or the model cannot be served as configured.
    """
    from idlm.serving.server import bind, serve

    worker = config.worker
    engine, later = worker.engine, bool(worker.lora_dirs)
    bind(config.host, config.port).close()  # an address that cannot be used is said first
    if later:  # adapters that come later draft
        wanted = drafts.Drafts(None, None, wanted.source)
    folders = [*worker.adapters.values()]
    checked, ordinary = drafts.checked(
        wanted, engine, worker.model, folders, worker.dtype, worker.device
    )
    config = replace(config, worker=replace(worker, engine=engine if later else checked))

    def announce(url: str) -> None:
        _announce(config, url, ordinary)
        if opened is not None:
            opened(_page(url))

    serve(config, announce)


def _page(url: str) -> str:
    """The playground's URL, from the API's."""
    return url.removesuffix("v1")


def _announce(config: ServeConfig, url: str, ordinary: bool) -> None:
    """Print the URL, and a warning if others can reach a server without a key. `ordinary`: the
    model was not trained to draft."""
    if ordinary:
        drafts.say_lookup(config.worker.model)
    if not config.api_keys and not _is_loopback(config.host):
        typer.echo(
            f"warning: {config.host} can be reached by others, and there is no key; give --api-key",
            err=True,
        )
    if config.ui:
        typer.echo(f"the page is at {_page(url)}")
    typer.echo(f"idlm serves {config.name} at {url}")


def check_port(port: int) -> None:
    """Refuse a number that is no port.

    Raises:
        InputError: it is none.
    """
    if not 0 <= port <= MOST_PORT:
        raise InputError(f"--port {port} is no port; use 0 to {MOST_PORT}")


def _check(limits: Limits) -> None:
    counts = {
        "--queue-requests": limits.queue_requests,
        "--queue-tokens": limits.queue_tokens,
        "--max-tokens": 1 if limits.max_tokens is None else limits.max_tokens,
        "--max-n": limits.n,
        "--max-prompts": limits.prompts,
        "--max-body": limits.body_bytes,
    }
    for option, count in counts.items():
        _at_least(option, count, 1)
    for option, seconds in (
        ("--timeout", limits.timeout),
        ("--drain-seconds", limits.drain_seconds),
    ):
        if not 0 < seconds < float("inf"):
            raise InputError(f"{option} {seconds} is no length of time; give seconds above 0")


def _at_least(option: str, value: int, least: int) -> int:
    if value < least:
        raise InputError(f"{option} {value} is too small; use {least} or more")
    return value


def _adapters(entries: list[str]) -> dict[str, str]:
    adapters: dict[str, str] = {}
    for entry in entries:
        name, _, path = entry.partition("=")
        if not name or not path:
            raise InputError(
                f"--adapter {entry!r} is not NAME=PATH; write for example --adapter math=runs/math"
            )
        if name in adapters:
            raise InputError(f"--adapter {name!r} is given twice; use two names")
        adapters[name] = path
    return adapters


def _directories(folders: list[str]) -> tuple[str, ...]:
    for folder in folders:
        if not Path(folder).is_dir():
            raise InputError(f"--lora-dir {folder!r} is no folder; name one that holds adapters")
    return tuple(str(Path(folder).resolve()) for folder in folders)


def _name(name: str, adapters: dict[str, str]) -> str:
    """The model's name, which must differ from those of the adapters."""
    if not name.strip():
        raise InputError("--name is empty; give a name, or leave the option out")
    taken = {name, name + AR_SUFFIX, "default"} & set(adapters)
    if taken:
        raise InputError(
            f"--adapter {min(taken)!r} has a name that means something else; use another"
        )
    return name


def _keys(options: list[str]) -> tuple[str, ...]:
    keys = options or [os.environ[name] for name in (KEY_VARIABLE,) if name in os.environ]
    for key in keys:
        if not key.isascii() or not key.isprintable() or not key or " " in key:
            raise InputError(
                "an API key is empty, or holds what no header can; "
                f"use letters and digits ({len(key)} long)"
            )
    return tuple(keys)


def _origins(options: list[str]) -> tuple[str, ...]:
    """Origins, each option one or a JSON list of them, as vLLM takes them."""
    found: list[str] = []
    for option in options:
        try:
            value = json.loads(option) if option.startswith("[") else [option]
        except ValueError:
            value = [None]
        for origin in value:
            parts = urlsplit(origin) if isinstance(origin, str) else None
            whole = parts is not None and origin == f"{parts.scheme}://{parts.netloc}"
            if origin != "*" and not (parts and whole and parts.scheme and parts.netloc):
                raise InputError(
                    f"--allowed-origins {option!r} is no origin; write for example "
                    "https://example.org, a JSON list of such, or *"
                )
            found.append(origin)
    return tuple(found)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

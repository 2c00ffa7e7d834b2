"""`ServeConfig`: the options of `idlm serve`, with defaults and bounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from idlm.config import EngineConfig

WAITING_ROOM = 4
"""Samples in the queue for each slot of the engine."""
AR_SUFFIX = ":ar"
"""A `model` name with this suffix decodes without drafts, in the same engine."""


@dataclass(frozen=True)
class WorkerConfig:
    """What the engine's process is started with; the names are those of `LLM`.

    Attributes:
        lora_dirs: the directories from which adapters can be loaded at run time; none: they cannot.
        loaded: adapters that were loaded at run time, for a process that takes another's place.
    """

    model: str
    adapters: Mapping[str, str] = field(default_factory=dict)
    dtype: str = "auto"
    device: str = "cpu"
    engine: EngineConfig = field(default_factory=EngineConfig)
    lora_dirs: tuple[str, ...] = ()
    loaded: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Limits:
    """Bounds on one request and on all requests together; see docs/security.md.

    Attributes:
        queue_requests: samples in the engine at once, running or waiting; more are answered 429.
            The default is several times the engine's slots, so that a burst waits and is not sent
            away. A longer queue delays the first token of every later sample.
        queue_tokens: prompt tokens plus max_tokens of those samples; it bounds the memory that they
            take before they run.
        max_tokens: of one sample; None: what the context leaves.
        n: samples of one request.
        prompts: prompts of one completions request.
        body_bytes: size of a request body.
        body_seconds: time to send a body, and to read a full output buffer.
        header_seconds: time to send the request line and the headers.
        timeout: seconds for a request; a request can only ask for less.
        schema_bytes: size of a JSON schema, regular expression or grammar; llguidance itself bounds
            its compilation.
        drain_seconds: how long running requests may continue after SIGTERM.
    """

    queue_requests: int = WAITING_ROOM * EngineConfig.max_num_seqs
    queue_tokens: int = 16_000_000
    max_tokens: int | None = None
    n: int = 128
    prompts: int = 64
    body_bytes: int = 4 * 2**20
    body_seconds: float = 10.0
    header_seconds: float = 10.0
    timeout: float = 600.0
    schema_bytes: int = 64 * 1024
    drain_seconds: float = 30.0


@dataclass(frozen=True)
class ServeConfig:
    """The whole server.

    Attributes:
        name: of the model in requests; adapters have their own names.
        api_keys: any of them opens every route; without keys all routes are open. /health, /ping
            and the page /docs need none.
        salt_by_key: requests share cached prefixes only with those of the same key.
        log_prompts: write prompts and outputs to the log.
        parse_special: special strings in a completions prompt are special tokens, unless the
            request says otherwise.
        allowed_origins: of web pages that may use the server, or "*"; none by default.
        reasoning_parser: how thoughts are told from the answer; one of `reasoning.PARSERS`.
        vllm_metrics: give the metrics under vLLM's names too.
        ui: give the playground at /.
    """

    worker: WorkerConfig
    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    salt_by_key: bool = False
    log_prompts: bool = False
    parse_special: bool = False
    limits: Limits = field(default_factory=Limits)
    allowed_origins: tuple[str, ...] = ()
    reasoning_parser: str = "auto"
    vllm_metrics: bool = False
    ui: bool = False

"""`ServeConfig`: what `idlm serve` can be told, with its defaults and bounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from idlm.config import EngineConfig

AR_SUFFIX = ":ar"
"""`model` names with this ending decode without drafts, in the same engine."""


@dataclass(frozen=True)
class WorkerConfig:
    """What the engine's process is started with; the names are those of `LLM`."""

    model: str
    adapters: Mapping[str, str] = field(default_factory=dict)
    dtype: str = "auto"
    device: str = "cpu"
    engine: EngineConfig = field(default_factory=EngineConfig)


@dataclass(frozen=True)
class Limits:
    """Bounds on what one request and all requests together may take; see docs/security.md.

    Attributes:
        queue_requests, queue_tokens: samples, and prompt tokens plus max_tokens of them, that may
            be with the engine at once, running or waiting; more are answered 429. As many samples
            as the engine has slots: none waits for one, so whatever the load, those that are
            accepted are as quick as with all slots busy. Room to wait in delays the first token of
            all that come later.
        max_tokens: of one sample; None: what the context leaves.
        n: samples of one request; prompts: of one completions request.
        body_bytes: of a request; body_seconds: to send it in, and to read what waits of an answer.
        header_seconds: to send the first line and the headers in.
        timeout: seconds a request may take; its own `timeout` may only be lower.
        schema_bytes: of a JSON schema, regular expression or grammar; llguidance's own limits bound
            its compilation.
        drain_seconds: what running requests get after SIGTERM.
    """

    queue_requests: int = EngineConfig.max_num_seqs
    queue_tokens: int = 1_000_000
    max_tokens: int | None = None
    n: int = 8
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
        name: under which the model is served; the adapters are served under theirs.
        api_keys: any of them opens every route but /health; none: all routes are open.
        salt_by_key: requests share cached prefixes only with those of the same key.
        log_prompts: write prompts and outputs to the log.
    """

    worker: WorkerConfig
    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    salt_by_key: bool = False
    log_prompts: bool = False
    limits: Limits = field(default_factory=Limits)

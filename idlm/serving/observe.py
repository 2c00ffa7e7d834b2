"""Logs (one JSON object a line on stderr) and Prometheus metrics.

No line holds a prompt or an output unless `ServeConfig.log_prompts` is set.
"""

from __future__ import annotations

import atexit
import logging
import logging.config
import os
import re
import secrets
import sys
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from time import perf_counter
from typing import Any

import msgspec
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from idlm.serving.client import EngineClient
from idlm.serving.errors import ApiError
from idlm.serving.vllm_metrics import VllmCollector, VllmMeters
from idlm.serving.wire import Delta, Finished, Stats

disable_created_metrics()
access = logging.getLogger("idlm.serving.access")
errors = logging.getLogger("idlm.serving")
STDERR = 2
REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
QUIET = ("/health", "/ping", "/ready", "/metrics", "/load", "/v1/loads")
"""Paths that monitors poll every few seconds; they are logged only if they fail."""
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)
TOKEN_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)

GAUGES = {
    "running": ("idlm_samples_running", "Samples in a slot of the engine."),
    "waiting": ("idlm_samples_waiting", "Samples that wait for a slot."),
    "pages_total": ("idlm_kv_pages", "Pages of the KV cache."),
    "pages_live": ("idlm_kv_pages_live", "Pages that running samples hold."),
    "pages_cached": ("idlm_kv_pages_cached", "Pages kept for their prefix only."),
}
COUNTERS = {
    "steps": ("idlm_engine_steps", "Steps of the engine."),
    "tokens": ("idlm_generated_tokens", "Tokens committed."),
    "prefill_tokens": ("idlm_prefill_tokens", "Prompt tokens computed."),
    "cached_tokens": ("idlm_prefix_cached_tokens", "Prompt tokens found in the prefix cache."),
    "forwards": (
        "idlm_forwards",
        "Forwards that committed tokens, summed over samples; tokens by it is TPF.",
    ),
    "preemptions": ("idlm_preemptions", "Samples that wait again because pages ran out."),
    "evictions": ("idlm_evictions", "Cached pages given to a new owner."),
}
"""Name and help text of the metric of each field of `Stats`."""
TOTALS = (*COUNTERS, "drafted", "prompt_tokens")


class JsonLines(logging.Formatter):
    """Formats a record as one JSON object; `extra={"facts": {..}}` adds fields."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


def configure() -> None:
    """Log to stderr as JSON lines: the server's records from INFO on, all others from WARNING
    on. What libraries write when the process ends is dropped."""
    atexit.register(_mute_stderr)
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"json": {"()": JsonLines}},
            "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "json"}},
            "root": {"handlers": ["stderr"], "level": "WARNING"},
            "loggers": {"idlm.serving": {"level": "INFO"}},
        }
    )


def _mute_stderr() -> None:
    """For the process's last moments: triton's bindings then list what they leak, which is no
    JSON."""
    sys.stderr.flush()
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, STDERR)
    os.close(null)


class AccessLog:
    """ASGI middleware, the outermost: request ids, the access log, counters, and 500 for unexpected
    errors.

    Routes put fields of the request's log line into `scope["state"]["facts"]`.
    """

    def __init__(self, app: ASGIApp, meters: Meters) -> None:
        self.app, self.meters = app, meters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on and log it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, facts = perf_counter(), dict[str, Any]()
        id = _request_id(scope)
        scope.setdefault("state", {})["facts"] = facts
        answer = _Watched(send, id)
        try:
            await self.app(scope, receive, answer.send)
        except Exception:
            errors.exception("bug", extra={"facts": {"request_id": id}})
            if answer.status is not None:
                raise  # the response has begun: the server closes the connection
            bug = ApiError(500, "an error inside the server; its log has the details")
            await bug.response(scope["path"])(scope, receive, answer.send)
        finally:
            self._write(scope, id, answer.status or 499, perf_counter() - started, facts)

    def _write(
        self, scope: Scope, id: str, status: int, seconds: float, facts: dict[str, Any]
    ) -> None:
        # the route's pattern: a label for every path that a scanner tries would have no bound
        route = getattr(scope.get("route"), "path", "none")
        self.meters.requests.labels(route, str(status)).inc()
        self.meters.request_seconds.labels(route).observe(seconds)
        if status < 400 and scope["path"] in QUIET:
            return
        line = {
            "request_id": id,
            "client": (scope.get("client") or ["?"])[0],
            "method": scope["method"],
            "path": scope["path"][:200],
            "status": status,
            "seconds": round(seconds, 6),
        }
        access.info("request", extra={"facts": line | facts})


def _request_id(scope: Scope) -> str:
    """The client's X-Request-Id if it is short and has only plain characters, else a new id."""
    header = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    return header.decode() if REQUEST_ID.fullmatch(header) else secrets.token_hex(16)


class _Watched:
    """Adds the request id to a response and records its status code."""

    def __init__(self, send: Send, id: str) -> None:
        self._send, self._id = send, id
        self.status: int | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            id = self._id.encode()
            message["headers"] = [
                *message.get("headers", []),
                (b"x-request-id", id),
                (b"request-id", id),  # the name that Anthropic's clients read
            ]
        await self._send(message)


class Meters:
    """The metrics of one server, in a registry of their own.

    With `vllm_name`, the name of the model, they are also there under vLLM's names.
    """

    def __init__(self, client: EngineClient, vllm_name: str | None = None) -> None:
        self._registry = CollectorRegistry()
        engine = EngineCollector(client)
        self._registry.register(engine)
        self.vllm: VllmMeters | None = None
        if vllm_name is not None:
            self.vllm = VllmMeters(self._registry, vllm_name)
            self._registry.register(VllmCollector(engine.stats, vllm_name))
        self.requests = Counter(
            "idlm_http_requests",
            "Requests by route and status.",
            ("route", "status"),
            registry=self._registry,
        )
        self.request_seconds = self._histogram(
            "idlm_http_request_seconds",
            "From the first byte of a request to the last byte of its response.",
            SECONDS,
            ("route",),
        )
        self.first_token_seconds = self._histogram(
            "idlm_time_to_first_token_seconds",
            "From a request to the first token of a sample.",
            SECONDS,
        )
        self.token_seconds = self._histogram(
            "idlm_time_per_token_seconds",
            "Between tokens of a sample, the first not counted.",
            TOKEN_SECONDS,
        )
        self.prompt_tokens = self._histogram(
            "idlm_prompt_tokens", "Prompt tokens of a sample.", TOKENS
        )
        self.completion_tokens = self._histogram(
            "idlm_completion_tokens", "Output tokens of a sample.", TOKENS
        )

    def _histogram(
        self, name: str, text: str, buckets: Iterable[float], labels: Iterable[str] = ()
    ) -> Histogram:
        return Histogram(name, text, labels, buckets=tuple(buckets), registry=self._registry)

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class Timing:
    """Latencies of one sample; `started` is when its request came, by `perf_counter`."""

    def __init__(self, meters: Meters, started: float) -> None:
        self._meters, self._started = meters, started
        self._first: float | None = None
        self._last = started

    def see(self, event: Delta | Finished) -> None:
        """Observe an event at the time at which it comes."""
        if isinstance(event, Finished):
            self._end(event)
        elif event.tokens and (self._first is None or self._meters.vllm is not None):
            self._step(perf_counter())

    def _step(self, now: float) -> None:
        """Observe tokens: the first ones, and under vLLM's names all."""
        meters, vllm = self._meters, self._meters.vllm
        if self._first is None:
            self._first = now
            meters.first_token_seconds.observe(now - self._started)
            if vllm is not None:
                vllm.first_token.observe(now - self._started)
        elif vllm is not None:
            vllm.between.observe(now - self._last)
        self._last = now

    def _end(self, event: Finished) -> None:
        meters, now = self._meters, perf_counter()
        meters.prompt_tokens.observe(event.prompt_tokens)
        meters.completion_tokens.observe(event.completion_tokens)
        if meters.vllm is not None:
            meters.vllm.end(event, now - self._started)
        if self._first is not None and event.completion_tokens > 1:
            seconds = (now - self._first) / (event.completion_tokens - 1)
            meters.token_seconds.observe(seconds)
            if meters.vllm is not None:
                meters.vllm.each_token.observe(seconds)


class EngineCollector(Collector):
    """The engine's counters, read when Prometheus asks.

    A new engine process counts from zero; the totals of earlier processes are added, so that no
    counter decreases.
    """

    def __init__(self, client: EngineClient) -> None:
        self._client = client
        self._restarts = client.restarts
        self._before, self._last = Stats(), Stats()

    def stats(self) -> Stats:
        """Gauges of the running process, totals of all processes."""
        now = self._client.stats
        if self._client.restarts != self._restarts:
            self._restarts = self._client.restarts
            self._before = add_totals(self._before, self._last)
        self._last = now
        return add_totals(self._before, now)

    def collect(self) -> Iterator[Metric]:
        stats = self.stats()
        yield GaugeMetricFamily(
            "idlm_engine_ready", "Whether the engine takes samples.", float(self._client.ready)
        )
        yield CounterMetricFamily(
            "idlm_engine_restarts", "Restarts of the engine process.", self._client.restarts
        )
        yield GaugeMetricFamily(
            "idlm_queue_samples", "Samples with the engine.", self._client.quota.samples
        )
        yield GaugeMetricFamily(
            "idlm_queue_tokens", "The most tokens that they can have.", self._client.quota.tokens
        )
        yield GaugeMetricFamily(
            "idlm_tokens_per_forward",
            "TPF since the server's start.",
            stats.tokens / max(1, stats.forwards),
        )
        yield GaugeMetricFamily(
            "idlm_kv_usage", "The share of the KV cache's pages in use, 0 to 1.", stats.kv_usage
        )
        for field, (name, text) in GAUGES.items():
            yield GaugeMetricFamily(name, text, getattr(stats, field))
        for field, (name, text) in COUNTERS.items():
            yield CounterMetricFamily(name, text, getattr(stats, field))
        yield _labelled("idlm_plan_steps", "Steps by plan.", "plan", stats.plans.items())
        for field, text in (("reached", "Drafts reached."), ("accepted", "Drafts accepted.")):
            depths = (
                (str(depth), count) for depth, count in enumerate(getattr(stats, field), start=1)
            )
            yield _labelled(f"idlm_drafts_{field}", text, "depth", depths)


def _labelled(
    name: str, text: str, label: str, values: Iterable[tuple[str, int]]
) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=[label])
    for value, count in values:
        family.add_metric([value], count)
    return family


def add_totals(before: Stats, now: Stats) -> Stats:
    """`now` with the totals of `before` added; gauges are those of `now`."""
    totals = {field: getattr(before, field) + getattr(now, field) for field in TOTALS}
    plans = {
        plan: before.plans.get(plan, 0) + now.plans.get(plan, 0)
        for plan in dict.fromkeys([*before.plans, *now.plans])
    }
    depths = {
        field: _sum(getattr(before, field), getattr(now, field))
        for field in ("reached", "accepted")
    }
    return msgspec.structs.replace(now, **totals, **depths, plans=plans)


def _sum(first: list[int], second: list[int]) -> list[int]:
    return [sum(pair) for pair in zip_longest(first, second, fillvalue=0)]

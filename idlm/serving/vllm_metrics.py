"""The server's metrics under vLLM's names, for boards and tools that were made for vLLM.

`vllm bench serve` and AIPerf read the counters of drafts; Grafana boards read all of them. The
buckets are vLLM's, since boards of several servers add them up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import msgspec
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from idlm.serving.wire import Finished, Stats

LABELS = ("model_name", "engine")
FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
BETWEEN = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0),
)
WHOLE = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
TOKENS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))
REASONS = {"stop": "stop", "length": "length", "error": "error"}
"""vLLM's word for a finish reason; "abort" for all others."""


class SpeculativeDecoding(msgspec.Struct):
    """The acceptance of drafts in one sample, in vLLM's shape.

    Attributes:
        mean_acceptance_length: 1 + accepted drafts by step.
        acceptance_histogram: how many steps accepted 0, 1, .. `num_spec_tokens` drafts.
        num_spec_steps: the forwards that verified drafts.
        num_spec_tokens: the most drafts of a forward.
    """

    mean_acceptance_length: float
    draft_acceptance_rate: float
    acceptance_histogram: list[int]
    num_spec_steps: int
    num_accepted_draft_tokens: int
    num_draft_tokens: int
    num_spec_tokens: int

    @classmethod
    def of(cls, end: Finished) -> SpeculativeDecoding:
        """From a sample's counters; without drafts the length is 1 and the rate 0."""
        at_least = [end.windows, *end.accepted_at, 0]  # steps that accepted k drafts or more
        return cls(
            1 + end.accepted / max(1, end.windows),
            end.accepted / max(1, end.verified),
            [more - still for more, still in zip(at_least, at_least[1:], strict=False)],
            end.windows,
            end.accepted,
            end.verified,
            len(end.accepted_at),
        )


class RequestMetrics(msgspec.Struct):
    """The field `metrics` of an answer with one sample."""

    speculative_decoding: SpeculativeDecoding


class VllmMeters:
    """What is measured of each sample. `name` is that of the model."""

    def __init__(self, registry: CollectorRegistry, name: str) -> None:
        def histogram(metric: str, text: str, buckets: Iterable[float]) -> Histogram:
            whole = Histogram(
                f"vllm:{metric}", text, LABELS, buckets=tuple(buckets), registry=registry
            )
            return whole.labels(name, "0")

        self.first_token = histogram(
            "time_to_first_token_seconds", "From a request to its first token.", FIRST_TOKEN
        )
        self.between = histogram(
            "inter_token_latency_seconds", "Between two steps of a sample.", BETWEEN
        )
        self.each_token = histogram(
            "request_time_per_output_token_seconds", "By token after the first.", BETWEEN
        )
        self.whole = histogram(
            "e2e_request_latency_seconds", "From a request to its last token.", WHOLE
        )
        self.prompt = histogram("request_prompt_tokens", "Prompt tokens of a sample.", TOKENS)
        self.output = histogram("request_generation_tokens", "Output tokens of a sample.", TOKENS)
        self._ended = Counter(
            "vllm:request_success",
            "Finished samples.",
            (*LABELS, "finished_reason"),
            registry=registry,
        )
        self._name = name

    def end(self, event: Finished, seconds: float) -> None:
        """Observe the end of a sample, so many seconds after its request."""
        self._ended.labels(self._name, "0", REASONS.get(event.reason, "abort")).inc()
        self.whole.observe(seconds)
        self.prompt.observe(event.prompt_tokens)
        self.output.observe(event.completion_tokens)


class VllmCollector(Collector):
    """The engine's counters; `stats` gives gauges of now and totals since the server's start."""

    def __init__(self, stats: Callable[[], Stats], name: str) -> None:
        self._stats, self._labels = stats, [name, "0"]

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        gauges = {
            "num_requests_running": ("Samples in a slot.", float(stats.running)),
            "num_requests_waiting": ("Samples that wait for a slot.", float(stats.waiting)),
            "kv_cache_usage_perc": ("The share of the pages in use, 0 to 1.", stats.kv_usage),
        }
        for metric, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(f"vllm:{metric}", text, labels=LABELS)
            gauge.add_metric(self._labels, value)
            yield gauge
        windows = stats.reached[0] if stats.reached else 0
        counters = {
            "prompt_tokens": ("Prompt tokens.", stats.prompt_tokens),
            "generation_tokens": ("Output tokens.", stats.tokens),
            "prefix_cache_queries": ("Prompt tokens looked up.", stats.prompt_tokens),
            "prefix_cache_hits": ("Prompt tokens found.", stats.cached_tokens),
            "num_preemptions": ("Samples put back to wait.", stats.preemptions),
            "spec_decode_num_drafts": ("Forwards that verified drafts.", windows),
            "spec_decode_num_draft_tokens": ("Drafts verified.", stats.drafted),
            "spec_decode_num_accepted_tokens": ("Drafts accepted.", sum(stats.accepted)),
        }
        for metric, (text, count) in counters.items():
            counter = CounterMetricFamily(f"vllm:{metric}", text, labels=LABELS)
            counter.add_metric(self._labels, count)
            yield counter
        name = "vllm:spec_decode_num_accepted_tokens_per_pos"
        by_depth = CounterMetricFamily(name, "By depth.", labels=(*LABELS, "position"))
        for position, count in enumerate(stats.accepted):
            by_depth.add_metric([*self._labels, str(position)], count)
        yield by_depth

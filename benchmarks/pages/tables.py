"""Markdown tables of the results: a function for each benchmark, named after it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any

Report = Mapping[str, Any]
Table = Callable[[Report], Iterator[str]]

ENGINES = (
    "idlm ar",
    "idlm planner",
    "idlm chain",
    "idlm all",
    "vllm compiled",
    "vllm eager",
    "transformers static",
)
"""Columns of the tables of the serving bench, where the file has them."""
PRODUCT_ROWS = (1, 4, 64)
"""Rows of a matrix product that the page shows."""


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    yield from (f"| {' | '.join(map(str, row))} |" for row in rows)


def times(ratio: float) -> str:
    return f"{ratio:.2f}x"


def spread(figures: Mapping[str, float]) -> str:
    return f"{figures['median']:.2f} ({figures['min']:.2f}-{figures['max']:.2f})"


def shares(values: Iterable[float | None]) -> str:
    """Acceptance by depth; a depth that was never reached is a dash."""
    return " ".join("-" if value is None else f"{value:.3f}" for value in values)


def same_bytes(report: Report) -> Iterator[str]:
    rows = [
        (name, m["pairs"], m["equal"], m["plans"], m["ar_tokens"])
        for name, m in report["models"].items()
    ]
    yield from markdown(("model", "pairs", "equal", "plans", "tokens of AR"), rows)


def drafted_bytes(report: Report) -> Iterator[str]:
    rows = [
        (plan, report["prompts"], p["equal"], f"{p['tpf']:.2f}")
        for plan, p in report["plans"].items()
    ]
    yield from markdown(("plan", "prompts", "equal", "TPF"), rows)


def server_bytes(report: Report) -> Iterator[str]:
    keys = ("model", "concurrency", "cache", "requests", "same", "tokens", "cached_prompt_tokens")
    head = (
        "model",
        "requests at once",
        "cache",
        "requests",
        "same bytes",
        "tokens",
        "cached prompt tokens",
    )
    yield from markdown(head, [[row[key] for key in keys] for row in report["rows"]])


def structured(report: Report) -> Iterator[str]:
    ended = report["ended"]
    yield from markdown(
        (
            "schemas",
            "outputs that ended",
            "cut at their limit",
            "invalid",
            "ISD differs from AR",
            "a mask, mean",
        ),
        [
            (
                report["schemas"],
                ended["stop"],
                ended["length"],
                len(report["faults"]),
                len(report["differ"]),
                f"{report['mask_us_mean']:.0f} us",
            )
        ],
    )


def problems(report: Report) -> Iterator[str]:
    """The results of `idlm.nano.evaluate`: accuracy and TPF by run."""
    rows = []
    for name, run in report["runs"].items():
        same, tpf = run.get("same_tokens_as_transformers"), run.get("tpf")
        rows.append(
            (
                name,
                f"{run['accuracy']:.2%}",
                "-" if same is None else f"{same:.0%}",
                "-" if tpf is None else f"{tpf:.2f}",
                shares(run.get("acceptance", ())),
            )
        )
    yield from markdown(("run", "exact answers", "same tokens", "TPF", "acceptance by depth"), rows)


def outcomes(report: Report) -> Iterator[str]:
    rows = []
    for row in report["rows"]:
        for plan in row["plans"]:
            ratio = times(row["all_over_chain"]) if plan["plan"].startswith("all") else ""
            rows.append(
                (
                    plan["plan"],
                    f"{plan['tpf']:.2f}",
                    f"{plan['expected']:.2f}",
                    ratio,
                    shares(plan["acceptance"]),
                )
            )
    yield from markdown(
        ("plan", "TPF", "by the formula", "all over chain", "acceptance by depth"), rows
    )


def serving(report: Report) -> Iterator[str]:
    """Tokens per second, then ratios of the same round."""
    cells = {(_series(row), row["concurrency"]): row for row in report["rows"]}
    series = [name for name in ENGINES if any(name == column for column, _ in cells)]
    counts = sorted({count for _, count in cells})
    speeds = [
        [count, *(f"{cells[name, count]['tokens_per_second']:,.0f}" for name in series)]
        for count in counts
    ]
    yield "Tokens per second:\n"
    yield from markdown(("requests at once", *series), speeds)
    ours = [name for name in series if name.startswith("idlm") and name != "idlm ar"]
    peers = [name for name in series if not name.startswith("idlm")]
    yield "\nRatios of the same round, and tokens per forward:\n"
    head = (
        "requests at once",
        *(f"{name} over idlm ar" for name in ours),
        *(f"idlm ar over {name}" for name in peers),
        "TPF of the planner",
    )
    rows = [
        [
            count,
            *(_ratio(cells[name, count]) for name in ours),
            *(_inverse(cells[name, count]) for name in peers),
            f"{cells['idlm planner', count]['tpf']:.2f}",
        ]
        for count in counts
    ]
    yield from markdown(head, rows)


def _series(row: Report) -> str:
    return f"{row['engine']} {row['mode']}"


def _ratio(row: Report) -> str:
    low, high = row["speedup_range"]
    return f"{times(row['speedup_over_ar'])} ({low:.2f}-{high:.2f})"


def _inverse(row: Report) -> str:
    low, high = row["speedup_range"]
    return f"{times(1 / row['speedup_over_ar'])} ({1 / high:.2f}-{1 / low:.2f})"


def real_model(report: Report) -> Iterator[str]:
    rows = []
    for row in sorted(
        report["rows"], key=lambda row: (row["threads"], row["concurrency"], row["precision"])
    ):
        ours = row["engine"] == "idlm"
        rows.append(
            (
                row["threads"],
                row["concurrency"],
                row["precision"],
                _series(row),
                f"{row['tokens_per_second']['median']:.1f}",
                f"{row['decode_tokens_per_second']['median']:.1f}",
                "" if ours else times(1 / row["over_our_ar"]["median"]),
                "" if ours else times(1 / row["decode_over_our_ar"]["median"]),
            )
        )
    yield from markdown(
        (
            "threads",
            "requests",
            "precision",
            "engine",
            "tokens/s",
            "decoding alone",
            "idlm over it",
            "decoding alone",
        ),
        rows,
    )
    yield "\nA step of more rows over a step of one row for each request:\n"
    widths = sorted({width for step in report["steps"] for width in step["rows"]}, key=int)
    yield from markdown(
        ("threads", "requests", "precision", "AR step", *(f"{width} rows" for width in widths)),
        [
            (
                step["threads"],
                step["batch"],
                step["precision"],
                f"{step['ar_step_ms']:.1f} ms",
                *(f"{step['rows'][width]['over_ar']:.2f}" for width in widths),
            )
            for step in report["steps"]
        ],
    )


def cost_curve(report: Report) -> Iterator[str]:
    widths = list(next(iter(report["models"].values()))["batches"]["1"]["overhead"])
    rows = []
    for name, model in report["models"].items():
        for batch, costs in model["batches"].items():
            best = costs["planner"]
            overhead = [f"{costs['overhead'][width]:.2f}" for width in widths]
            speed = times(costs["expected_speedup"][best])
            rows.append((name, batch, f"{costs['ar_step_ms']:.1f} ms", *overhead, best, speed))
    acceptance = ", ".join(str(a) for a in report["acceptance"])
    head = (
        "model",
        "requests",
        "AR step",
        *widths,
        "the planner picks",
        f"speed-up at acceptance {acceptance}",
    )
    yield from markdown(head, rows)


def kernels(report: Report) -> Iterator[str]:
    """What an engine chooses in float32, against PyTorch."""
    cells = {
        (r["model"], r["inputs"], r["outputs"], r["rows"], r["candidate"]): r
        for r in report["rows"]
    }
    rows = []
    for model, inputs, outputs, count, candidate in cells:
        if candidate == "chosen" and count in PRODUCT_ROWS:
            chosen = cells[model, inputs, outputs, count, candidate]
            torch = cells[model, inputs, outputs, count, "torch"]
            rows.append(
                (
                    model,
                    f"{inputs}x{outputs}",
                    count,
                    f"{chosen['us']:.1f}",
                    f"{torch['us']:.1f}",
                    f"{chosen['of_bandwidth']:.2f}",
                    f"{chosen['of_arithmetic']:.2f}",
                )
            )
    yield from markdown(
        (
            "model",
            "shape",
            "rows",
            "chosen, us",
            "PyTorch, us",
            "share of bandwidth",
            "share of arithmetic",
        ),
        rows,
    )


def server_speed(report: Report) -> Iterator[str]:
    rows = []
    for row in report["rows"]:
        over, ttft = row.get("over_offline"), row["ttft_ms"]
        rows.append(
            (
                row["concurrency"],
                row["name"],
                f"{row['tokens_per_second']['median']:,.0f}",
                f"{ttft['p50']:.1f}, {ttft['p99']:.1f}",
                f"{row['tpot_ms']['p50']:.1f}",
                spread(over) if over else "",
            )
        )
    yield from markdown(
        (
            "requests at once",
            "engine",
            "tokens/s",
            "TTFT p50, p99 (ms)",
            "TPOT p50 (ms)",
            "over the engine alone",
        ),
        rows,
    )


def server_faults(report: Report) -> Iterator[str]:
    load, left, kill, drain = (report[name] for name in ("overload", "disconnect", "kill", "drain"))
    worst = max(load["p99_ratio"].values())
    over = load["overload"]
    yield from markdown(
        ("fault", "what happened"),
        [
            (
                f"{over['offered_per_second']:.0f} requests/s offered for {load['seconds']:.0f} s",
                f"{over['accepted_per_second']:.0f}/s answered, "
                f"with a p99 at most {worst:.2f} times that without overload; "
                f"{over['statuses']['429']:,} refused in {over['refusal_ms']['p50']:.1f} ms (p50); "
                f"{over['hanging']} hung",
            ),
            (
                f"{left['clients']:,} clients leave at random points",
                f"all slots, pages and queues at zero after {left['seconds_to_zero']:.2f} s",
            ),
            (
                f"kill -9 of the engine with {kill['streams']} streams, {kill['rounds']} times",
                f"{kill['told']} of {kill['streams'] * kill['rounds']} told within "
                f"{kill['latest_error_seconds']['max']:.2f} s; the same answers afterwards "
                f"{kill['same_answers_after']} times",
            ),
            *(
                (
                    f"SIGTERM, {part['drain_seconds']:g} s allowed, {part['in_flight']} in flight",
                    f"{part['finished']} finished, {part['told_with_an_error']} told with an error",
                )
                for part in drain.values()
            ),
        ],
    )


def router_faults(report: Report) -> Iterator[str]:
    def counts(verdicts: Report) -> str:
        return ", ".join(f"{count:,} {name}" for name, count in verdicts.items())

    kill, restart = report["kill"], report["restart"]
    yield from markdown(
        ("fault", "what happened"),
        [
            (
                f"kill -9 of one of {report['replicas']} replicas with {kill['streams_at_each']} "
                f"streams, {kill['kills']} times",
                f"streams: {counts(kill['streams'])}, the last of them "
                f"{kill['latest_error_seconds']['max']:.2f} s after the kill; "
                f"not streamed: {counts(kill['whole'])}; "
                f"new requests: {counts(kill['new_requests'])}",
            ),
            (
                f"SIGTERM and a restart of {restart['replicas']} replicas in turn, under requests",
                counts(restart["requests"]),
            ),
        ],
    )


def server_fuzz(report: Report) -> Iterator[str]:
    titles = ", ".join(
        f"{failure['count']} {failure['title'].lower()}" for failure in report["failures"]
    )
    yield from markdown(
        ("cases", "routes with a 500", "other failures", "left behind"),
        [
            (
                f"{report['cases']:,}",
                report["routes_with_a_500"],
                titles or "none",
                len(report["left_behind"]),
            )
        ],
    )


def clients(report: Report) -> Iterator[str]:
    rows = [row for rows in report["features"].values() for row in rows]
    names = dict.fromkeys((row["client"], row["version"]) for row in rows)

    def features(client: tuple[str, str], verdict: str) -> str:
        these = (row for row in rows if (row["client"], row["version"]) == client)
        found = [row["feature"] for row in these if row["verdict"].startswith(verdict)]
        return "<br>".join(found).replace("|", "\\|")

    yield from markdown(
        ("client", "passes", "refused", "fails"),
        (
            (" ".join(name), *(features(name, word) for word in ("passes", "refused", "fails")))
            for name in names
        ),
    )


def worst_gap(report: Report) -> Iterator[str]:
    rows = [
        (
            row["running"],
            row["prefill"],
            f"{row['median_step_ms']:.1f} ms",
            spread(row["worst_gap_over_median_step"]),
        )
        for row in report["rows"]
    ]
    yield from markdown(
        ("running", "the prompt comes", "median step", "worst wait, in steps"), rows
    )


def loss_memory(report: Report) -> Iterator[str]:
    chunked = [row for row in report["figures"] if not row["whole"]]
    pairs = [[row for row in chunked if row["method"] == method] for method in ("lora", "full")]
    yield from markdown(
        ("vocabulary", "the logits", "the head", "peak, gated LoRA", "peak, full fine-tune"),
        [
            (
                f"{lora['vocabulary']:,}",
                *(
                    f"{size / 2**20:,.0f} MiB"
                    for size in (lora["logits_bytes"], lora["head_bytes"], lora["peak_bytes"])
                ),
                f"{full['peak_bytes'] / 2**20:,.0f} MiB",
            )
            for lora, full in zip(*pairs, strict=True)
        ],
    )


def packing(report: Report) -> Iterator[str]:
    base = report["arms"]["padded"]["median"]
    yield from markdown(
        ("batches", "padding", "tokens a CPU second", "to padded"),
        [
            (
                arm,
                f"{100 * figure['padding']:.0f} %",
                f"{figure['median']:.0f}",
                f"{figure['median'] / base:.2f}",
            )
            for arm, figure in report["arms"].items()
        ],
    )


def law(report: Report) -> Iterator[str]:
    wanted = ("top_k", "top_p", "min_p")
    yield from markdown(
        ("vocabulary", "slots", "top-k, top-p, min-p", "sort, ms", "candidates, ms", "ratio"),
        [
            (
                f"{row['vocabulary']:,}",
                row["slots"],
                ", ".join(f"{row[name]:g}" for name in wanted),
                f"{row['sort']:.2f}",
                f"{row['candidates']:.2f}",
                f"{row['ratio']:.2f}",
            )
            for row in report["times"]
        ],
    )
    yield ""
    yield from markdown(
        ("a row of 151,936, top-p", "MB touched", "comparisons", "the kernel's passes, MB"),
        [
            (
                p,
                f"{row['sort bytes'] / 1e6:.0f}, {row['candidates bytes'] / 1e6:.0f}",
                f"{row['sort comparisons']:,}, {row['candidates comparisons']:,}",
                f"{row['kernel passes']}, {row['kernel bytes'] / 1e6:.0f}",
            )
            for p, row in report["work"].items()
        ],
    )
    yield ""
    counts = ("rows", "sorted", "kept differ", "tokens differ")
    yield from markdown(
        ("rows of 151,936", *counts[:1], "sorted after all", *counts[2:]),
        [(kind, *(row.get(name, 0) for name in counts)) for kind, row in report["same"].items()],
    )


def kernel_budgets(report: Report) -> Iterator[str]:
    rows = report["kernels"]
    cards = sorted({row["processor"] for row in rows})
    by_kernel: dict[str, dict[int, Report]] = {}
    for row in rows:
        by_kernel.setdefault(row["kernel"], {})[row["processor"]] = row
    yield from markdown(
        ("kernel", *(f"sm_{card}" for card in cards)),
        [
            (
                kernel,
                *(
                    f"{of['shared'] / 1024:.0f} / {of['registers']} / {of['stack']}"
                    for card in cards
                    if (of := found.get(card))
                ),
            )
            for kernel, found in by_kernel.items()
        ],
    )


def training_step(report: Report) -> Iterator[str]:
    rounds, ratio = report["rounds"], report["ratio"]
    yield from markdown(
        ("engine", "CPU seconds a step", "memory of a step, MiB"),
        [
            (
                name,
                f"{median(one[name]['cpu_seconds'] for one in rounds):.2f}",
                f"{median(one[name]['step_bytes'] for one in rounds) / 2**20:,.0f}",
            )
            for name in rounds[0]
        ],
    )
    yield ""
    yield (
        f"idlm over the other: {ratio['cpu_seconds']:.2f} of the CPU time, "
        f"{ratio['step_bytes']:.2f} of the memory."
    )


def distill_speed(report: Report) -> Iterator[str]:
    rounds, ratio = report["rounds"], report["ratio"]
    yield from markdown(
        ("engine", "finished tokens/s", "responses that ended"),
        [
            (
                name,
                f"{median(one[name]['finished_tokens_per_second'] for one in rounds):.1f}",
                f"{median(one[name]['finished_rows'] for one in rounds):.0f}",
            )
            for name in rounds[0]
        ],
    )
    yield ""
    yield (
        f"idlm over the other: {ratio['median']:.2f}x "
        f"({ratio['min']:.2f}-{ratio['max']:.2f}, {len(rounds)} rounds)."
    )


def soak(report: Report) -> Iterator[str]:
    memory = report["memory_mb"]
    yield from markdown(
        (
            "requests",
            "answered",
            "aborted",
            "pre-emptions",
            "evictions",
            "pool intact",
            "memory after warm-up, at the end",
        ),
        [
            (
                f"{report['requests']:,}",
                f"{report['answered']:,}",
                report["aborted"],
                report["preemptions"],
                f"{report['evictions']:,}",
                "yes" if report["pool_intact"] else "no",
                f"{memory['after_warm_up']:.0f}, {memory['end']:.0f} MiB",
            )
        ],
    )


def lookup(report: Report) -> Iterator[str]:
    rows = [
        (
            row["kind"],
            row["concurrency"],
            row["prompts"],
            row["same"],
            f"{row['tpf']:.2f}",
            shares(row["acceptance"][:4]),
            f"{row['speedup']:.2f} ({row['speedup_range'][0]:.2f}-{row['speedup_range'][1]:.2f})",
        )
        for row in report["rows"]
    ]
    head = ("prompts", "at once", "number", "same as AR", "TPF", "acceptance, depths 1 to 4")
    yield from markdown((*head, "speed-up over AR"), rows)


def converted(report: Report) -> Iterator[str]:
    rows = []
    for row in report["rows"]:
        modes = row["modes"]
        ups = [
            f"{mode['speedup']:.2f} ({mode['speedup_range'][0]:.2f}-{mode['speedup_range'][1]:.2f})"
            for mode in (modes["all"], modes["planner"])
        ]
        counts = (row["source"], row["concurrency"], row["prompts"], row["same"])
        rows.append(
            (
                *counts,
                f"{modes['all']['tpf']:.2f}",
                shares(modes["all"]["acceptance"]),
                f"{modes['planner']['tpf']:.2f}",
                *ups,
            )
        )
    head = (
        "prompts",
        "at once",
        "number",
        "same as AR",
        "TPF, all outcomes",
        "acceptance by depth",
    )
    yield from markdown(
        (*head, "TPF, planner", "speed-up, all outcomes", "speed-up, planner"), rows
    )


def ablation(report: Report) -> Iterator[str]:
    """Older files hold one run of a variant, newer ones a list."""
    rows = []
    for name, runs in report["variants"].items():
        for run in runs if isinstance(runs, list) else [runs]:
            small, large = run["N=4"], run["N=8"]
            rows.append(
                (
                    name,
                    f"{small['tpf']:.2f}",
                    f"{small['accuracy']:.1%}",
                    f"{large['tpf']:.2f}",
                    f"{large['accuracy']:.1%}",
                    f"{run['seconds']:.0f} s",
                )
            )
    head = (
        "variant",
        "TPF, N=4",
        "exact answers, N=4",
        "TPF, N=8",
        "exact answers, N=8",
        "training",
    )
    yield from markdown(head, rows)


def gpu(report: Report) -> Iterator[str]:
    """Of `benchmarks.gpu_check`."""
    costs = report["costs"]
    plans = ("all-2", "chain-4", "all-4", "all-8")
    steps = {"ar": costs["AR"]["ar"]} | {plan: costs["windows"][plan] for plan in plans}
    rows = [
        (plan, *(f"{row['device']:.1f}" for row in by_batch.values()))
        for plan, by_batch in steps.items()
    ]
    least = costs["AR"]["least_ms"].values()
    rows.append(("weights and KV over the copy bandwidth", *(f"{ms:.1f}" for ms in least)))
    yield from markdown(("a step of the 8B shape, ms", "batch 1", "8", "64"), rows)
    yield ""
    loads = [
        (
            name,
            f"{row['tokens_per_second']:,.0f}",
            f"{row['over_ar']:.2f}",
            f"{row['tpf_decode']:.2f}",
        )
        for name, row in report["sweep"].items()
        if "tokens_per_second" in row
    ]
    yield from markdown(("model, mode and requests at once", "tokens/s", "over AR", "TPF"), loads)
    yield ""
    shares = [
        (name, *(row.get(key, "-") for key in ("all-4 = AR", "batch = alone", "graph = eager")))
        for name, row in report["smoke"].items()
        if "all-4 = AR" in row
    ]
    yield from markdown(
        ("nano, share of equal tokens", "ISD, AR", "batch, alone", "graph, eager"), shares
    )


def exactness(report: Report) -> Iterator[str]:
    """The enumerated laws, the engine's samples, and nano's texts."""
    rows = [
        (
            temperature,
            *(f"{each['tiny']['enumerated'][rule]:.2g}" for rule in ("ratio", "published")),
            *(f"{each['tiny']['sampled'][rule]:.4f}" for rule in ("coupled", "ratio")),
            f"{each['tiny']['sampled_by_chance']:.4f}, {each['tiny']['sampled_by_chance_99']:.4f}",
        )
        for temperature, each in report["temperatures"].items()
    ]
    head = ("temperature", "ratio, enumerated", "published, enumerated", "coupled, sampled")
    yield from markdown((*head, "ratio, sampled", "AR, sampled: mean, 99 %"), rows)
    yield ""
    rows = []
    for temperature, each in report["temperatures"].items():
        for rule in ("coupled", "ratio", "published"):
            one = each["nano"][rule]
            off = "0, by construction"
            if "distance" in one:
                off = f"{one['distance']:.2g} ± {one['standard_error']:.2g}"
            tpf = f"{one['tpf_decode']:.2f}" if "tpf_decode" in one else "-"
            expected = f"{one['tpf_expected']:.2f}" if "tpf_expected" in one else "-"
            depths = shares(one["acceptance"]) if "acceptance" in one else "-"
            rows.append((temperature, rule, off, depths, expected, tpf))
    head = ("temperature", "rule", "distance at a draft", "acceptance by depth", "TPF expected")
    yield from markdown((*head, "TPF decoded"), rows)


def graders(report: Report) -> Iterator[str]:
    rows = [
        (
            name,
            kind,
            "right" if line["should"] else "wrong",
            line["answers"],
            line["correct"],
            ", ".join(line["others"]),
        )
        for name, kinds in report["graders"].items()
        for kind, line in kinds.items()
    ]
    head = ("grader", "answer", "should be", "answers", "counted as right", "not as it should")
    yield from markdown(head, rows)
    yield ""
    programs = [(name, one["counted"], one["why"]) for name, one in report["malicious"].items()]
    yield from markdown(("a program that", "counts as", "ended by"), programs)

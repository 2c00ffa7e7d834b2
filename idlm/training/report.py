"""`idlm report`: the curves of runs as one page of HTML that needs nothing from elsewhere.

Whatever comes from the runs' files is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from idlm.errors import InputError
from idlm.plots import HEAD, draw
from idlm.training.log import METRICS, read_entries
from idlm.training.record import ENVIRONMENT

PANELS = {
    "loss": "loss",
    "ce_noisy": "CE of MASK rows, nats",
    "ce_clean": "CE of clean rows, nats",
    "kl": "KL, nats",
    "tv": "TV",
    "held_out_ce": "held-out CE, nats",
    "tpf": "TPF along held-out texts, all outcomes",
    "tpf_chain": "TPF along held-out texts, chain",
    "decode_tpf": "TPF of a real decode",
    "acceptance": "acceptance by depth, held out",
    "acceptance_reached": "acceptance by depth of drafts that are reached, held out",
    "decode_acceptance": "acceptance by depth of a real decode",
    "alpha": "α by depth, held out",
    "tokens_per_second": "tokens/s",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "memory_gib": "memory, GiB",
}
"""The title of each picture, by the key of its figures; a picture without figures is left out."""
SUMMARY = ("step", "tokens", "loss", "held_out_ce", "tpf", "acceptance", "tokens_per_second")
STYLES = ("solid", "dashed", "dotted", "dashdot")
"""Of lines, by depth."""
PAGE = (
    HEAD
    + """<body>
<h1>{{ title }}</h1>
<table>
<tr><th></th><th>run</th>{% for key in summary %}<th>{{ key }}</th>{% endfor %}</tr>
{% for run in runs %}
<tr><td style="color: {{ run.colour }}">&#9632;</td><td>{{ run.name }}</td>
{% for key in summary %}<td>{{ run.last(key) }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{{ picture }}
{% for run in runs %}
<h2>{{ run.name }}</h2>
{% for title, text in run.texts.items() %}
<details><summary>{{ title }}</summary><pre>{{ text }}</pre></details>
{% endfor %}
{% endfor %}
</body>
</html>
"""
)


@dataclass(frozen=True)
class Run:
    """A run's figures, and the texts of its other files by their names."""

    name: str
    colour: str
    entries: list[dict[str, Any]]
    texts: dict[str, str]

    def curves(self, key: str) -> list[tuple[list[int], list[float]]]:
        """Steps and finite values of a figure; for a list one curve for each depth."""
        points: dict[int, list[tuple[int, float]]] = {}
        for entry in self.entries:
            values = entry.get(key)
            for depth, value in enumerate(values if isinstance(values, list) else [values]):
                if isinstance(value, int | float) and math.isfinite(value):
                    points.setdefault(depth, []).append((entry["step"], value))
        return [tuple(map(list, zip(*points[depth], strict=True))) for depth in sorted(points)]  # type: ignore[misc]

    def last(self, key: str) -> str:
        """The last value of a figure, for a table."""
        values = [entry[key] for entry in self.entries if key in entry]
        parts = values[-1] if values and isinstance(values[-1], list) else values[-1:]
        return " ".join(f"{v:,.4g}" if isinstance(v, float) else str(v) for v in parts)


def report(folders: Sequence[Path]) -> str:
    """The page of one run, or of several over each other.

    Raises:
        InputError: a folder has no figures.
    """
    runs = [_read(folder, f"C{number % 10}") for number, folder in enumerate(folders)]
    title = "Training run" if len(runs) == 1 else "Training runs"
    keys = [key for key in SUMMARY if any(key in entry for run in runs for entry in run.entries)]
    page = Environment(autoescape=True).from_string(PAGE)
    return page.render(title=title, runs=runs, summary=keys, picture=Markup(_picture(runs)))


def _read(folder: Path, colour: str) -> Run:
    from matplotlib.colors import to_hex

    entries = read_entries(folder / METRICS)
    if not entries:
        raise InputError(
            f"{str(folder)!r} has no figures in {METRICS}; give the output_dir of `idlm train`, "
            "or results of idlm eval, bench, accept or compare"
        )
    files = [folder / name for name in ("config.yaml", ENVIRONMENT)]
    texts = {file.name: file.read_text(encoding="utf-8") for file in files if file.exists()}
    return Run(str(folder), to_hex(colour), entries, texts)


def _picture(runs: Sequence[Run]) -> str:
    """All pictures as one SVG element."""
    keys = [key for key in PANELS if any(run.curves(key) for run in runs)]
    return draw([partial(_panel, key=key, runs=runs) for key in keys], "svg").decode()


def _panel(axes: Any, key: str, runs: Sequence[Run]) -> None:
    axes.set_title(PANELS[key])
    axes.set_xlabel("step")
    depths = 0
    for number, run in enumerate(runs):
        for depth, (steps, values) in enumerate(run.curves(key)):
            style = STYLES[depth % len(STYLES)]
            (line,) = axes.plot(steps, values, color=run.colour, linestyle=style, marker=".")
            line.set_gid(f"{number}/{key}/{depth}")
            depths = max(depths, depth + 1)
    if depths > 1:
        styles = (STYLES[depth % len(STYLES)] for depth in range(depths))
        shown = [axes.plot([], [], color="grey", linestyle=style)[0] for style in styles]
        axes.legend(shown, [f"depth {depth}" for depth in range(1, depths + 1)])

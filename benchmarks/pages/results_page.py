"""docs/results.md: the figures of quality, drafting, speed and compute in benchmarks/results.

The tables are those of `idlm report`.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.pages.benchmarks_page import RESULTS, is_earlier
from idlm.evaluation.report import markdown
from idlm.evaluation.results import Source, read

HEAD = """# Results

Quality, tokens per forward, speed and compute of everything in [benchmarks/results](../benchmarks/results) that has
such figures. This page is made by `make pages`. Do not edit it. [benchmarks.md](benchmarks.md) has all other figures too,
with what is measured and how; [glossary.md](glossary.md) explains the words. The same tables with pictures, as one page:

<!-- not run: tests/evaluation/test_report.py makes such pages -->
```sh
idlm report benchmarks/results -o results.html   # and a PNG file for each section
```

A number in brackets is the source of a figure; the last table says what each file records of its run. A source marked
*earlier* is of an engine before the kernels of entry 24 of the [log](LOG.md); its absolute speeds no longer hold.
"""


def render(results: Path = RESULTS) -> str:
    found = read([results])
    found.sources = [_linked(source) for source in found.sources]
    return "\n".join([HEAD.rstrip(), *markdown(found)]) + "\n"


def _linked(source: Source) -> Source:
    link = f"[{source.name}](../benchmarks/results/{source.name})"
    return source._replace(name=f"{link} *earlier*" if is_earlier(source.about) else link)

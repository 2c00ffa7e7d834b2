"""Makes the harness's IFEval work without the network, and give the same figures every time.

Two of its 25 checks, the number of sentences and that of words in capitals, split texts by NLTK's
model "punkt". Where that is not installed and cannot be had, the harness's own rules split
sentences, and NLTK's rules, which need no data, split words. Language detection gets a fixed seed.
"""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from typing import Any


def prepare(offline: bool) -> str:
    """Import the harness's checks, and say what splits sentences: "punkt" or "rules"."""
    import langdetect
    import nltk

    langdetect.DetectorFactory.seed = 0
    found = _has_punkt(nltk) or (not offline and nltk.download("punkt_tab", quiet=True))
    download = nltk.download
    if not found:
        nltk.download = lambda *_, **__: False
    try:
        with redirect_stdout(io.StringIO()):  # it says that it has downloaded
            from lm_eval.tasks.ifeval import instructions_util
    finally:
        nltk.download = download
    if found:
        return "punkt"
    instructions_util.count_sentences = lambda text: len(
        instructions_util.split_into_sentences(text)
    )
    instructions_util.nltk = _Words()
    return "rules"


def _has_punkt(nltk: Any) -> bool:
    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        return False
    return True


class _Words:
    """NLTK as the checks use it, with words that are split without a model."""

    def __getattr__(self, name: str) -> Any:
        import nltk

        return getattr(nltk, name)

    def word_tokenize(self, text: str) -> list[str]:
        """The words of a text, by the rules of the Penn Treebank."""
        import nltk

        return list(nltk.word_tokenize(text, preserve_line=True))

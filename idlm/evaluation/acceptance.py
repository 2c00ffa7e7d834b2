"""How far a model accepts what it has written: alpha by depth and domain, TPF, calibration.

alpha = mean of sum_v min(p, q). q is the law that a token was drafted or committed from, p what the
same model says of the token once the text is clean. docs/methods.md defines both for each method.

Shapes: n tokens, V logit columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from idlm.baselines import llada, sdar
from idlm.baselines.llada import Llada
from idlm.baselines.rereading import left_to_right, reference_tokens
from idlm.baselines.sdar import Sdar, TwoThresholds
from idlm.baselines.written import Written, law_of
from idlm.decoding.plan import plans_for
from idlm.engine.llm import LLM, Result
from idlm.evaluation.laws import Pairs, ar_pairs, draft_pairs, lookup_pairs
from idlm.evaluation.metrics import summary, tpf_decode
from idlm.evaluation.parity import numbered_seeds
from idlm.evaluation.speedup import tokens_per_forward
from idlm.models.idlm_model import Idlm
from idlm.params import SamplingParams

BINS = 10
BATCH = 8
"""Prompts that a baseline decodes at once; their laws are kept until they are compared."""


class Item(NamedTuple):
    """A prompt's token ids, and the groups that it counts in: ("domain", "maths"), ..."""

    prompt: list[int]
    groups: tuple[tuple[str, str], ...] = ()


@dataclass
class Tally:
    """Sums over tokens.

    Attributes:
        by_depth: float64 [depths, 4]: tokens, sum_v min(p, q), min(1, p / q) of the token itself,
            which has the same mean where tokens are drawn from q, and whether p and q have the same
            most likely token.
        bins: float64 [BINS, 3], by the largest probability of q: tokens, that probability, and
            whether p has the same most likely token.
    """

    by_depth: Tensor = field(default_factory=lambda: torch.zeros(0, 4, dtype=torch.float64))
    bins: Tensor = field(default_factory=lambda: torch.zeros(BINS, 3, dtype=torch.float64))

    def add(self, pairs: Pairs) -> None:
        """Count the tokens of a text."""
        p, q = pairs.log_p.exp(), pairs.log_q.exp()
        own = pairs.tokens[:, None]
        ratio = (pairs.log_p.gather(1, own) - pairs.log_q.gather(1, own))[:, 0].exp().clamp(max=1)
        sure, best = q.max(-1)
        agree = (p.argmax(-1) == best).double()
        one = torch.ones_like(sure)
        more = int(pairs.depth.max()) - len(self.by_depth) if len(own) else 0
        self.by_depth = torch.cat([self.by_depth, torch.zeros(max(more, 0), 4).double()])
        values = torch.stack([one, torch.minimum(p, q).sum(-1), ratio, agree], 1)
        self.by_depth.index_add_(0, pairs.depth - 1, values)
        place = (sure * BINS).long().clamp(max=BINS - 1)
        self.bins.index_add_(0, place, torch.stack([one, sure, agree], 1))

    def to_json(self) -> dict[str, Any]:
        """The means, in all and by depth; and the calibration error, which is the mean distance of
        the confidence of q from the share in which p agrees."""
        tokens, *sums = self.by_depth.sum(0).tolist()
        count, sure, agree = self.bins.T
        off = float((sure - agree).abs().sum() / max(tokens, 1))
        depths = [
            {"depth": number, "tokens": int(row[0]), **_means(row)}
            for number, row in enumerate(self.by_depth.tolist(), start=1)
        ]
        bins = [
            {"tokens": int(n), "confidence": s / n, "agreement": a / n}
            for n, s, a in zip(count.tolist(), sure.tolist(), agree.tolist(), strict=True)
            if n
        ]
        calibration = {"error": off, "bins": bins}
        means = _means([tokens, *sums])
        return {"tokens": int(tokens), **means, "by_depth": depths, "calibration": calibration}

    @property
    def alpha(self) -> list[float]:
        """The mean of sum_v min(p, q) at each depth."""
        return (self.by_depth[:, 1] / self.by_depth[:, 0].clamp(min=1)).tolist()


def _means(row: Sequence[float]) -> dict[str, float]:
    tokens = max(row[0], 1)
    return {"alpha": row[1] / tokens, "ratio": row[2] / tokens, "argmax": row[3] / tokens}


@dataclass
class Definition:
    """The sums under one definition of p: of all tokens, and by group."""

    total: Tally = field(default_factory=Tally)
    groups: dict[str, dict[str, Tally]] = field(default_factory=dict)

    def add(self, pairs: Pairs, item: Item) -> None:
        self.total.add(pairs)
        for kind, name in item.groups:
            self.groups.setdefault(kind, {}).setdefault(name, Tally()).add(pairs)

    def to_json(self) -> dict[str, Any]:
        by = {
            f"by_{kind}": {name: tally.to_json() for name, tally in sorted(tallies.items())}
            for kind, tallies in self.groups.items()
        }
        return self.total.to_json() | by


Advance = Callable[[], None]


def measure_causal(
    idlm: Idlm,
    items: Sequence[Item],
    params: SamplingParams,
    stride: int,
    advance: Advance = lambda: None,
    branches: str = "all",
) -> dict[str, Any]:
    """AR (stride 1), I-DLM or lookup drafts, on the texts that the engine decodes with `branches`:
    "all" outcomes, or "lookup".

    `params.verification` relaxed measures the same laws on texts of that rule. `advance` is called
    twice for each item: when it is decoded, and when its laws are known.

    Raises:
        InputError: a prompt or the params cannot be used.
    """
    law, definition = law_of(idlm, params), Definition()
    llm = LLM(idlm, stride=stride, branches=branches, generation_config="none")
    pairs_of = lookup_pairs if branches == "lookup" else draft_pairs
    seeded = numbered_seeds(params, len(items))
    results = llm.generate([list(item.prompt) for item in items], seeded, progress=advance)
    for item, result in zip(items, results, strict=True):
        text, first = item.prompt + result.token_ids, len(item.prompt)
        if stride == 1:
            definition.add(ar_pairs(idlm, text, first, law), item)
        elif len(result.token_ids) > 1:
            definition.add(pairs_of(idlm, text, first, stride - 1, law), item)
        advance()
    return _causal_report(definition, results, stride, branches)


def _causal_report(
    definition: Definition, results: Sequence[Result], stride: int, branches: str
) -> dict[str, Any]:
    """`tpf_expected` is unknown for lookup drafts: where nothing matches a window has none."""
    totals, width = summary(results), plans_for(stride, branches)[0].width
    expected = None
    if branches != "lookup":
        expected = tokens_per_forward(definition.total.alpha, stride) if stride > 1 else 1.0
    return {
        "answer_tokens": totals["tokens"],
        "forwards": totals["forwards"],
        "tpf": totals["tpf"],
        "tpf_decode": tpf_decode(results),
        "tpf_expected": expected,
        "rows_per_token": width * totals["forwards"] / totals["tokens"],
        "accepted": totals["acceptance"],
        "definitions": {"causal": definition.to_json()},
    }


def measure_baseline(
    idlm: Idlm,
    items: Sequence[Item],
    params: SamplingParams,
    rule: Sdar | TwoThresholds | Llada,
    advance: Advance = lambda: None,
) -> dict[str, Any]:
    """SDAR, LLaDA-2.1 or LLaDA, under both definitions of p; a depth is the place in the block.

    Raises:
        InputError: a prompt or the params cannot be used.
    """
    law = law_of(idlm, params)
    definitions = {name: Definition() for name in ("left_to_right", "reference_tokens")}
    written: list[Written] = []
    for item, one in _written(idlm, items, params, rule):
        for name, pairs in _readings(idlm, one, rule, params, law):
            definitions[name].add(pairs, item)
        written.append(replace(one, log_q=None))
        advance()
    tokens = sum(len(one.token_ids) for one in written)
    forwards = sum(one.forwards for one in written)
    return {
        "answer_tokens": tokens,
        "forwards": forwards,
        "tpf": tokens / forwards,
        "tpf_decode": tokens / forwards,
        "tpf_expected": None,
        "rows_per_token": sum(w.rows for w in written) / tokens,
        "accepted": None,
        "definitions": {name: found.to_json() for name, found in definitions.items()},
    }


def _written(
    idlm: Idlm,
    items: Sequence[Item],
    params: SamplingParams,
    rule: Sdar | TwoThresholds | Llada,
) -> Iterator[tuple[Item, Written]]:
    """Each prompt with its answer; batch i has the seed of `params` + i."""
    starts = range(0, len(items), BATCH)
    for start, seeded in zip(starts, numbered_seeds(params, len(starts)), strict=True):
        part = items[start : start + BATCH]
        prompts = [item.prompt for item in part]
        if isinstance(rule, Llada):
            answers = llada.decode(idlm, prompts, seeded, rule, keep_laws=True)
        else:
            answers = sdar.decode(idlm, prompts, seeded, rule, keep_laws=True)
        yield from zip(part, answers, strict=True)


def _readings(
    idlm: Idlm,
    one: Written,
    rule: Sdar | TwoThresholds | Llada,
    params: SamplingParams,
    law: Callable[[Tensor], Tensor],
) -> Iterator[tuple[str, Pairs]]:
    """The tokens of an answer under each definition of p."""
    assert one.log_q is not None  # noqa: S101
    text, first = one.prompt + one.token_ids, len(one.prompt)
    at = torch.arange(first, len(text))
    if isinstance(rule, Llada):
        block, end = None, first + -(-params.max_tokens // rule.block) * rule.block
        depth = (at - first) % rule.block + 1
    else:
        block, end = rule.block, None
        depth = at % rule.block + 1
    tokens = torch.tensor(one.token_ids)
    readings = (
        ("left_to_right", left_to_right(idlm, text, first, block, end)),
        ("reference_tokens", reference_tokens(idlm, text, first, block)),
    )
    for name, logits in readings:
        yield name, Pairs(tokens, depth, law(logits), one.log_q.double())

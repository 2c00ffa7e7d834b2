"""Exactness and its price: the coupled, the ratio and the published rule.

    python -m benchmarks.exactness [--texts 24] [--samples 4000] [--out FILE]

The published rule drafts the most likely token of q, accepts it with probability min(1, p / q), as
if it had been sampled from q, and otherwise samples normalise(max(0, p - q)).

1. On a random model with 5 tokens the law of three tokens is enumerated: AR's, and that of ISD by
   each rule, over every draft, acceptance and correction. The coupled rule's noise cannot be
   enumerated, so the engine's samples are counted, for the ratio rule too; beside their distance
   stands that of as many samples of AR's law.
2. On texts of `nano` the law of the token at each draft is computed from p and q, with its distance
   from p and the standard error over the texts; and the TPF of each rule.

Distances are total variation.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from idlm import LLM, SamplingParams
from idlm.baselines.written import law_of
from idlm.environment import environment
from idlm.evaluation.laws import draft_pairs
from idlm.evaluation.metrics import summary, tpf_decode
from idlm.evaluation.parity import numbered_seeds
from idlm.evaluation.speedup import tokens_per_forward
from idlm.models.attention import NAME
from idlm.models.check import prepare
from idlm.models.gated_lora import LoraSpec, adapter_parameters, all_linear, attach
from idlm.models.idlm_model import Idlm
from idlm.models.loading import load
from idlm.nano.problems import held_out_problems

TEMPERATURES = (0.7, 1.0)
STRIDE, LENGTH, TOKENS = 3, 3, 5
Laws = dict[tuple[int, ...], float]
Rule = Callable[[Tensor, Tensor], Iterator[tuple[int, float, float]]]
"""From p and q [V] to the drafts: each with its probability and that of its acceptance."""


def residual(p: Tensor, q: Tensor) -> Tensor:
    """normalise(max(0, p - q)) of laws [..., V]; p where nothing is left."""
    left = (p - q).clamp(min=0)
    total = left.sum(-1, keepdim=True)
    return torch.where(total > 0, left / total.clamp(min=1e-300), p)


def by_ratio(p: Tensor, q: Tensor) -> Iterator[tuple[int, float, float]]:
    """Drafts are samples of q."""
    for token in range(len(q)):
        yield token, float(q[token]), min(1.0, float(p[token] / q[token].clamp(min=1e-300)))


def published(p: Tensor, q: Tensor) -> Iterator[tuple[int, float, float]]:
    """The draft is the most likely token of q."""
    token = int(q.argmax())
    yield token, 1.0, min(1.0, float(p[token] / q[token]))


def output_law(p: Tensor, q: Tensor, rule: Rule) -> Tensor:
    """The law of the token that a draft or its correction becomes, [V]."""
    law = torch.zeros_like(p)
    for token, chance, accepted in rule(p, q):
        law[token] += chance * accepted
        law += chance * (1 - accepted) * residual(p, q)
    return law


def distance(left: Tensor, right: Tensor) -> Tensor:
    """Total variation of laws [..., V]."""
    return 0.5 * (left - right).abs().sum(-1)


class Tiny:
    """A random model with an adapter, small enough to enumerate: laws by text."""

    def __init__(self, temperature: float) -> None:
        self.idlm, self.prompt = tiny(), [1, 2]
        self.law = law_of(self.idlm, SamplingParams(temperature=temperature))
        self._known: dict[tuple[tuple[int, ...], int], Tensor] = {}

    def rows(self, text: tuple[int, ...], masks: int) -> Tensor:
        """The laws [1 + masks, V] of the last token's row and of the MASK rows after it.

        With masks the last token is left out of what they see: it is not known when they draft.
        """
        key = (text, masks)
        if key not in self._known:
            ids = [*self.prompt, *text, *[self.idlm.mask_id] * masks]
            rows = torch.tensor(ids)
            seen = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
            logits = self.idlm.forward(rows, torch.arange(len(ids)), seen)
            self._known[key] = self.law(logits[len(ids) - masks - 1 :]).exp()
        return self._known[key]

    def p(self, text: tuple[int, ...]) -> Tensor:
        """The law of the token after `text`."""
        return self.rows(text, 0)[0]

    def q(self, text: tuple[int, ...]) -> Tensor:
        """The laws [K, V] of the drafts after the token that follows `text`."""
        return self.rows(text, STRIDE - 1)[1:]


def tiny() -> Idlm:
    """Random weights in float64; MASK is token 4, so four tokens are written."""
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=TOKENS,
        hidden_size=16,
        num_hidden_layers=2,
        intermediate_size=24,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=32,
        initializer_range=0.6,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
        attn_implementation=NAME,
    )
    model = Qwen3ForCausalLM(config).double().eval()
    prepare(model)
    idlm = Idlm(model, None, TOKENS - 1, block_size=STRIDE - 1, name="tiny")
    idlm.gate = attach(model, LoraSpec(4, 4.0, all_linear(model)), idlm.mask_id)
    for weight in adapter_parameters(model).values():
        torch.nn.init.normal_(weight, std=0.2)
    return idlm


def ar_law(model: Tiny) -> Laws:
    """The probability of each text of `LENGTH` tokens."""
    laws: Laws = {(): 1.0}
    for _ in range(LENGTH):
        laws = {
            (*text, token): chance * float(model.p(text)[token])
            for text, chance in laws.items()
            for token in range(TOKENS - 1)
        }
    return laws


def isd_law(model: Tiny, rule: Rule) -> Laws:
    """The same for ISD: a first token, then windows of drafts for all outcomes."""
    found: Counter[tuple[int, ...]] = Counter()

    def window(text: tuple[int, ...], before: tuple[int, ...], depth: int, chance: float) -> None:
        """Goes on after `text`, whose draft at `depth` comes from the MASK rows after `before`."""
        if chance == 0:
            return
        if len(text) >= LENGTH:
            found[text[:LENGTH]] += chance
            return
        p = model.p(text)
        if depth == STRIDE - 1:  # all drafts accepted: the bonus
            for token in range(TOKENS - 1):
                window((*text, token), text, 0, chance * float(p[token]))
            return
        q = model.q(before)[depth]
        for token, drawn, accepted in rule(p, q):
            window((*text, token), before, depth + 1, chance * drawn * accepted)
            left = residual(p, q)
            for other in range(TOKENS - 1):
                now = chance * drawn * (1 - accepted) * float(left[other])
                window((*text, other), text, 0, now)

    for token in range(TOKENS - 1):
        window((token,), (), 0, float(model.p(())[token]))
    return dict(found)


def between(left: Laws, right: Laws) -> float:
    """Total variation."""
    return 0.5 * sum(abs(left.get(text, 0.0) - right.get(text, 0.0)) for text in left | right)


def counted(model: Tiny, verification: str, temperature: float, samples: int) -> Laws:
    """The shares of the engine's texts, seeds counting up."""
    params = SamplingParams(
        temperature=temperature, max_tokens=LENGTH, verification=verification, seed=0
    )
    llm = LLM(model.idlm, stride=STRIDE, branches="all", max_num_seqs=64)
    results = llm.generate([model.prompt] * samples, numbered_seeds(params, samples))
    counts = Counter(tuple(result.token_ids) for result in results)
    return {text: count / samples for text, count in counts.items()}


def chance_distance(law: Laws, samples: int, rounds: int = 200) -> tuple[float, float]:
    """The mean distance of `samples` samples of a law from it, and the 99th percentile."""
    texts = list(product(range(TOKENS - 1), repeat=LENGTH))
    weights = torch.tensor([law[text] for text in texts]).double()
    random = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(weights.expand(rounds, -1), samples, True, generator=random)
    shares = torch.stack([torch.bincount(row, minlength=len(texts)) for row in drawn]) / samples
    found = distance(shares, weights / weights.sum())
    return float(found.mean()), float(found.quantile(0.99))


def enumerated(temperature: float, samples: int) -> dict[str, Any]:
    """Part 1 at a temperature."""
    model = Tiny(temperature)
    law = ar_law(model)
    by_chance, most = chance_distance(law, samples)
    return {
        "enumerated": {
            "ratio": between(law, isd_law(model, by_ratio)),
            "published": between(law, isd_law(model, published)),
        },
        "sampled": {
            rule: between(law, counted(model, rule, temperature, samples))
            for rule in ("coupled", "ratio")
        },
        "samples": samples,
        "sampled_by_chance": by_chance,
        "sampled_by_chance_99": most,
    }


def on_texts(idlm: Idlm, temperature: float, texts: int, stride: int = 4) -> dict[str, Any]:
    """Part 2 at a temperature: by rule the distance at a draft, its standard error and the TPF."""
    chats = [[{"role": "user", "content": one.question}] for one in held_out_problems(texts)]
    prompts, drafts = idlm.encoder.chats(chats), stride - 1
    shared = {"temperature": temperature, "max_tokens": 192, "seed": 0}
    law = law_of(idlm, SamplingParams(**shared))
    llm = LLM(idlm, stride=stride, branches="all")
    report: dict[str, Any] = {}
    for rule in ("coupled", "ratio"):
        params = numbered_seeds(SamplingParams(**shared, verification=rule), texts)
        results = llm.generate(prompts, params)
        report[rule] = {"tpf": summary(results)["tpf"], "tpf_decode": tpf_decode(results)}
    off, sums = [], torch.zeros(3, drafts, dtype=torch.float64)
    for prompt, result in zip(prompts, results, strict=True):
        pairs = draft_pairs(idlm, prompt + result.token_ids, len(prompt), drafts, law)
        p, q = pairs.log_p.exp(), pairs.log_q.exp()
        best = q.argmax(-1, keepdim=True)
        accepted = (p.gather(1, best) / q.gather(1, best)).clamp(max=1)
        left = residual(p, q)
        made = ((1 - accepted) * left).scatter_add(1, best, accepted)
        ratio = torch.minimum(p, q) + (1 - torch.minimum(p, q).sum(-1, keepdim=True)) * left
        off.append([float(distance(law_, p).mean()) for law_ in (ratio, made)])
        shares = [torch.ones(len(p)), torch.minimum(p, q).sum(-1), accepted[:, 0]]
        sums.index_add_(1, pairs.depth - 1, torch.stack(shares).double())
    each = torch.tensor(off, dtype=torch.float64)
    for column, rule in enumerate(("ratio", "published")):
        acceptance = (sums[1 + column] / sums[0]).tolist()
        report.setdefault(rule, {}).update(
            distance=float(each[:, column].mean()),
            standard_error=float(each[:, column].std() / texts**0.5),
            acceptance=acceptance,
            tpf_expected=tokens_per_forward(acceptance, stride),
        )
    return report


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", type=int, default=24)
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    idlm = load("nano")
    report = {
        "environment": environment(),
        "texts": options.texts,
        "temperatures": {
            str(temperature): {
                "tiny": enumerated(temperature, options.samples),
                "nano": on_texts(idlm, temperature, options.texts),
            }
            for temperature in TEMPERATURES
        },
    }
    text = json.dumps(report, indent=1)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""The baselines once more, a prompt at a time and token by token, without a cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from idlm.baselines.llada import Llada
from idlm.baselines.sdar import Sdar, TwoThresholds
from idlm.models.idlm_model import Idlm

Law = list[list[float]]


@torch.inference_mode()
def probabilities(idlm: Idlm, tokens: list[int], sees: Callable[[int, int], bool]) -> Tensor:
    """The law [T, V] of every row of a text, row i of which sees row j if `sees(i, j)`."""
    size = len(tokens)
    visible = torch.tensor([[sees(i, j) for j in range(size)] for i in range(size)])
    hidden = idlm.hidden(torch.tensor([tokens]), torch.arange(size)[None], visible[None, None])
    logits = idlm.head(hidden)[0].double()
    logits[:, idlm.mask_id] = -torch.inf
    return logits.softmax(-1)


def counts(tokens: int, steps: int) -> list[int]:
    each = [0] * steps
    for token in range(tokens):
        each[token % steps] += 1
    return each


def pick(
    law: Tensor, masked: list[int], count: int, strategy: str, threshold: float
) -> dict[int, int]:
    """The greedy tokens that a step commits, by their places."""
    best = {at: (float(law[at].max()), int(law[at].argmax())) for at in masked}
    ranked = sorted(masked, key=lambda at: (-best[at][0], at))
    chosen = ranked[:count]
    if strategy == "sequential":
        chosen = masked[:count]
    if strategy == "dynamic":
        sure = [at for at in masked if best[at][0] > threshold]
        chosen = sure if len(sure) >= min(count, len(masked)) else chosen
    if strategy == "entropy":
        entropy = {at: float(torch.special.entr(law[at]).sum()) for at in masked}
        chosen, total = [], 0.0
        for at in sorted(masked, key=entropy.__getitem__):
            total += entropy[at]
            if chosen and total > threshold:
                break
            chosen.append(at)
    return {at: best[at][1] for at in chosen}


def sdar(
    idlm: Idlm, prompt: list[int], limit: int, rule: Sdar | TwoThresholds
) -> tuple[list[int], int, dict[int, Tensor]]:
    """The greedy answer, the forwards, and the law that each column was committed from."""
    block, text, forwards, laws = rule.block, list(prompt), 0, {}
    while True:
        start = len(text) // block * block
        given = len(text)
        text += [idlm.mask_id] * (start + block - given)
        step = after = 0
        while True:
            forwards += 1
            masked = [at for at in range(start, len(text)) if text[at] == idlm.mask_id]
            law = probabilities(idlm, text, lambda i, j: j // block <= i // block)
            if isinstance(rule, Sdar):
                if not masked:
                    break  # this forward wrote the block's keys and values
                each = counts(block, rule.steps)[step]
                new = pick(law, masked, each, rule.strategy, rule.threshold)
            else:
                new = pick(law, masked, 1, "dynamic", rule.unmask) if masked else {}
                for at in range(given, len(text)):
                    best = int(law[at].argmax())
                    if at not in masked and best != text[at] and law[at].max() > rule.edit:
                        new[at] = best
                after += not masked
                if not masked and (not new or after > rule.post_steps or rule.edit >= 1):
                    forwards += rule.edit < 1  # one saw that nothing changes, another writes
                    break
            for at, token in new.items():
                text[at], laws[at] = token, law[at]
            step += 1
            if not isinstance(rule, Sdar) and after >= rule.post_steps:
                forwards += 1
                break
        ends = [at for at in range(given, len(text)) if text[at] in idlm.eos_ids]
        if ends or len(text) >= len(prompt) + limit:
            stop = ends[0] + 1 if ends else len(text)
            return text[len(prompt) : min(stop, len(prompt) + limit)], forwards, laws


def llada(idlm: Idlm, prompt: list[int], limit: int, rule: Llada) -> tuple[list[int], int]:
    """The greedy answer and the forwards."""
    blocks = -(-limit // rule.block)
    text, forwards = prompt + [idlm.mask_id] * (blocks * rule.block), 0
    for number in range(blocks):
        start = len(prompt) + number * rule.block
        for each in counts(rule.block, rule.steps):
            forwards += 1
            law = probabilities(idlm, text, lambda i, j: True)
            masked = [at for at in range(start, start + rule.block) if text[at] == idlm.mask_id]
            for at, token in pick(law, masked, each, "static", 0.0).items():
                text[at] = token
    answer = text[len(prompt) : len(prompt) + limit]
    ends = [at for at, token in enumerate(answer) if token in idlm.eos_ids]
    return answer[: ends[0] + 1] if ends else answer, forwards

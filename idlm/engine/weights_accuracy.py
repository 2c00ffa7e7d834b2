"""The effect of a weight format of the linear layers on a model's logits.

Shapes: T tokens of the text, V logit columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from idlm.errors import InputError
from idlm.kernels import native
from idlm.kernels.linears import Linears
from idlm.models.idlm_model import Idlm

TEXT = """The library opens at nine. On weekdays it closes at eight in the evening, on Saturdays at
one. Readers may borrow up to twelve books for four weeks; a book that somebody else has asked for
cannot be renewed. Anna borrows 5 books on Monday and returns 2 of them on Thursday. How many has
she at home on Friday? She has 5 - 2 = 3 books.

def median(values: list[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) / 2

Water boils at 100 degrees Celsius at sea level, and at lower temperatures higher up, because the
air presses less. In La Paz, 3,600 metres above the sea, potatoes take longer to cook: the water
around them is only 88 degrees hot, however high the flame. Die Kartoffeln brauchen dort länger.
"""


@dataclass(frozen=True)
class WeightsAccuracy:
    """A format against float32, over the tokens of `TEXT`.

    Attributes:
        logit_difference_mean, logit_difference_worst: absolute, over all tokens and columns.
        kl_mean, kl_worst: KL(float32 || format) of the next token's law, in nats.
        same_top: the share of rows whose most likely token is the same in both.
        tokens: T.
    """

    logit_difference_mean: float
    logit_difference_worst: float
    kl_mean: float
    kl_worst: float
    same_top: float
    tokens: int


@torch.inference_mode()
def weights_accuracy(idlm: Idlm, format: str) -> WeightsAccuracy:
    """Run `TEXT` through the model in float32 and with its weights in `format`.

    Raises:
        InputError: the model is not in float32 on a CPU, or the C kernels are not available.
    """
    if idlm.device.type != "cpu" or idlm.dtype != torch.float32:
        raise InputError(f"weights={format!r} is for a float32 model on a CPU")
    if not native.loaded():
        raise InputError(f"weights={format!r} needs the C kernels, which are not there")
    tokens = _tokens(idlm)
    plain = _logits(idlm, tokens)
    with Linears(idlm.linear_groups(), format).use():
        other = _logits(idlm, tokens)
    apart = (plain - other).abs()
    laws = (F.log_softmax(plain, dim=-1), F.log_softmax(other, dim=-1))
    kl = (laws[0].exp() * (laws[0] - laws[1])).sum(dim=-1)
    return WeightsAccuracy(
        float(apart.mean()),
        float(apart.max()),
        float(kl.mean()),
        float(kl.max()),
        float(plain.argmax(dim=-1).eq(other.argmax(dim=-1)).double().mean()),
        len(tokens),
    )


def _tokens(idlm: Idlm) -> Tensor:
    """int64 [T]: the tokens of `TEXT`, or random tokens if the model has no tokenizer."""
    if idlm.tokenizer is not None:
        return torch.tensor(idlm.tokenizer(TEXT).input_ids[: idlm.context])
    generator = torch.Generator().manual_seed(0)
    return torch.randint(idlm.vocab_size, (min(256, idlm.context),), generator=generator)


def _logits(idlm: Idlm, tokens: Tensor) -> Tensor:
    """float64 [T, V]: the logits of `tokens` with causal attention."""
    visible = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()[None, None]
    positions = torch.arange(len(tokens))[None]
    return idlm.head(idlm.hidden(tokens[None], positions, visible))[0].double()

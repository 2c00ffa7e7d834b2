"""Draft heads: `scores_k = LMhead(h_k) + g(h_k, token before)` makes drafts of MASK rows in turn.

A window's MASK rows are computed before the token is known that ends its verification. So by
themselves they know neither that token nor each other. A head g corrects the scores of row k once
the token before is known: the last committed token, then draft 1, draft 2, ... It is trained with
the adapter. Drafts may be anything: the output stays AR's.

With e the embedding of the token before and w the row of the LM head of a candidate, each scaled to
root mean square 1 where it has a bar, the kinds are

    markov     g = w . U A ē                            a low-rank bias by the token before
    selector   g = u . silu(H h̄ + A ē + C w̄)            pairs of hidden state, token and candidate
    mlp        g = w . U silu(H h̄ + A ē)                corrects the hidden state

g is computed for the candidates alone: the `top` tokens of LMhead(h_k). The other tokens keep their
scores, so that no law, ban or guide runs out of tokens. The LM head runs once for all rows; in turn
there are only `top` products of D numbers for each.

Shapes: n rows, m candidates, D hidden size, E size of an embedding, V logit columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from idlm.errors import InputError
from idlm.models.weights import embedding_rows, file_tensors, fill, output_head, whole

FILE = "draft_head.safetensors"
"""The head's tensors, in the folder of its adapter or model."""
EPSILON = 1e-9
"""Small beside the mean square of any embedding, in float16 too, where it is computed in float32.
"""


@dataclass(frozen=True)
class HeadSpec:
    """The kind of a head, its inner size, and the number m of its candidates."""

    kind: str
    size: int
    top: int

    def to_json(self) -> dict[str, Any]:
        """What `read_spec` reads."""
        return asdict(self)


class DraftHead(nn.Module):
    """A head; the subclasses are the kinds. As it begins, g is 0."""

    def __init__(self, spec: HeadSpec, hidden: int, embedding: int) -> None:
        super().__init__()
        self.spec = spec
        self.before = nn.Linear(embedding, spec.size, bias=False)

    def forward(self, hidden: Tensor, before: Tensor, rows: Tensor) -> Tensor:
        """g [n, m] for hidden states [n, D], the embeddings [n, E] of the tokens before, and the
        rows [n, m, D] of the candidates in the LM head. It computes in its own type, which in
        training may be more precise than the model's."""
        kind = self.before.weight.dtype
        return self.scores(hidden.to(kind), before.to(kind), rows.to(kind))

    def scores(self, hidden: Tensor, before: Tensor, rows: Tensor) -> Tensor:
        """`forward` of one kind."""
        raise NotImplementedError


class Markov(DraftHead):
    """`markov`: A is `before`, U is `up`."""

    def __init__(self, spec: HeadSpec, hidden: int, embedding: int) -> None:
        super().__init__(spec, hidden, embedding)
        self.up = _zeros(spec.size, hidden)

    def scores(self, hidden: Tensor, before: Tensor, rows: Tensor) -> Tensor:
        return _products(rows, self.up(self.before(_scaled(before))))


class Selector(DraftHead):
    """`selector`: A is `before`, H is `hidden`, C is `candidate`, u is `out`."""

    def __init__(self, spec: HeadSpec, hidden: int, embedding: int) -> None:
        super().__init__(spec, hidden, embedding)
        self.hidden = nn.Linear(hidden, spec.size, bias=False)
        self.candidate = nn.Linear(hidden, spec.size, bias=False)
        self.out = _zeros(spec.size, 1)

    def scores(self, hidden: Tensor, before: Tensor, rows: Tensor) -> Tensor:
        known = self.hidden(_scaled(hidden)) + self.before(_scaled(before))
        scores: Tensor = self.out(F.silu(known[:, None] + self.candidate(_scaled(rows))))
        return scores[..., 0]


class Mlp(DraftHead):
    """`mlp`: A is `before`, H is `hidden`, U is `up`."""

    def __init__(self, spec: HeadSpec, hidden: int, embedding: int) -> None:
        super().__init__(spec, hidden, embedding)
        self.hidden = nn.Linear(hidden, spec.size, bias=False)
        self.up = _zeros(spec.size, hidden)

    def scores(self, hidden: Tensor, before: Tensor, rows: Tensor) -> Tensor:
        inner = self.hidden(_scaled(hidden)) + self.before(_scaled(before))
        return _products(rows, self.up(F.silu(inner)))


KINDS: Mapping[str, type[DraftHead]] = {"markov": Markov, "selector": Selector, "mlp": Mlp}


def _zeros(inner: int, out: int) -> nn.Linear:
    layer = nn.Linear(inner, out, bias=False)
    nn.init.zeros_(layer.weight)
    return layer


def _scaled(vectors: Tensor) -> Tensor:
    """Vectors with root mean square 1; the embedding of a padding token may be 0."""
    return F.rms_norm(vectors, vectors.shape[-1:], eps=EPSILON)


def _products(rows: Tensor, vectors: Tensor) -> Tensor:
    """Products [n, m] of the rows [n, m, D] with a vector [n, D] each."""
    return (rows @ vectors[..., None])[..., 0]


def new_head(model: PreTrainedModel, spec: HeadSpec) -> DraftHead:
    """An untrained head for a model, on its device and in its type."""
    head = KINDS[spec.kind](spec, *_sizes(model))
    return head.to(model.device, model.dtype)


def corrected(model: PreTrainedModel, head: DraftHead, rows: RowsBefore) -> Tensor:
    """The scores LMhead(h) + g [n, V] of all rows at once, each given the token before it."""
    candidates = rows.logits.topk(candidate_count(model, head), dim=-1).indices
    before = embedding_rows(model)[rows.before]
    bias = head(rows.hidden, before, output_head(model).weight[candidates])
    return rows.logits.scatter_add(-1, candidates, bias.to(rows.logits.dtype))


@dataclass(frozen=True)
class RowsBefore:
    """MASK rows with the tokens before them.

    Attributes:
        logits: LMhead(h), [n, V]; hidden: h, [n, D].
        before: int64 [n], tokens of the vocabulary.
    """

    logits: Tensor
    hidden: Tensor
    before: Tensor


def candidate_count(model: PreTrainedModel, *heads: DraftHead) -> int:
    """m: the most candidates of the heads, but not more than there are tokens."""
    return min(max(head.spec.top for head in heads), output_head(model).weight.shape[0])


def read_spec(value: object, where: str) -> HeadSpec | None:
    """The head that a JSON file names; None if it names none.

    Raises:
        InputError: it cannot be read; the message has `where`.
    """
    if value is None:
        return None
    keys = value if isinstance(value, dict) else {"kind": value}
    kind, size, top = (keys.get(key) for key in ("kind", "size", "top"))
    if kind not in KINDS:
        raise InputError(
            f"{where} has a draft head of kind {kind!r}, not {', '.join(KINDS)}; "
            "use the idlm that wrote it"
        )
    if not all(type(number) is int and number > 0 for number in (size, top)):
        raise InputError(
            f"{where} has a draft head with size {size!r} and top {top!r}; "
            "both must be positive integers"
        )
    return HeadSpec(str(kind), int(str(size)), int(str(top)))


def model_head(config: PreTrainedConfig, folder: Path) -> HeadSpec | None:
    """The draft head that a model's config names, as `read_spec` does."""
    return read_spec(getattr(config, "draft_head", None), f"{str(folder / 'config.json')!r}")


def check_head(model: PreTrainedModel, spec: HeadSpec, folder: Path) -> None:
    """Check the tensors of a head against a model, whose own weights need not be loaded.

    Raises:
        InputError: one is missing, or has another shape.
    """
    with torch.device("meta"):
        wanted = KINDS[spec.kind](spec, *_sizes(model)).state_dict()
    found = file_tensors(folder / FILE)
    for name in sorted({*wanted, *found}):
        shapes = [list(held[name].shape) if name in held else None for held in (found, wanted)]
        if shapes[0] != shapes[1]:
            raise InputError(
                f"{str(folder / FILE)!r}: {name} has shape {shapes[0]}, not {shapes[1]}; "
                "give its own base"
            )


def load_head(model: PreTrainedModel, spec: HeadSpec | None, folder: Path) -> DraftHead | None:
    """The head in `folder`, for a model that it fits; None without `spec`.

    Raises:
        InputError: as `check_head`; or its numbers are not finite.
    """
    if spec is None:
        return None
    head = new_head(model, spec)
    refill_head(model, head, folder)
    return head.requires_grad_(False)


def refill_head(model: PreTrainedModel, head: DraftHead, folder: Path) -> None:
    """Load the tensors in `folder` into a head; errors as of `load_head`."""
    check_head(model, head.spec, folder)
    tensors = load_file(folder / FILE)
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise InputError(f"{str(folder / FILE)!r}: {name} is not finite; train it again")
    for name, tensor in head.state_dict().items():
        fill(tensor, tensors[name])


def head_tensors(head: DraftHead) -> dict[str, Tensor]:
    """The head's tensors; if they are sharded over ranks, all ranks call this."""
    return {name: whole(tensor) for name, tensor in head.state_dict().items()}


def save_head(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write the head's tensors into a folder; its spec goes to the JSON file there."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_file(stored, folder / FILE, metadata={"format": "pt"})


def _sizes(model: PreTrainedModel) -> tuple[int, int]:
    """D and E."""
    return output_head(model).weight.shape[1], embedding_rows(model).shape[1]

"""The speed-up model: from acceptance, a model's shape and a machine to tokens per second.

Arithmetic alone, without torch, so that it can be ported; docs/methods.md explains the formulas.

A method decodes in cycles of one or more forwards, each with its rows for every request:

    TPF        = tokens of a cycle / its forwards
    rows       = rows of a cycle / its tokens          (1 for AR)
    overhead   = seconds of the mean forward / seconds of an AR forward
    tokens/s   = batch * tokens of a cycle / its seconds
    speed-up   = tokens/s over that of AR = TPF / overhead

The seconds of a forward of R rows for each of B requests with C tokens in the cache:

    memory  = (weights + B * C * KV bytes of a token) / bandwidth
    compute = B * (2 * body * R' + 2 * head * H + 4 * layers * heads * E * C * R') / FLOP/s
    seconds = fixed + memory + compute - overlap * min(memory, compute)

R' counts a MASK row that enters at layer L0 as (L - L0) / L of a row; H rows go through the LM
head. With overlap 1 this is the roofline, with 0 reads and arithmetic follow each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import comb

from idlm.errors import InputError


@dataclass(frozen=True)
class Shape:
    """A model's shape; bytes are those of a weight and of a number in the cache.

    Attributes:
        body: parameters of the layers' matrices that a row uses.
        head_size: E, of an attention head.
    """

    layers: int
    hidden: int
    vocab: int
    heads: int
    kv_heads: int
    head_size: int
    body: float
    weight_bytes: float = 2.0
    cache_bytes: float = 2.0

    @property
    def head(self) -> int:
        """Parameters of the LM head."""
        return self.vocab * self.hidden

    @property
    def weights(self) -> float:
        """Bytes that a forward reads: the layers and the LM head, but no embedding."""
        return (self.body + self.head) * self.weight_bytes

    @property
    def token_bytes(self) -> float:
        """Bytes of a token in the KV cache."""
        return 2 * self.layers * self.kv_heads * self.head_size * self.cache_bytes


@dataclass(frozen=True)
class Machine:
    """What a machine really reaches, not what its data sheet says.

    Attributes:
        bandwidth: bytes a second.
        flops: floating-point operations a second.
        fixed: seconds of a forward that depend on neither: launches, the host, sampling.
        overlap: the share of the shorter of reads and arithmetic that the longer one hides.
    """

    bandwidth: float
    flops: float
    fixed: float = 0.0
    overlap: float = 1.0


@dataclass(frozen=True)
class Load:
    """Requests at once, and the tokens that each has in the cache."""

    batch: int = 1
    context: int = 0


@dataclass(frozen=True)
class Drafting:
    """What drafts cost beside their rows.

    Attributes:
        entry_layer: L0, where MASK rows enter; 0: at the bottom.
        head_parameters: of a draft head, applied to each draft in turn.
        adapter: the seconds of a forward with an adapter, over those without; 1.12 is the paper's
            figure for its gated LoRA.
    """

    entry_layer: int = 0
    head_parameters: float = 0.0
    adapter: float = 1.0


PLAIN = Drafting()


@dataclass(frozen=True)
class Forward:
    """The rows of one request in a forward.

    Attributes:
        rows: those that go through all layers.
        masks: those that may enter late.
        head_rows: those of them that go through the LM head.
        drafts: how often the draft head is applied.
        count: how many such forwards a cycle has.
    """

    rows: float
    masks: float = 0.0
    head_rows: float = 1.0
    drafts: float = 0.0
    count: float = 1.0


@dataclass(frozen=True)
class Method:
    """A cycle of decoding: the tokens that it commits, on average, and its forwards."""

    name: str
    tokens: float
    forwards: tuple[Forward, ...]

    @property
    def forward_count(self) -> float:
        return sum(forward.count for forward in self.forwards)

    @property
    def tpf(self) -> float:
        """Tokens per forward."""
        return self.tokens / self.forward_count

    @property
    def rows(self) -> float:
        """Rows for each committed token: the arithmetic over that of AR."""
        each = (forward.count * (forward.rows + forward.masks) for forward in self.forwards)
        return sum(each) / self.tokens

    @property
    def efficiency(self) -> float:
        """The paper's compute efficiency: TPF**2 / rows of a forward = TPF / rows of a token."""
        return self.tpf / self.rows


@dataclass(frozen=True)
class Speed:
    """What a method reaches; seconds are those of its mean forward."""

    name: str
    tpf: float
    rows: float
    overhead: float
    seconds: float
    tokens_per_second: float
    tokens_per_second_each: float
    speedup: float


def reach(acceptance: Sequence[float], drafts: int) -> list[float]:
    """r_0 .. r_drafts: the chance that the first k drafts are all accepted. Depths past the end of
    `acceptance` have its last value.

    Raises:
        InputError: there are drafts and no acceptance, or one is not a probability.
    """
    if drafts and not acceptance:
        raise InputError("acceptance is empty; give at least the one of the first draft")
    for value in acceptance:
        if not 0 <= value <= 1:
            raise InputError(f"acceptance {value} is no probability; give values from 0 to 1")
    reached = [1.0]
    for depth in range(drafts):
        reached.append(reached[-1] * acceptance[min(depth, len(acceptance) - 1)])
    return reached


def tokens_per_forward(
    acceptance: Sequence[float], stride: int, branches: Iterable[int] | None = None
) -> float:
    """TPF of strided decoding; `branches` are the outcomes that get MASK rows, None all of them.

    With K = stride - 1 and P the chance of an outcome with a branch, a share 1 / (2 - P) of the
    windows has drafts and commits 1 + r_1 + .. + r_K; the others commit 1. All outcomes: P = 1.
    The chain, `branches` = (K,): P = r_K.

    Raises:
        InputError: the stride is below 1, a branch is not in 0..K, or see `reach`.
    """
    if stride < 1:
        raise InputError(f"stride {stride} is below 1; 1 is AR")
    drafts = stride - 1
    reached = [*reach(acceptance, drafts), 0.0]
    outcomes = set(range(stride) if branches is None else branches)
    if unknown := outcomes - set(range(stride)):
        raise InputError(f"branches {sorted(unknown)} are no outcomes of {drafts} drafts")
    drafted = 1.0 if not drafts else sum(reached[j] - reached[j + 1] for j in outcomes)
    return (sum(reached) + 1 - drafted) / (2 - drafted)


def denoising_steps(block: int, confident: float) -> float:
    """The expected forwards that unmask a block of `block` tokens when each MASK is confident
    enough with chance `confident` at every step, and at least one is committed:

        E(0) = 0,  E(m) = 1 + sum_k Binomial(m, confident)(k) * E(m - max(k, 1))

    Raises:
        InputError: `confident` is no probability, or the block is empty.
    """
    if not 0 <= confident <= 1 or block < 1:
        raise InputError(f"block {block}, confident {confident}: give 1 or more, and 0 to 1")
    steps = [0.0]
    for masked in range(1, block + 1):
        chances = [
            comb(masked, k) * confident**k * (1 - confident) ** (masked - k)
            for k in range(masked + 1)
        ]
        # none or one confident: one is committed either way
        after = (chances[k] * steps[masked - max(k, 1)] for k in range(masked + 1))
        steps.append(1 + sum(after))
    return steps[block]


def autoregressive() -> Method:
    """One row, one token."""
    return Method("ar", 1.0, (Forward(1),))


def strided(
    acceptance: Sequence[float], stride: int, branches: Iterable[int] | None = None
) -> Method:
    """ISD: N verify rows, and K MASK rows for each branch. The LM head runs on the verify rows and
    on the K masks of the outcome. The window is as wide when it has no drafts."""
    drafts = stride - 1
    chosen = None if branches is None else tuple(branches)
    groups = 0 if not drafts else stride if chosen is None else len(set(chosen))
    tokens = tokens_per_forward(acceptance, stride, chosen)
    kind = "all" if chosen is None else "chain" if set(chosen) == {drafts} else "branches"
    name = f"{kind}-{stride}" if drafts else "ar"
    return Method(name, tokens, (Forward(stride, groups * drafts, stride + drafts, drafts),))


def chain(acceptance: Sequence[float], stride: int) -> Method:
    """ISD as published: MASK rows only for the outcome that all drafts are accepted."""
    return strided(acceptance, stride, (stride - 1,))


def block_diffusion(confident: float, block: int = 4, commit: bool = True) -> Method:
    """SDAR: the expected forwards over a block (`denoising_steps`), and one that writes its KV."""
    denoise = Forward(block, 0, block, count=denoising_steps(block, confident))
    forwards = (denoise, Forward(block, 0, 0)) if commit else (denoise,)
    return Method(f"sdar-{block}", float(block), forwards)


def whole_sequence(answer: int, steps: int, context: int = 0) -> Method:
    """LLaDA: `steps` forwards of the whole sequence for an answer of `answer` tokens. There is no
    cache, so the `context` tokens of the prompt are rows too; the context of a load is the sequence
    that the rows see."""
    forward = Forward(context + answer, 0, context + answer, count=steps)
    return Method("llada", float(answer), (forward,))


def two_forwards(acceptance: Sequence[float], stride: int) -> Method:
    """UNO: a forward drafts, another verifies.

    The drafting forward has the last token's row, whose draft comes from p itself and so always
    stands, and K = stride - 1 noise rows. The verifying one has the `stride` drafts. Together they
    commit 2 + r_1 + .. + r_K tokens.
    """
    drafts = stride - 1
    tokens = 1 + sum(reach(acceptance, drafts))
    draft = Forward(1, drafts, stride, drafts)
    return Method(f"two-forwards-{stride}", tokens, (draft, Forward(stride, 0, stride)))


def forward_seconds(
    forward: Forward, shape: Shape, machine: Machine, load: Load, drafting: Drafting = PLAIN
) -> float:
    """Seconds of a forward, by the formula above."""
    late = 1 - drafting.entry_layer / shape.layers
    rows = forward.rows + forward.masks * late
    heads = forward.drafts * drafting.head_parameters
    attended = 4 * shape.layers * shape.heads * shape.head_size * load.context
    each = 2 * shape.body * rows + 2 * shape.head * forward.head_rows + attended * rows + 2 * heads
    memory = shape.weights + load.batch * load.context * shape.token_bytes
    memory = (memory + heads * shape.weight_bytes) / machine.bandwidth
    compute = load.batch * each / machine.flops
    seconds = memory + compute - machine.overlap * min(memory, compute)
    adapted = drafting.adapter if forward.masks else 1.0
    return machine.fixed + adapted * seconds


def speed(
    method: Method, shape: Shape, machine: Machine, load: Load, drafting: Drafting = PLAIN
) -> Speed:
    """What `method` reaches on a machine under a load."""
    one = forward_seconds(autoregressive().forwards[0], shape, machine, load)
    cycle = sum(
        forward.count * forward_seconds(forward, shape, machine, load, drafting)
        for forward in method.forwards
    )
    mean = cycle / method.forward_count
    each = method.tokens / cycle
    return Speed(
        name=method.name,
        tpf=method.tpf,
        rows=method.rows,
        overhead=mean / one,
        seconds=mean,
        tokens_per_second=load.batch * each,
        tokens_per_second_each=each,
        speedup=each * one,
    )


QWEN3_8B = Shape(36, 4096, 151_936, 32, 8, 128, 6_945_767_424)
"""Layers of q 4096, k and v 1024 each, o 4096, and three matrices of 12288."""
H100 = Machine(bandwidth=3.0e12, flops=5.5e14, fixed=2.0e-3, overlap=0.0)
"""The bandwidth of a copy as measured on one, and the FLOP/s of `H200`, which has the same cores.
`fixed` is fitted: with it AR of Qwen3-8B has the published 141 tokens/s at one request."""
H200 = Machine(bandwidth=4.12e12, flops=5.5e14, fixed=5.3e-3, overlap=0.0)
"""The bandwidth of a copy as measured on one; `flops` and `fixed` are fitted to the step times of
this project's engine in benchmarks/results/gpu.json."""

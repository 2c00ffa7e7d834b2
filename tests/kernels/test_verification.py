"""The fused choice of a token: the Triton kernel, its PyTorch twin, and the law plus noise give the
same tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from idlm import SamplingParams
from idlm.decoding import reference
from idlm.decoding.law import Law, choose, positions
from idlm.decoding.noise import MANTISSA, Stream, gumbel
from idlm.decoding.settings import Settings
from idlm.decoding.verify import Drafts, draft, verify
from idlm.kernels import choose as kernels_choose
from tests.attention.oracle import DEVICE

ROWS = 3
CASES = [
    # vocabulary, MASK, splits
    (640, 640, None),
    (640, 17, None),
    (1, 1, None),
    (1024, 1023, 2),
    (3000, 2999, 3),
    (5000, 5000, 1),
    (9001, 4, 9),
]
REQUESTS = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.3, verification="ratio"),
    SamplingParams(temperature=1.7),
    SamplingParams(temperature=30.0),
]


def table(
    vocab: int, mask_id: int, requests: list[SamplingParams]
) -> tuple[Settings, Tensor, Tensor]:
    """Settings, logits [B, R, V] in float64, and the first positions."""
    rows = Settings.empty(len(requests), vocab, mask_id, DEVICE)
    for slot, params in enumerate(requests):
        rows.put(slot, params, seed=2**63 - 1 - slot, prompt=[0])
    random = torch.Generator().manual_seed(vocab)
    logits = 3 * torch.randn(len(requests), ROWS, vocab, generator=random, dtype=torch.float64)
    return rows, logits.to(DEVICE), torch.arange(len(requests), device=DEVICE) * 1000


def triton_choose(
    scores: Tensor, rows: Settings, stream: Stream, position: Tensor, splits: int | None = None
) -> Tensor:
    return triton_rows()(scores, rows, rows.features.sampled, stream, position, splits)


def triton_rows() -> Callable[..., Tensor]:
    pytest.importorskip(
        "triton", reason="triton is not installed: only the PyTorch twin can be tested"
    )
    from idlm.kernels.choose_triton import choose_rows

    return choose_rows


def scored(logits: Tensor, rows: Settings, position: Tensor) -> Tensor:
    """What the law makes of the logits: what tokens are chosen from."""
    return Law(rows, rows.features).scores(logits.clone(), position)


def expected(
    logits: Tensor, rows: Settings, requests: list[SamplingParams], stream: Stream, position: Tensor
) -> Tensor:
    """Row by row with the oracle."""
    tokens = torch.empty(logits.shape[:2], dtype=torch.int64)
    for slot, params in enumerate(requests):
        stream_of = stream if params.verification == "ratio" else Stream.TOKEN
        request = reference.Request([0], params, rows.mask_id, seed=2**63 - 1 - slot)
        for row in range(ROWS):
            log_p = request.law(logits[slot, row].cpu(), [])
            tokens[slot, row] = request.sample(log_p, int(position[slot]) + row, stream_of)
    return tokens.to(DEVICE)


@pytest.mark.parametrize("vocab, mask_id, splits", CASES)
@pytest.mark.parametrize("stream", [Stream.TOKEN, Stream.DRAFT])
def test_kernel_and_twin_choose_what_law_and_noise_say(
    vocab: int, mask_id: int, splits: int | None, stream: Stream
) -> None:
    rows, logits, position = table(vocab, mask_id, REQUESTS)
    oracle = expected(logits, rows, REQUESTS, stream, position)
    scores = scored(logits, rows, position)
    assert torch.equal(choose(scores, rows, True, stream, position), oracle)
    assert torch.equal(triton_choose(scores, rows, stream, position, splits), oracle)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_twins_agree_in_every_type(dtype: torch.dtype) -> None:
    """Logits of low precision tie often: the lowest id wins for both."""
    rows, logits, position = table(3000, 5, REQUESTS)
    scores = scored(logits.to(dtype), rows, position)
    assert scores.dtype == dtype, "nothing but MASK was asked for"
    twin = choose(scores, rows, True, Stream.TOKEN, position)
    assert not (twin == rows.mask_id).any()
    assert torch.equal(triton_choose(scores, rows, Stream.TOKEN, position), twin)
    assert torch.equal(triton_choose(scores, rows, Stream.TOKEN, position, splits=2), twin)


@pytest.mark.parametrize("splits", [1, 3])
def test_the_greedy_choice_is_the_first_of_equals(splits: int) -> None:
    rows, logits, position = table(3000, 0, REQUESTS[:1] * 2)
    logits = logits.round()
    scores = scored(logits, rows, position)
    choice = triton_choose(scores, rows, Stream.TOKEN, position, splits)
    best = torch.stack(
        [reference.adjusted(row, REQUESTS[0], banned=(0,)).argmax() for row in logits[0]]
    )
    assert torch.equal(choice[0], best) and (logits[0, 0] == logits[0, 0, best[0]]).sum() > 1
    assert torch.equal(choice, choose(scores, rows, False, Stream.TOKEN, position))


def test_bias_and_bans() -> None:
    requests = [
        SamplingParams(temperature=0, banned_tokens=tuple(range(1, 639))),
        SamplingParams(temperature=0.8, logit_bias={7: 25.0, 9: 24.5, 630: -3.0}),
        SamplingParams(temperature=1.2),
    ]
    rows, logits, position = table(640, 639, requests)
    oracle = expected(logits, rows, requests, Stream.TOKEN, position)
    assert oracle[0].tolist() == [0] * ROWS and 7 in oracle[1]
    scores = scored(logits, rows, position)
    assert torch.equal(choose(scores, rows, True, Stream.TOKEN, position), oracle)
    assert torch.equal(triton_choose(scores, rows, Stream.TOKEN, position), oracle)


def test_a_row_without_a_possible_token_gives_an_id() -> None:
    rows, logits, position = table(640, 639, REQUESTS[:2])
    tokens = triton_choose(logits.fill_(-torch.inf), rows, Stream.TOKEN, position)
    assert ((tokens >= 0) & (tokens < 640)).all()


def test_a_slice_of_larger_logits_and_an_empty_batch() -> None:
    rows, logits, position = table(640, 640, REQUESTS)
    expected = torch.cat([logits, logits], dim=1)[:, 1 : 1 + ROWS]
    twin = choose(expected, rows, True, Stream.TOKEN, position)
    assert torch.equal(triton_choose(expected, rows, Stream.TOKEN, position), twin)
    assert triton_choose(logits[:0], rows, Stream.TOKEN, position[:0]).shape == (0, ROWS)


def test_the_choice_is_made_for_the_device() -> None:
    assert kernels_choose.chooser(torch.device("cpu")) is choose
    assert kernels_choose.chooser(torch.device("cuda")) is triton_rows()


def test_verification_and_drafting_use_the_choice() -> None:
    """The whole of verification and drafting with the kernel in place of the twin, every rule and
    filter at once."""
    requests = [
        *REQUESTS,
        SamplingParams(top_p=0.8, presence_penalty=0.5),
        SamplingParams(temperature=0, logit_bias={3: 2.0}),
        SamplingParams(verification="relaxed", tau=0.4),
    ]
    for live in (requests, requests[:2], requests[:1]):
        rows, logits, position = table(640, 600, live)
        log_q = logits[:, 1:].flip(1).log_softmax(dim=-1)
        drafts = logits[:, 1:].argmax(dim=-1)
        valid = torch.arange(len(live), device=DEVICE) % ROWS
        laws = Law(rows, rows.features, triton_rows()), Law(rows, rows.features)
        verdicts = [verify(law, logits, Drafts(drafts, valid, log_q), position) for law in laws]
        for ours, twin in zip(*verdicts, strict=True):
            assert ours is twin is None or torch.equal(ours, twin)
        proposed, plain = (draft(law, logits, position) for law in laws)
        assert torch.equal(proposed[0], plain[0])


def test_the_error_of_the_rough_noise_is_below_its_bound() -> None:
    """At the ends, where 1 - u has no digits in float32, where the series takes over, between."""
    triton_rows()
    from idlm.kernels import choose_triton
    from tests.kernels.rough import noises

    top, near = 2**MANTISSA, 2 ** (MANTISSA - 6)
    ends = [0, 1, 2, 3, 2**20, 2**28, top // 2, near, top - near]
    bits = torch.tensor(sorted({bit + step for bit in ends for step in (-2, -1, 0, 1)} - {-2, -1}))
    bits = torch.cat([bits, top - 1 - bits[bits < top]])
    random = torch.Generator().manual_seed(0)
    shifts = torch.randint(0, MANTISSA, (4000,), generator=random)
    some = torch.randint(0, top, (4000,), generator=random) >> shifts
    exact, rough = noises(torch.cat([bits, some, top - 1 - some]).clamp(0, top - 1).to(DEVICE))
    assert (exact - rough.to(torch.float64)).abs().max() < choose_triton.BOUND.value / 16


@pytest.mark.parametrize("heat", [0.0625, 40.0])
def test_tokens_that_float32_cannot_tell_apart_are_told_apart(heat: float) -> None:
    """Every token reaches the same, but for less than float32 sees."""
    vocab = 3000
    rows, _, position = table(vocab, vocab, [SamplingParams(temperature=heat)] * 4)
    at = positions(position, ROWS)
    noise = gumbel(rows.keys[:, Stream.TOKEN], at, rows.steps)
    random = torch.Generator().manual_seed(1)
    apart = torch.randint(0, 1000, noise.shape, generator=random).to(DEVICE) * 1e-9 * heat
    scores = apart - heat * noise
    twin = choose(scores, rows, True, Stream.TOKEN, position)
    assert len(twin.unique()) == twin.numel()
    assert torch.equal(triton_choose(scores, rows, Stream.TOKEN, position, splits=2), twin)

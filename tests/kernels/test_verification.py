"""The fused choice of a token: the Triton kernel, its PyTorch twin, and the law plus noise give the same tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from idlm import SamplingParams
from idlm.decoding import batch
from idlm.decoding.law import adjust, law
from idlm.decoding.noise import Stream, gumbel
from idlm.decoding.settings import Settings
from idlm.kernels import verification
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


def table(vocab: int, mask_id: int, requests: list[SamplingParams]) -> tuple[Settings, Tensor, Tensor]:
    """Settings, logits [B, R, V] in float64, and the first positions."""
    rows = Settings.empty(len(requests), vocab, mask_id, DEVICE)
    for slot, params in enumerate(requests):
        rows.put(slot, params, seed=2**63 - 1 - slot, prompt=[0])
    random = torch.Generator().manual_seed(vocab)
    logits = 3 * torch.randn(len(requests), ROWS, vocab, generator=random, dtype=torch.float64)
    return rows, logits.to(DEVICE), torch.arange(len(requests), device=DEVICE) * 1000


def triton_choose(
    logits: Tensor, bias: Tensor | None, rows: Settings, stream: Stream, first: Tensor, splits: int | None = None
) -> Tensor:
    pytest.importorskip("triton", reason="triton is not installed: only the PyTorch twin can be tested")
    from idlm.kernels.verification_triton import choose_rows

    return choose_rows(logits, bias, rows, rows.features.sampled, stream, first, splits)


def expected(logits: Tensor, rows: Settings, requests: list[SamplingParams], stream: Stream, first: Tensor) -> Tensor:
    """Row by row with the single-request functions."""
    tokens = torch.empty(logits.shape[:2], dtype=torch.int64)
    for slot, params in enumerate(requests):
        stream_of = stream if params.verification == "ratio" else Stream.TOKEN
        log_p = law(logits[slot].cpu(), params, mask_id=rows.mask_id)
        positions = int(first[slot]) + torch.arange(ROWS)
        noise = gumbel(2**63 - 1 - slot, positions, rows.vocab_size, stream_of) * (0 if params.greedy else 1)
        tokens[slot] = (log_p + noise).argmax(dim=-1)
    return tokens.to(DEVICE)


@pytest.mark.parametrize("vocab, mask_id, splits", CASES)
@pytest.mark.parametrize("stream", [Stream.TOKEN, Stream.DRAFT])
def test_kernel_and_twin_choose_what_law_and_noise_say(
    vocab: int, mask_id: int, splits: int | None, stream: Stream
) -> None:
    rows, logits, first = table(vocab, mask_id, REQUESTS)
    oracle = expected(logits, rows, REQUESTS, stream, first)
    assert torch.equal(batch.choose(logits, None, rows, True, stream, first), oracle)
    assert torch.equal(triton_choose(logits, None, rows, stream, first, splits), oracle)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_twins_agree_in_every_type(dtype: torch.dtype) -> None:
    """Logits of low precision tie often: the lowest id wins for both."""
    rows, logits, first = table(3000, 5, REQUESTS)
    logits = logits.to(dtype)
    twin = batch.choose(logits, None, rows, True, Stream.TOKEN, first)
    assert torch.equal(triton_choose(logits, None, rows, Stream.TOKEN, first), twin)
    assert torch.equal(triton_choose(logits, None, rows, Stream.TOKEN, first, splits=2), twin)


@pytest.mark.parametrize("splits", [1, 3])
def test_the_greedy_choice_is_the_first_of_equals(splits: int) -> None:
    rows, logits, first = table(3000, 0, REQUESTS[:1] * 2)
    logits = logits.round()
    choice = triton_choose(logits, None, rows, Stream.TOKEN, first, splits)
    best = adjust(logits[0], REQUESTS[0], mask_id=0).argmax(dim=-1)
    assert torch.equal(choice[0], best) and (logits[0, 0] == logits[0, 0, best[0]]).sum() > 1
    assert torch.equal(choice, batch.choose(logits, None, rows, False, Stream.TOKEN, first))


def test_bias_and_bans() -> None:
    requests = [
        SamplingParams(temperature=0, banned_tokens=tuple(range(1, 639))),
        SamplingParams(temperature=0.8, logit_bias={7: 25.0, 9: 24.5, 630: -3.0}),
        SamplingParams(temperature=1.2),
    ]
    rows, logits, first = table(640, 639, requests)
    oracle = expected(logits, rows, requests, Stream.TOKEN, first)
    assert oracle[0].tolist() == [0] * ROWS and 7 in oracle[1]
    assert torch.equal(batch.choose(logits, rows.bias, rows, True, Stream.TOKEN, first), oracle)
    assert torch.equal(triton_choose(logits, rows.bias, rows, Stream.TOKEN, first), oracle)


def test_a_row_without_a_possible_token_gives_an_id() -> None:
    rows, logits, first = table(640, 639, REQUESTS[:2])
    tokens = triton_choose(logits.fill_(-torch.inf), None, rows, Stream.TOKEN, first)
    assert ((tokens >= 0) & (tokens < 640)).all()


def test_a_slice_of_larger_logits_and_an_empty_batch() -> None:
    rows, logits, first = table(640, 640, REQUESTS)
    whole = torch.cat([logits, logits], dim=1)[:, 1 : 1 + ROWS]
    twin = batch.choose(whole, None, rows, True, Stream.TOKEN, first)
    assert torch.equal(triton_choose(whole, None, rows, Stream.TOKEN, first), twin)
    assert triton_choose(logits[:0], None, rows, Stream.TOKEN, first[:0]).shape == (0, ROWS)


def test_verification_and_drafting_use_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of verification and drafting with the kernel in place of the twin, every rule and filter at once."""
    pytest.importorskip("triton", reason="triton is not installed: only the PyTorch twin can be tested")
    monkeypatch.setattr(verification, "use_triton", lambda logits: True)
    requests = [
        *REQUESTS,
        SamplingParams(top_p=0.8, presence_penalty=0.5),
        SamplingParams(temperature=0, logit_bias={3: 2.0}),
        SamplingParams(verification="relaxed", tau=0.4),
    ]
    for live in (requests, requests[:2], requests[:1]):
        rows, logits, first = table(640, 600, live)
        log_q = logits[:, 1:].flip(1).log_softmax(dim=-1)
        drafts = logits[:, 1:].argmax(dim=-1)
        valid = torch.arange(len(live), device=DEVICE) % ROWS
        arguments = (logits, drafts, valid, log_q, rows, rows.features, first)
        for ours, twin in zip(verification.verify(*arguments), batch.verify(*arguments), strict=True):
            assert ours is twin is None or torch.equal(ours, twin)
        proposed, plain = (f(logits, rows, rows.features, first) for f in (verification.draft, batch.draft))
        assert torch.equal(proposed[0], plain[0])

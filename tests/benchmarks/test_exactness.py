"""The laws of the rules: the exact one is AR's to the last bit or so, the published one is not."""

from __future__ import annotations

import pytest
import torch

from benchmarks.exactness import (
    Tiny,
    ar_law,
    between,
    by_ratio,
    distance,
    isd_law,
    output_law,
    published,
)


def test_a_token_by_hand() -> None:
    p, q = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.1, 0.6, 0.3]).double()
    torch.testing.assert_close(output_law(p, q, by_ratio), p)
    # token 1 stands half the time; otherwise token 0, which alone has more in p than in q
    wanted = torch.tensor([0.5, 0.5, 0.0]).double()
    torch.testing.assert_close(output_law(p, q, published), wanted)
    assert float(distance(wanted, p)) == pytest.approx(0.2)


def test_texts_by_enumeration() -> None:
    model = Tiny(0.7)
    law = ar_law(model)
    assert sum(law.values()) == pytest.approx(1)
    assert between(law, isd_law(model, by_ratio)) < 1e-12
    other = isd_law(model, published)
    assert sum(other.values()) == pytest.approx(1)
    assert between(law, other) > 0.02

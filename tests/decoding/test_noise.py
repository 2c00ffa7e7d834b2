"""The noise: known answers, purity, distribution."""

import math

import torch

from idlm.decoding.noise import Stream, gumbel, split_mix, uniform


def test_split_mix_gives_the_published_sequence() -> None:
    """Seed 1234567 is the reference implementation's own example."""
    words = split_mix(torch.tensor(1234567), torch.arange(5))
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [word % 2**64 for word in words.tolist()] == expected


def test_noise_is_a_pure_function_of_seed_position_and_token() -> None:
    together = gumbel(7, torch.tensor([3, 9, 4]), 50)
    for row, position in enumerate((3, 9, 4)):
        assert torch.equal(together[row], gumbel(7, torch.tensor([position]), 50)[0])
    assert torch.equal(gumbel(7, torch.tensor([3]), 80)[:, :50], gumbel(7, torch.tensor([3]), 50))


def test_streams_seeds_and_positions_differ() -> None:
    base = gumbel(7, torch.tensor([3]), 50)
    others = [
        gumbel(8, torch.tensor([3]), 50),
        gumbel(7, torch.tensor([4]), 50),
        gumbel(7, torch.tensor([3]), 50, Stream.DRAFT),
    ]
    assert all((base != other).all() for other in others)


def test_uniform_is_uniform() -> None:
    """Kolmogorov-Smirnov on 20,000 numbers; bound sqrt(ln(2 / 1e-9) / 2) by the DKW inequality: false alarm 1e-9."""
    ordered = uniform(5, torch.arange(20_000)).sort().values
    steps = torch.arange(1, 20_001, dtype=torch.float64) / 20_000
    distance = torch.maximum((steps - ordered).max(), (ordered - steps + 1 / 20_000).max())
    assert math.sqrt(20_000) * float(distance) < math.sqrt(math.log(2 / 1e-9) / 2)
    assert float(ordered[0]) > 0 and float(ordered[-1]) < 1


def test_argmax_with_gumbel_noise_samples_the_law() -> None:
    """Frequencies over 40,000 positions; each within 6.1 standard deviations: under 1e-8 false alarm for 5 tokens."""
    p = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03], dtype=torch.float64)
    tokens = (p.log() + gumbel(11, torch.arange(40_000), 5)).argmax(dim=-1)
    shares = torch.bincount(tokens, minlength=5) / 40_000
    assert ((shares - p).abs() < 6.1 * (p * (1 - p) / 40_000).sqrt()).all()

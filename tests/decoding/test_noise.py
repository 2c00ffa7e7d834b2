"""The noise, batched and the oracle's: known answers, purity, distribution."""

import math

import torch
from torch import Tensor

from idlm.decoding import noise, reference
from idlm.decoding.noise import GOLDEN, Stream, split_mix


def gumbel(seed: int, positions: Tensor, vocab_size: int, stream: Stream = Stream.TOKEN) -> Tensor:
    """[R, V]: a batch of one."""
    steps = torch.arange(1, vocab_size + 1) * GOLDEN
    return noise.gumbel(key(seed, stream), positions[None], steps)[0]


def uniform(seed: int, positions: Tensor, stream: Stream = Stream.ACCEPT) -> Tensor:
    return noise.uniform(key(seed, stream), positions[None])[0]


def key(seed: int, stream: Stream) -> Tensor:
    return split_mix(torch.tensor([seed]), torch.tensor([int(stream)]))


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
    assert [reference.split_mix(1234567, index) for index in range(5)] == expected


def test_the_oracle_meets_the_same_noise() -> None:
    positions = [0, 1, 7, 2**31, 2**40]
    for seed in (0, 1, 2**62 + 12345, 2**63 - 1):
        for stream in Stream:
            uniforms = [reference.uniform(seed, stream, position) for position in positions]
            assert uniform(seed, torch.tensor(positions), stream).tolist() == uniforms
            rows = torch.stack(
                [reference.gumbel(seed, stream, position, 40) for position in positions]
            )
            assert torch.allclose(
                gumbel(seed, torch.tensor(positions), 40, stream), rows, rtol=1e-14, atol=0
            )


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
    """Kolmogorov-Smirnov on 20,000 numbers; bound sqrt(ln(2 / 1e-9) / 2) by the DKW inequality:
    false alarm 1e-9."""
    ordered = uniform(5, torch.arange(20_000)).sort().values
    steps = torch.arange(1, 20_001, dtype=torch.float64) / 20_000
    distance = torch.maximum((steps - ordered).max(), (ordered - steps + 1 / 20_000).max())
    assert math.sqrt(20_000) * float(distance) < math.sqrt(math.log(2 / 1e-9) / 2)
    assert float(ordered[0]) > 0 and float(ordered[-1]) < 1


def test_argmax_with_gumbel_noise_samples_the_law() -> None:
    """Frequencies over 40,000 positions; each within 6.1 standard deviations: under 1e-8 false
    alarm for 5 tokens."""
    p = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03], dtype=torch.float64)
    tokens = (p.log() + gumbel(11, torch.arange(40_000), 5)).argmax(dim=-1)
    shares = torch.bincount(tokens, minlength=5) / 40_000
    assert ((shares - p).abs() < 6.1 * (p * (1 - p) / 40_000).sqrt()).all()

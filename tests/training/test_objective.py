"""The objective: shares of what is dropped, and chance that belongs to the picture and not to the batch."""

import pytest
import torch

from imprompt.core.noise_schedule import variance_preserving
from imprompt.training.frozen_encoders import Encoded, Nulls, Text
from imprompt.training.objective import Chance, Objective, kept, losses


def encoded(seeds, weight=None):
    g = torch.Generator().manual_seed(0)
    shape = (len(seeds), 4, 8, 8)
    return Encoded(
        torch.randn(shape, generator=g), torch.rand(shape, generator=g), Text(torch.randn(len(seeds), 5, 6, generator=g)),
        torch.randn(len(seeds), 1, 1, 7, generator=g), torch.zeros(len(seeds), 6), weight, list(seeds),
    )  # fmt: skip


class Guess:
    """A denoiser that always says the same, and remembers what it was given."""

    def denoise(self, x, time, text, image, **extra):
        self.seen = (x, time, text, image)
        return torch.zeros_like(x)


class Unet:
    class config:
        addition_embed_type = None


SCHEDULE = variance_preserving(torch.linspace(0.99, 0.01, 1000), "epsilon")
NULLS = Nulls(Text(torch.zeros(1, 5, 6)), torch.zeros(1, 1, 1, 7))


def test_shares_of_what_is_dropped():
    drop = (torch.arange(10_000) + 0.5) / 10_000
    text, image = kept(drop, Objective(0.1, 0.2, 0.05))
    both = (~text & ~image).float().mean()
    assert [round(float(x), 4) for x in ((~text & image).float().mean(), (text & ~image).float().mean(), both)] == [0.1, 0.2, 0.05]


def test_what_is_dropped_becomes_the_null():
    method = Guess()
    losses(method, Unet, SCHEDULE, encoded(range(40)), NULLS, Objective(0.3, 0.3, 0.3))
    _, _, text, image = method.seen
    no_text, no_image = (text == 0).all((1, 2)), (image == 0).all((1, 2, 3))
    assert 8 < no_text.sum() < 36 and 8 < no_image.sum() < 36 and (no_text & no_image).any() and (no_text ^ no_image).any()


def test_chance_belongs_to_the_picture():
    together, alone = Chance.draw(encoded([5, 6, 7])), Chance.draw(encoded([6]))
    assert all(torch.equal(a[1], b[0]) for a, b in zip(together, alone, strict=True))
    assert not torch.equal(together.noise[0], together.noise[1])


def test_the_loss_is_the_mean_square_of_the_noise_for_a_denoiser_that_says_nothing():
    batch = encoded(range(6))
    found = losses(Guess(), Unet, SCHEDULE, batch, NULLS, Objective())
    assert found.shape == (6,) and torch.allclose(found, Chance.draw(batch).noise.square().mean((1, 2, 3)))


def test_the_mask_decides_where_the_loss_counts():
    weight = torch.zeros(6, 1, 8, 8)
    weight[..., :4] = 1
    batch = encoded(range(6), weight)
    found = losses(Guess(), Unet, SCHEDULE, batch, NULLS, Objective())
    assert torch.allclose(found, Chance.draw(batch).noise[..., :4].square().mean((1, 2, 3)))


@pytest.mark.parametrize(("how", "low", "high"), [("uniform", 0.18, 0.32), ("logit-normal", 0.05, 0.15)])
def test_timesteps(how, low, high):
    method = Guess()
    losses(method, Unet, SCHEDULE, encoded(range(400)), NULLS, Objective(timesteps=how))
    late = (method.seen[1] >= 750).float().mean()
    assert low < late < high


def test_the_noise_offset_shifts_whole_channels():
    batch = encoded(range(3))
    plain, shifted = (losses(Guess(), Unet, SCHEDULE, batch, NULLS, Objective(noise_offset=o)) for o in (0.0, 0.5))
    chance = Chance.draw(batch)
    assert torch.allclose(shifted, (chance.noise + 0.5 * chance.offset).square().mean((1, 2, 3))) and not torch.equal(plain, shifted)

"""The control of equal size: as long as the changes it stands beside, and of no aim."""

from __future__ import annotations

import torch

from robusteval.search.noise import add_equal_noise, add_equal_noise_in_box


def test_noise_has_the_size_of_the_attack() -> None:
    """Also where the box takes some of it away, and whatever travels with an image."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(4, 3, 8, 8, generator=generator).round()  # at the edges of the box
    x_adv = (x + torch.tensor([0.0, 0.01, 0.05, 0.2]).view(4, 1, 1, 1)).clamp(0, 1)
    seeds = torch.arange(4)

    z = add_equal_noise_in_box(x_adv, x, seeds)

    size, wanted = ((image - x).flatten(1).norm(dim=1) for image in (z, x_adv))
    assert torch.allclose(size, wanted, rtol=1e-4, atol=1e-5)
    assert 0 <= float(z.min()) <= float(z.max()) <= 1
    alone = torch.cat(
        [add_equal_noise_in_box(x_adv[i : i + 1], x[i : i + 1], seeds[i : i + 1]) for i in range(4)]
    )
    assert torch.equal(z, alone)


def test_noise_that_is_not_clipped_has_the_length_of_the_changes() -> None:
    """Each image's draw is its own; where nothing changed there is no noise."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(5, 3, 8, 8, generator=generator)
    x_adv, seeds = x + 0.1 * torch.rand(5, 3, 8, 8, generator=generator), torch.arange(5)
    x_adv[4] = x[4]

    z = add_equal_noise(x_adv, x, seeds)

    lengths = [(image - x).flatten(1).norm(dim=1) for image in (z, x_adv)]
    torch.testing.assert_close(*lengths)
    assert torch.equal(z[4], x[4])
    assert torch.equal(add_equal_noise(x_adv[2:3], x[2:3], seeds[2:3]), z[2:3])

"""Agreement of partitions with known factors: closed forms, and colours against colorsys."""

import colorsys
from itertools import pairwise

import pytest
import torch
from scipy import stats
from test_methods import TINY

from idaa_lib.configs import SSLConfig
from idaa_lib.identity.factors import (
    compare_partitions,
    compare_sides,
    known_factors,
    load_partitions,
)
from idaa_lib.runs import RunError
from idaa_lib.train import train_ssl
from idaa_lib.views import keyed_generator


def sides_of(n, share, seed):
    return (torch.rand(n, generator=keyed_generator(seed)) < share).long()


def test_a_factor_that_is_the_partition_agrees_whatever_the_sides_are_called():
    sides = sides_of(200, 0.3, 1)
    for factor in (sides, 1 - sides, 2 * sides + torch.arange(200) % 2):
        assert compare_sides(sides, factor).value == 100
    thirds = torch.arange(90) % 3
    assert compare_sides(thirds, thirds.roll(1)).value == pytest.approx(100)
    assert compare_sides(sides, torch.zeros(200, dtype=torch.long)).value == pytest.approx(50)


@pytest.mark.parametrize("share", [0.5, 0.1])
def test_chance_is_that_of_sides_given_out_at_random(share):
    """In closed form for two values: the hypergeometric count h of the first value in side 1 gives
    ½ (1 + |h/n₁ − (v − h)/n₀|)."""
    n, values = 300, torch.arange(300) % 3 // 2  # 200 and 100
    sides = sides_of(n, share, 2)
    n1 = int(sides.sum())
    h = stats.hypergeom(n, 200, n1)
    support = range(max(0, 200 - (n - n1)), min(200, n1) + 1)
    figures = [50 * (1 + abs(k / n1 - (200 - k) / (n - n1))) for k in support]
    expected = sum(h.pmf(k) * v for k, v in zip(support, figures, strict=True))
    result = compare_sides(sides, values)
    assert result.chance == pytest.approx(expected, abs=0.3)
    tail = sum(h.pmf(k) for k, v in zip(support, figures, strict=True) if v > result.high)
    assert 0.01 < tail < 0.04 and result.n == n
    results = [compare_sides(sides_of(n, share, seed), values, draws=400) for seed in range(10, 50)]
    assert sum(agreement.low <= agreement.value <= agreement.high for agreement in results) >= 34


def test_images_of_which_a_factor_is_unknown_are_left_out():
    sides, factor = torch.arange(40) % 2, torch.arange(40) % 2
    factor[:10] = -1
    sides[:10] = 0
    result = compare_sides(sides, factor)
    assert (result.value, result.n) == (100, 30)


def test_factors_are_those_of_the_pixels():
    """Hue by sector from red on, gray, and medians."""
    hues = [0.0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 0.99]
    colours = [colorsys.hsv_to_rgb(hue, 0.8, 0.2 + hue / 2) for hue in hues] + [(0.9, 0.9, 0.88)]
    border = (255 * torch.tensor(colours)).to(torch.uint8)[:, :, None, None]
    images = border.expand(8, 3, 16, 16).clone()
    images[:, :, 2:14, 2:14] = 77  # what is inside has no part in the border's colour
    factors = known_factors(images, torch.full((8,), -1))
    assert factors.keys() == {"brightness", "saturation", "colour of the border"}
    assert factors["colour of the border"].tolist() == [0, 1, 2, 3, 4, 5, 0, 6]
    mean = images.float().mean((1, 2, 3))
    order = factors["brightness"][mean.argsort()].tolist()
    assert all(a <= b for a, b in pairwise(order)) and sum(order) == 4
    assert factors["saturation"][7] == 0
    labels = torch.arange(8)
    assert torch.equal(known_factors(images, labels)["class"], labels)


def test_rows_of_a_run_s_partitions(outputs):
    knobs = dict(method="ipirm", maximize_iter=1, projection_dim=8)
    partitions = load_partitions(train_ssl(SSLConfig(**TINY, **knobs)))
    assert partitions.shape == (2, 16) and set(partitions.unique().tolist()) <= {0, 1}
    factors = {"the second": partitions[1].long(), "order": torch.arange(16) // 8}
    rows = compare_partitions(partitions, factors)
    assert [(row["partition"], row["factor"]) for row in rows] == [
        (1, "the second"), (1, "order"), (2, "the second"), (2, "order"),
    ]  # fmt: skip
    assert rows[2]["value"] == 100
    with pytest.raises(RunError, match="keeps no partitions: take a run with method='ipirm'"):
        load_partitions(train_ssl(SSLConfig(**TINY, method="simclr")))

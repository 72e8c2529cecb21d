"""Views against torchvision: every operation, the whole chain, and what is drawn."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import skimage.data
import torch
import torchvision.transforms as v1
import torchvision.transforms.v2 as v2
from scipy import stats
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from idaa_lib.views import (
    RECIPES,
    Params,
    Recipe,
    compile_view,
    denormalise,
    keyed_generator,
    normalise,
    operations,
    recipe,
)
from idaa_lib.views.randaugment import RandAugment

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
RANDOM = [name for name in RECIPES if name != "none"]
BLURRED = ("simsiam", "cassle", "ipirm", "rsa")
SMALLEST = {"simclr": 0.08, "byol": 0.08, "ipirm": 0.08, "mild": 0.8}  # share of a crop; else .2
GEOMETRIES = [((32, 32), 32), ((96, 96), 64), ((32, 32), 48), ((80, 112), 40), ((37, 23), 24)]
N = 20_000
# Oracle and code differ by float32 rounding alone: far inside the 2/255 that is promised.
CLOSE = 2e-5
# Seeds are fixed, so a test passes always or never; a correct sampler fails one time in 1,000.
P_VALUE = 1e-3


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads slow the oracles' small operations down, on a busy machine by far."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def photographs(n: int, height: int, width: int) -> Tensor:
    """(n, 3, height, width) uint8: patches of three photographs, every other pixel."""
    rng = np.random.default_rng(0)
    sources = [skimage.data.astronaut(), skimage.data.chelsea(), skimage.data.coffee()]
    patches = []
    for k in range(n):
        photo = sources[k % 3][::2, ::2]
        top = rng.integers(photo.shape[0] - height + 1)
        left = rng.integers(photo.shape[1] - width + 1)
        patches.append(photo[top : top + height, left : left + width].transpose(2, 0, 1))
    return torch.from_numpy(np.stack(patches))


def make(name: str, size: int) -> Recipe:
    if name == "strong":
        return RandAugment(size, MEAN, STD, flip=0.5, shift=0.1)
    return recipe(name, size, MEAN, STD)


def draw(name: str, n: int, image_size: tuple[int, int], size: int, *key: int) -> Params:
    views = make(name, size)
    return views.parameters(views.numbers(n, keyed_generator(*key)), image_size)


def largest_difference(ours: Tensor, oracle: Tensor) -> float:
    assert ours.shape == oracle.shape
    return (ours - oracle).abs().max().item()


# --- each operation


@pytest.mark.parametrize(("image_size", "size"), GEOMETRIES)
def test_crop_and_flip_agree_with_torchvision(image_size: tuple[int, int], size: int) -> None:
    x = photographs(64, *image_size) / 255
    params = draw("simclr", 64, image_size, size, 0)
    ours = operations.resized_crop(x, params["crop"], params["flip"], size)
    oracle = []
    for image, box, flip in zip(x, params["crop"].int().tolist(), params["flip"], strict=True):
        view = F.resized_crop(image, *box, [size, size], antialias=True)
        oracle.append(F.horizontal_flip(view) if flip else view)
    assert largest_difference(ours, torch.stack(oracle)) < CLOSE


BLENDS = {
    operations.BRIGHTNESS: F.adjust_brightness,
    operations.CONTRAST: F.adjust_contrast,
    operations.SATURATION: F.adjust_saturation,
}


@pytest.mark.parametrize("part", BLENDS)
def test_blends_agree_with_torchvision(part: int) -> None:
    x = photographs(60, 32, 32) / 255
    factors = torch.linspace(0, 1.8, 60)
    ours = operations.blend(x, factors, torch.full((60,), part))
    oracle = [BLENDS[part](i, f) for i, f in zip(x, factors.tolist(), strict=True)]
    assert largest_difference(ours, torch.stack(oracle)) < CLOSE


def test_hue_agrees_with_torchvision_and_wraps() -> None:
    x = photographs(101, 32, 32) / 255
    turns = torch.linspace(-0.5, 0.5, 101)
    oracle = torch.stack([F.adjust_hue(i, t) for i, t in zip(x, turns.tolist(), strict=True)])
    assert largest_difference(operations.shift_hue(x, turns), oracle) < CLOSE
    assert largest_difference(operations.shift_hue(x, turns + 1), oracle) < CLOSE


def test_hue_of_every_tie_and_extreme_agrees_with_torchvision() -> None:
    levels = torch.tensor([0.0, 1e-6, 0.25, 0.5, 1.0])
    colors = torch.cartesian_prod(levels, levels, levels).T.reshape(1, 3, 25, 5)
    for turn in (-0.5, -0.2, 0.0, 0.1, 1 / 3, 0.5):
        oracle = F.adjust_hue(colors, turn)
        assert (
            largest_difference(operations.shift_hue(colors, torch.tensor([turn])), oracle) < CLOSE
        )


def test_luma_agrees_with_torchvision() -> None:
    x = photographs(6, 32, 32) / 255
    assert largest_difference(operations.luma(x), F.rgb_to_grayscale(x)) < CLOSE


@pytest.mark.parametrize(("size", "kernel"), [(32, 3), (64, 7), (112, 23)])
def test_blur_agrees_with_torchvision(size: int, kernel: int) -> None:
    x = photographs(20, size, size) / 255
    sigma = torch.linspace(0.1, 2, 20)[:, None]
    sigma[7] = 0
    ours = operations.gaussian_blur(x, sigma, kernel)
    oracle = [
        F.gaussian_blur(i, [kernel, kernel], [s, s]) if s else i
        for i, s in zip(x, sigma[:, 0].tolist(), strict=True)
    ]
    assert largest_difference(ours, torch.stack(oracle)) < CLOSE


def test_normalise_agrees_with_torchvision_and_is_inverted() -> None:
    images = photographs(6, 32, 32)
    x = F.to_dtype(images, torch.float32, scale=True)
    oracle = F.normalize(x, list(MEAN), list(STD))
    assert largest_difference(normalise(images, MEAN, STD), oracle) < CLOSE
    assert largest_difference(normalise(x, MEAN, STD), oracle) < CLOSE
    assert largest_difference(denormalise(oracle, MEAN, STD), x) < CLOSE


# --- the whole chain


def chain(name: str, image: Tensor, row: dict[str, list[float]], size: int) -> Tensor:
    """One sample through torchvision, in the order in which the paper's code has it."""

    def crop(x: Tensor) -> Tensor:
        top, left, height, width = map(int, row["crop"])
        return F.resized_crop(x, top, left, height, width, [size, size], antialias=True)

    def flip(x: Tensor) -> Tensor:
        return F.horizontal_flip(x) if row["flip"][0] else x

    def jitter(x: Tensor) -> Tensor:
        if row["color"] == [1, 1, 1, 0]:
            return x
        for part in row["order"]:
            x = {**BLENDS, operations.HUE: F.adjust_hue}[int(part)](x, row["color"][int(part)])
        return x

    def gray(x: Tensor) -> Tensor:
        return F.rgb_to_grayscale(x, 3) if row["gray"][0] else x

    def blur(x: Tensor) -> Tensor:
        kernel = kernel_side(name, size)
        return F.gaussian_blur(x, [kernel, kernel], row["blur"] * 2) if row["blur"][0] else x

    steps: dict[str, list[Callable[[Tensor], Tensor]]] = {
        "simclr": [crop, flip, jitter, gray],
        "byol": [crop, flip, jitter, gray],
        "normal": [crop, jitter, gray, flip],
        "mild": [crop, flip, jitter],
    }
    steps |= {key: [crop, flip, jitter, gray, blur] for key in BLURRED}
    x = F.to_dtype(image, torch.float32, scale=True)
    for step in steps[name]:
        x = step(x)
    return x


@pytest.mark.parametrize(("image_size", "size"), GEOMETRIES)
@pytest.mark.parametrize("name", RANDOM)
def test_the_whole_recipe_agrees_with_a_chain_of_torchvision(
    name: str, image_size: tuple[int, int], size: int
) -> None:
    images = photographs(96, *image_size)
    params = draw(name, 96, image_size, size, 1)
    params["order"][:24] = torch.tensor(list(itertools.permutations(range(4))))
    ours = denormalise(make(name, size).apply(images, params).images, MEAN, STD)
    rows = [{key: value[i].tolist() for key, value in params.items()} for i in range(96)]
    oracle = [chain(name, image, row, size) for image, row in zip(images, rows, strict=True)]
    assert largest_difference(ours, torch.stack(oracle)) < CLOSE


def test_none_is_the_test_transform_and_draws_nothing() -> None:
    images, generator = photographs(6, 32, 32), keyed_generator(0)
    before = generator.get_state()
    result = make("none", 32)(images, generator)
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    assert torch.equal(result.images, (images.float() / 255 - mean) / std)
    assert torch.equal(generator.get_state(), before)
    state = torch.get_rng_state()
    make("none", 32)(images, None)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("image_size", "size"), GEOMETRIES[1:])
def test_none_resizes_as_torchvision(image_size: tuple[int, int], size: int) -> None:
    images = photographs(6, *image_size)
    ours = denormalise(make("none", size)(images, None).images, MEAN, STD)
    assert largest_difference(ours, F.resize(images / 255, [size, size], antialias=True)) < CLOSE


# --- what is drawn


def same_distribution(ours: Tensor, oracle: Tensor) -> bool:
    return stats.ks_2samp(ours.double().numpy(), oracle.double().numpy()).pvalue > P_VALUE


# 160 x 40 is so flat that ten attempts often fail: torchvision's central crop is drawn too.
@pytest.mark.parametrize("image_size", [(32, 32), (96, 64), (40, 160)])
@pytest.mark.parametrize("name", ["simclr", "simsiam", "byol", "cassle", "ipirm", "rsa"])
def test_crops_are_distributed_as_torchvision_draws_them(
    name: str, image_size: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    image, scale = torch.empty(3, *image_size), [SMALLEST.get(name, 0.2), 1.0]
    get = v1.RandomResizedCrop.get_params
    oracle = torch.tensor([get(image, scale, [3 / 4, 4 / 3]) for _ in range(N)]).double()
    ours = draw(name, N, image_size, 32, 2)["crop"].double()

    def quantities(box: Tensor) -> list[Tensor]:
        top, left, height, width = box.unbind(1)
        return [top, left, height, width, height * width, width / height, top / height]

    for of_ours, of_oracle in zip(quantities(ours), quantities(oracle), strict=True):
        assert same_distribution(of_ours, of_oracle)
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, :2] + ours[:, 2:] <= torch.tensor(image_size)).all()


JITTERS = {
    "simclr": (0.8, 0.8, 0.8, 0.2, 0.8),
    "simsiam": (0.4, 0.4, 0.4, 0.1, 0.8),
    "byol": (0.4, 0.4, 0.4, 0.1, 0.8),
    "normal": (0.4, 0.4, 0.4, 0.4, 1.0),
    "mild": (0.2, 0.2, 0.2, 0.05, 1.0),
    **dict.fromkeys(("cassle", "ipirm", "rsa"), (0.4, 0.4, 0.4, 0.1, 0.8)),
    "strong": (1.6, 1.6, 1.6, 0.5, 1.0),  # no paper's: factors must not become negative
}


@pytest.mark.parametrize("name", JITTERS)
def test_jitter_is_distributed_as_torchvision_draws_it(name: str) -> None:
    *strengths, probability = JITTERS[name]
    views = make("normal" if name == "strong" else name, 32)
    if name == "strong":
        views = dataclasses.replace(views, jitter=tuple(strengths))
    params = views.parameters(views.numbers(N, keyed_generator(3)), (32, 32))
    no_jitter = torch.tensor([1.0, 1.0, 1.0, 0.0])
    is_jittered = (params["color"] != no_jitter).any(1)
    assert stats.binomtest(int(is_jittered.sum()), N, probability).pvalue > P_VALUE
    torch.manual_seed(1)
    jitter = v1.ColorJitter(*strengths)
    ranges = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    oracle = torch.tensor([jitter.get_params(*ranges)[1:] for _ in range(N)])
    ours = params["color"][is_jittered]
    for part in range(4):
        assert same_distribution(ours[:, part], oracle[:, part])
    correlation = torch.corrcoef(ours.T) - torch.eye(4)
    assert correlation.abs().max() < 4 / math.sqrt(len(ours))  # four standard errors


@pytest.mark.parametrize("name", RANDOM)
def test_all_orders_are_equally_likely(name: str) -> None:
    order = draw(name, N, (32, 32), 32, 4)["order"]
    assert (order.sort(1).values == torch.arange(4)).all()
    _, counts = order.unique(dim=0, return_counts=True)
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > P_VALUE


@pytest.mark.parametrize("name", RANDOM)
def test_flip_and_gray_happen_as_often_as_they_should(name: str) -> None:
    params = draw(name, N, (32, 32), 32, 5)
    for key, probability in (("flip", 0.5), ("gray", 0.2))[: 1 if name == "mild" else 2]:
        assert set(params[key].unique().tolist()) == {0, 1}
        assert stats.binomtest(int(params[key].sum()), N, probability).pvalue > P_VALUE


def test_blur_is_distributed_as_torchvision_draws_it() -> None:
    torch.manual_seed(2)
    sigma = draw("simsiam", N, (96, 96), 64, 6)["blur"]
    sigmas = sigma[sigma > 0]
    assert stats.binomtest(len(sigmas), N, 0.5).pvalue > P_VALUE
    oracle = [v1.GaussianBlur.get_params(0.1, 2.0) for _ in range(N)]
    assert same_distribution(sigmas, torch.tensor(oracle))


@pytest.mark.parametrize(("name", "size", "kernel"), [("simsiam", 224, 23), ("simsiam", 64, 7)])
def test_simsiam_blurs_with_its_kernel(name: str, size: int, kernel: int) -> None:
    assert make(name, size).blur_kernel == kernel


@pytest.mark.parametrize("name", RANDOM)
def test_a_white_image_stays_white_without_its_colours_at_any_size(name: str) -> None:
    """Crop, gray and blur are means of pixels, whose weights sum to 1."""
    for size in (1, 2, 4, 6, 7, 32):
        views = dataclasses.replace(make(name, size), jitter=(0.0,) * 4)
        white = torch.full((8, 3, size, size), 255, dtype=torch.uint8)
        pixels = denormalise(views(white, keyed_generator(size)).images, MEAN, STD)
        assert pixels.min().item() == pytest.approx(1, abs=1e-3)


def test_simsiam_does_not_blur_at_32_pixels() -> None:
    assert draw("simsiam", 500, (32, 32), 32, 7)["blur"].count_nonzero() == 0


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_returns_every_parameter(name: str) -> None:
    params = make(name, 32)(photographs(3, 40, 48), keyed_generator(8)).params
    shapes = {key: tuple(value.shape) for key, value in params.items()}
    expected = {"source": 2, "crop": 4, "flip": 1, "color": 4, "order": 4, "color_diff": 3}
    expected |= {"gray": 1, "blur": 1}
    assert shapes == {key: (3, width) for key, width in expected.items()}
    assert params["source"].tolist() == [[40, 48]] * 3
    if name == "none":
        assert params["crop"].tolist() == [[0, 0, 40, 48]] * 3
        assert params["color"].tolist() == [[1, 1, 1, 0]] * 3
        assert not params["color_diff"].any()


@pytest.mark.parametrize("name", RANDOM)
def test_color_diff_is_what_the_jitter_does_to_the_mean_of_each_channel(name: str) -> None:
    images = photographs(96, 40, 48)
    view = make(name, 32)(images, keyed_generator(20))
    rows = [{key: value[i].tolist() for key, value in view.params.items()} for i in range(96)]
    is_skipped = torch.tensor([row["color"] == [1, 1, 1, 0] for row in rows])
    assert is_skipped.any() == (make(name, 32).jitter_probability < 1)
    oracle = []
    for image, row in zip(images, rows, strict=True):
        plain_row = row | {"gray": [0], "blur": [0]}
        before = chain(name, image, plain_row | {"color": [1, 1, 1, 0]}, 32)
        oracle.append((before - chain(name, image, plain_row, 32)).mean((1, 2)))
    assert largest_difference(view.params["color_diff"], torch.stack(oracle)) < CLOSE
    assert not view.params["color_diff"][is_skipped].any()
    assert view.params["color_diff"][~is_skipped].abs().max() > 0.05


@pytest.mark.parametrize("name", [*RECIPES, "strong"])
def test_a_pair_is_the_view_before_photometry_and_the_same_view_after(name: str) -> None:
    images, views = photographs(24, 40, 48), make(name, 32)
    numbers = views.numbers(24, keyed_generator(21))
    before, after = views.pair(images, numbers)
    view = views.view(images, numbers)
    assert torch.equal(after.images, view.images)
    assert all(torch.equal(after.params[key], view.params[key]) for key in view.params)
    assert before.params.keys() == after.params.keys()
    assert all(torch.equal(before.params[k], after.params[k]) for k in ("source", "crop", "flip"))
    geometry = views.geometry(images, after.params)
    assert torch.equal(before.images, normalise(geometry, MEAN, STD))
    # By its own parameters it is made again: they are neutral where they should be.
    again = views.apply(images, before.params)
    tolerance = 0.5 / 255 + CLOSE if name == "strong" else CLOSE  # strong views: whole levels
    ours, again_ours = (denormalise(x, MEAN, STD) for x in (before.images, again.images))
    assert largest_difference(ours, again_ours) < tolerance


@pytest.mark.parametrize("name", [*RECIPES, "strong"])
def test_sizes_may_differ_by_sample(name: str) -> None:
    sizes = torch.tensor([[40, 48], [32, 32], [20, 160], [96, 64]])
    views = make(name, 32)
    numbers = views.numbers(4, keyed_generator(22))
    params = views.parameters(numbers, sizes)
    for i, size in enumerate(sizes.tolist()):
        sample = views.parameters(numbers[i : i + 1], size)
        assert all(torch.equal(params[key][i], sample[key][0]) for key in sample)


def test_a_view_with_other_images_keeps_its_parameters() -> None:
    view = make("simclr", 32)(photographs(3, 40, 48), keyed_generator(8))
    other_view = view._replace(images=view.images + 1)
    assert other_view.params is view.params and not torch.equal(other_view.images, view.images)


# --- moments of what comes out


def kernel_side(name: str, size: int) -> int:
    """Of the blur: a tenth of the image; docs/spec/siblings.md §2.1 and §3.1 for two siblings."""
    tenth = 2 * math.floor(size / 20) + 1
    return {"ipirm": 3, "rsa": max(13, tenth)}.get(name, tenth)


def torchvision_recipe(name: str, size: int) -> v2.Compose:
    def jitter(*strengths: float) -> v2.Transform:
        return v2.ColorJitter(*strengths)

    flip, gray = v2.RandomHorizontalFlip(0.5), v2.RandomGrayscale(0.2)
    blur = v2.RandomApply([v2.GaussianBlur(kernel_side(name, size), (0.1, 2.0))], 0.5)
    crop = v2.RandomResizedCrop(size, (SMALLEST.get(name, 0.2), 1), antialias=True)
    strengths = (0.4, 0.4, 0.4, 0.1)
    blur_steps = [crop, flip, v2.RandomApply([jitter(*strengths)], 0.8), gray, blur]
    steps = {
        "simclr": [crop, flip, v2.RandomApply([jitter(0.8, 0.8, 0.8, 0.2)], 0.8), gray],
        "byol": [crop, flip, v2.RandomApply([jitter(0.4, 0.4, 0.4, 0.1)], 0.8), gray],
        "normal": [crop, jitter(0.4, 0.4, 0.4, 0.4), gray, flip],
        "mild": [crop, flip, jitter(0.2, 0.2, 0.2, 0.05)],
        **dict.fromkeys(BLURRED, blur_steps),
    }[name]
    return v2.Compose([*steps, v2.Normalize(list(MEAN), list(STD))])


def moments(x: Tensor) -> Tensor:
    """(B, 15) by image: means, second moments of channel pairs, products of neighbours in a row."""
    pixels = x.double().flatten(2)
    pairs = torch.einsum("bcp,bdp->bcd", pixels, pixels) / pixels.shape[2]
    neighbours = (x[..., 1:] * x[..., :-1]).double().mean((2, 3))
    return torch.cat([pixels.mean(2), pairs.flatten(1), neighbours], 1)


def summary(moments: Tensor) -> Tensor:
    """(…, 12): mean, variance, correlation of channels and of neighbours, three numbers each."""
    mean, pairs, neighbours = moments.split([3, 9, 3], -1)
    covariance = pairs.unflatten(-1, (3, 3)) - mean[..., None] * mean[..., None, :]
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    correlation = covariance / (variance[..., None] * variance[..., None, :]).sqrt()
    channels = correlation[..., [0, 0, 1], [1, 2, 2]]
    return torch.cat([mean, variance, channels, (neighbours - mean**2) / variance], -1)


@pytest.mark.parametrize("name", RANDOM)
def test_moments_of_the_views_agree_with_torchvision(name: str) -> None:
    """Both sides see the same images with other random numbers; nothing but noise may differ.

    The jackknife over images gives each difference its standard error, and four of them bound it,
    which a correct sampler exceeds once in 16,000 numbers. Variances here are around 2 and have
    the largest error, 0.05; where the errors were larger, the test would show little.
    """
    n, size = 2400, 40
    images = photographs(n, size, size)
    torch.manual_seed(3)
    transform = torchvision_recipe(name, size)
    oracle = moments(torch.stack([transform(image) for image in images / 255]))
    ours = moments(make(name, size)(images, keyed_generator(9)).images)

    difference = summary(ours.mean(0)) - summary(oracle.mean(0))
    without_one = [summary((m.sum(0) - m) / (n - 1)) for m in (ours, oracle)]
    standard_error = (without_one[0] - without_one[1]).std(0) * (n - 1) / math.sqrt(n)
    assert (difference.abs() < 4 * standard_error).all()
    assert (standard_error < 0.06).all()


# --- determinism, independence, hygiene


def test_a_key_gives_the_same_bits_and_another_step_others() -> None:
    images = photographs(32, 32, 32)
    first, again, other = (
        make("simclr", 32)(images, keyed_generator(0, 1, step, 0)) for step in (7, 7, 8)
    )
    assert torch.equal(first.images, again.images)
    assert all(torch.equal(first.params[key], again.params[key]) for key in first.params)
    assert not torch.equal(first.images, other.images)


def test_neighbouring_keys_give_unrelated_streams() -> None:
    keys = [(seed, epoch, step) for seed in range(2) for epoch in range(20) for step in range(100)]
    first = torch.stack([torch.rand(2, generator=keyed_generator(*key)) for key in keys])
    assert len(first[:, 0].unique()) > 0.999 * len(keys)
    assert stats.kstest(first[:, 0].numpy(), "uniform").pvalue > P_VALUE
    lag_correlation = np.corrcoef(first[1:, 0], first[:-1, 0])[0, 1]
    assert abs(lag_correlation) < 4 / math.sqrt(len(keys))
    assert keyed_generator(1, 23).initial_seed() != keyed_generator(12, 3).initial_seed()
    assert keyed_generator(1).initial_seed() != keyed_generator(1, 0).initial_seed()


@pytest.mark.parametrize("name", RECIPES)
def test_slices_of_a_global_draw_give_slices_of_the_global_views(name: str) -> None:
    images, params = photographs(48, 40, 40), draw(name, 48, (40, 40), 40, 10)
    expected = make(name, 40).apply(images, params).images
    for part in (slice(0, 16), slice(16, 48), slice(47, 48)):
        rows = {key: value[part] for key, value in params.items()}
        assert (
            largest_difference(make(name, 40).apply(images[part], rows).images, expected[part])
            < CLOSE
        )


def test_permuted_samples_give_permuted_views() -> None:
    images, params = photographs(48, 40, 40), draw("simsiam", 48, (40, 40), 40, 11)
    p = torch.randperm(48, generator=keyed_generator(12))
    apply = make("simsiam", 40).apply
    permuted_view = apply(images[p], {key: value[p] for key, value in params.items()})
    view = apply(images, params)
    assert largest_difference(permuted_view.images, view.images[p]) < CLOSE
    assert (
        largest_difference(permuted_view.params["color_diff"], view.params["color_diff"][p]) < CLOSE
    )


def test_inputs_are_left_as_they_were() -> None:
    images, params = photographs(8, 40, 40), draw("simsiam", 8, (40, 40), 40, 13)
    images_before, params_before = (
        images.clone(),
        {key: value.clone() for key, value in params.items()},
    )
    x = images / 255
    make("simsiam", 40).apply(images, params)
    make("simsiam", 40).photometry(x, params)
    denormalise(normalise(x, MEAN, STD), MEAN, STD)
    assert torch.equal(images, images_before)
    assert torch.equal(x, images_before / 255)
    assert all(torch.equal(params[key], params_before[key]) for key in params)


@pytest.mark.parametrize("fill", [0, 1, 255])
@pytest.mark.parametrize("name", RECIPES)
def test_flat_images_give_finite_pixels_in_range(name: str, fill: int) -> None:
    images = torch.full((16, 3, 40, 40), fill, dtype=torch.uint8)
    x = denormalise(make(name, 40)(images, keyed_generator(14)).images, MEAN, STD)
    assert x.isfinite().all()
    assert x.min() > -CLOSE
    assert x.max() < 1 + CLOSE


@pytest.mark.parametrize("name", [*RECIPES, "strong"])
def test_what_is_made_of_numbers_reads_no_value_back(name: str) -> None:
    """Tensors of the meta device have no values: a shape or a branch that needs one raises, as does
    an operation with a tensor elsewhere."""
    views = make(name, 64)
    numbers = views.numbers(8, keyed_generator(15)).to("meta")
    images = torch.empty(8, 3, 96, 80, dtype=torch.uint8, device="meta")
    view = views.view(images, numbers)
    assert view.images.shape == (8, 3, 64, 64)
    assert {value.device.type for value in view.params.values()} == {"meta"}
    assert numbers.shape[1] == sum(views.columns.values())


# A strong view's pixels are whole levels: a few are rounded to a neighbour.
@pytest.mark.parametrize(("name", "others"), [("simsiam", 0), ("strong", 1e-3)])
def test_compiled_views_are_the_views(name: str, others: float) -> None:
    views = make(name, 40)
    images, numbers = photographs(64, 48, 44), views.numbers(64, keyed_generator(18))
    expected, view = views.view(images, numbers), compile_view(views.view)(images, numbers)
    for key, value in expected.params.items():
        of_pixels = key == "color_diff"
        torch.testing.assert_close(
            view.params[key], value, rtol=1e-6, atol=CLOSE if of_pixels else 0
        )
    assert ((view.images - expected.images).abs() > 1e-4).double().mean() <= others


def test_an_unknown_recipe_is_named_with_the_known_ones() -> None:
    with pytest.raises(
        ValueError,
        match=r"'simclrr'.*simclr, simsiam, normal, byol, cassle, ipirm, rsa, mild, none",
    ):
        recipe("simclrr", 32, MEAN, STD)


@pytest.mark.parametrize("images", [torch.rand(2, 3, 8, 8), torch.zeros(3, 8, 8).byte()])
def test_images_other_than_batches_of_uint8_are_refused(images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"uint8 of shape \(B, 3, H, W\)"):
        make("simclr", 8).geometry(images, draw("simclr", 2, (8, 8), 8, 16))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", RECIPES)
def test_gpu_and_cpu_agree(name: str) -> None:
    images = photographs(64, 96, 80)
    cpu = make(name, 64)(images, keyed_generator(17))
    gpu = make(name, 64)(images.cuda(), keyed_generator(17))
    assert all(value.is_cuda for value in gpu.params.values())
    assert largest_difference(gpu.images.cpu(), cpu.images) < 1e-3

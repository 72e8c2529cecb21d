"""FixMatch: strong views against PIL, the wide ResNet against its paper's code, the step against a
naive one, what the norms see, the averaged weights, what is labelled, and whole runs."""

import copy
import functools
import math

import numpy as np
import pytest
import reference
import skimage.data
import torch
import torch.distributed as dist
import torchvision
from conftest import fit_of, views_of, whole_and_resumed
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from scipy import stats
from test_methods import ADVERSARIES, attacked_by, knn_top1
from torch import nn
from torch.nn import functional as F

from idaa_lib import runs, sweeps
from idaa_lib.adversaries import CLAE, IDAA, RandomSign
from idaa_lib.configs import ConfigError, EvalConfig, SemiConfig, VAEConfig
from idaa_lib.data.cached import load
from idaa_lib.evaluate.encoders import features, load_encoder, load_vae, random_encoder
from idaa_lib.evaluate.stage import evaluate
from idaa_lib.methods import About, Moment, build_method
from idaa_lib.methods.fixmatch import labelled_subset
from idaa_lib.methods.plain import one_way
from idaa_lib.nets import build_backbone
from idaa_lib.nets.heads import Embedding
from idaa_lib.nets.vae import VAE
from idaa_lib.runs import checkpoints
from idaa_lib.train import locate, samples, train_semi, train_vae
from idaa_lib.views import Recipe, View, keyed_generator, normalise, recipe
from idaa_lib.views.randaugment import INDEX, OPERATIONS, RandAugment, augment, cutout, strengths_of

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
CLASSES, B, MU, SIZE = 3, 4, 2, 16
P_VALUE = 1e-3


def photographs(n, size):
    """(n, 3, size, size) uint8: patches of three photographs, every other pixel."""
    rng = np.random.default_rng(0)
    sources = [skimage.data.astronaut(), skimage.data.chelsea(), skimage.data.coffee()]
    patches = []
    for k in range(n):
        photo = sources[k % 3][::2, ::2]
        top, left = (rng.integers(side - size + 1) for side in photo.shape[:2])
        patches.append(photo[top : top + size, left : left + size].transpose(2, 0, 1))
    return torch.from_numpy(np.stack(patches))


# --- strong views


def pil(image, name, v, size, negative):
    """An operation as the public recipe does it, of strength v in 1 … 9."""
    sign = -1 if negative else 1
    share = sign * 0.3 * v / 10
    pixels = sign * int(0.3 * v / 10 * size)
    affine = {
        "shear_x": (1, share, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, share, 1, 0),
        "translate_x": (1, 0, pixels, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, pixels),
    }
    if name in affine:
        return image.transform(image.size, Image.Transform.AFFINE, affine[name])
    if name == "rotate":
        return image.rotate(sign * int(30 * v / 10))
    if name in ("brightness", "color", "contrast", "sharpness"):
        return getattr(ImageEnhance, name.capitalize())(image).enhance(0.9 * v / 10 + 0.05)
    return {
        "identity": lambda: image,
        "autocontrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
        "posterize": lambda: ImageOps.posterize(image, int(4 * v / 10) + 4),
        "solarize": lambda: ImageOps.solarize(image, 256 - int(256 * v / 10)),
    }[name]()


def to_pil(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def from_pil(images):
    return torch.from_numpy(np.stack([np.asarray(i) for i in images])).permute(0, 3, 1, 2).float()


@pytest.mark.parametrize("size", [32, 27])
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_agrees_with_pil(name, size):
    """To the level; autocontrast, which PIL rounds down from floats, to one level in 1 %."""
    images = photographs(6, size)
    images[0], images[1, 0] = 77, 200  # a plain image, a plain channel
    images[2] = images[2] // 3 + 40  # low contrast
    index = torch.full((len(images),), INDEX[name])
    for v in range(1, 10):
        for negative in (False, True):
            like = torch.ones(len(images), dtype=torch.float64)
            strength = strengths_of(index, v * like, negative * like > 0, size)
            ours = augment(images.float(), index, strength.float())
            oracle = from_pil([pil(to_pil(i), name, v, size, negative) for i in images])
            errors = (ours - oracle).abs()
            if name == "autocontrast":
                assert errors.max() <= 1
                assert (errors > 0).float().mean() < 0.01
            else:
                assert torch.equal(ours, oracle)


def test_each_sample_has_its_own_operation_and_strength():
    images = photographs(len(OPERATIONS), 32).float()
    index = torch.arange(len(OPERATIONS))
    v = torch.linspace(1, 9, len(OPERATIONS)).round().double()
    strength = strengths_of(index, v, index % 2 == 0, 32).float()
    batch = augment(images, index, strength)
    singles = map(augment, images.split(1), index.split(1), strength.split(1))
    assert torch.equal(batch, torch.cat(list(singles)))


def test_cutout_agrees_with_pil_and_is_cut_off_at_the_border():
    images = photographs(5, 32)
    corners = [(-8, -8), (5, 20), (24, 3), (31 - 8, 31 - 8), (10, 10)]
    box = torch.tensor([[*corner, 16, 16] for corner in corners]).float()
    oracle = []
    for image, (top, left) in zip(images, corners, strict=True):
        picture = to_pil(image)
        ImageDraw.Draw(picture).rectangle([left, top, left + 15, top + 15], (127, 127, 127))
        oracle.append(picture)
    assert torch.equal(cutout(images.float(), box), from_pil(oracle))
    box[:, 2] = 0
    assert torch.equal(cutout(images.float(), box), images.float())


def strong_recipe(size=32):
    return RandAugment(size, MEAN, STD, flip=0.5, shift=1 / 8)


def test_a_strong_view_is_a_weak_one_its_operations_in_order_and_cutout():
    images, augment_strongly = photographs(64, 32), strong_recipe()
    ours, params = augment_strongly(images, keyed_generator(0))
    oracle = []
    for k, image in enumerate(images):
        top, left = (4 + int(c) for c in params["crop"][k, :2])
        canvas = np.pad(image.permute(1, 2, 0).numpy(), ((4, 4), (4, 4), (0, 0)), "reflect")
        view = Image.fromarray(np.ascontiguousarray(canvas[top : top + 32, left : left + 32]))
        if params["flip"][k]:
            view = ImageOps.mirror(view)
        for operation in zip(params["operations"][k], params["strengths"][k], strict=True):
            after = augment(from_pil([view]), *(part[None] for part in operation))
            view = to_pil(after[0].byte())
        top, left = (int(c) for c in params["cutout"][k, :2])
        ImageDraw.Draw(view).rectangle([left, top, left + 15, top + 15], (127, 127, 127))
        oracle.append(view)
    torch.testing.assert_close(ours, normalise(from_pil(oracle) / 255, MEAN, STD))


def test_strong_parameters_are_distributed_as_the_public_recipe_draws_them():
    n = 20_000
    params = strong_recipe().parameters(strong_recipe().numbers(n, keyed_generator(1)), (32, 32))
    for operations in params["operations"].T:
        counts = operations.bincount(minlength=len(OPERATIONS)).double()
        share = torch.full_like(counts, 0.5 / len(OPERATIONS))
        share[INDEX["identity"]] += 0.5  # not done
        assert stats.chisquare(counts, n * share).pvalue > P_VALUE
    operations = params["operations"].flatten()
    strengths = params["strengths"].flatten()
    rotations = strengths[operations == INDEX["rotate"]]
    counts = [int((rotations == 3 * v).sum()) for v in range(-9, 10) if v]
    assert sum(counts) == len(rotations)
    assert stats.chisquare(counts).pvalue > P_VALUE
    centre = params["cutout"][:, :2] + 8
    assert stats.chisquare(centre.flatten().long().bincount(minlength=32)).pvalue > P_VALUE
    assert (params["cutout"][:, 2:] == 16).all()
    shifts = params["crop"][:, :2].flatten().long()
    assert stats.chisquare((shifts + 4).bincount(minlength=9)).pvalue > P_VALUE


def test_a_weak_view_is_a_reflecting_shift_and_a_mirror():
    images = photographs(40, 32)
    augment_weakly = Recipe(32, MEAN, STD, flip=0.5, shift=1 / 8)
    view = augment_weakly(images, keyed_generator(2))
    canvas = F.pad(images / 255, (4, 4, 4, 4), mode="reflect")
    for k, image in enumerate(canvas):
        top, left, height, width = view.params["crop"][k].int().tolist()
        assert (height, width) == (32, 32)
        x = image[:, 4 + top : 36 + top, 4 + left : 36 + left]
        x = x.flip(2) if view.params["flip"][k] else x
        torch.testing.assert_close(view.images[k], normalise(x, MEAN, STD))


# --- the wide ResNet


def naive_wrn(state, x, blocks, suffix=""):
    """WRN-(6·blocks + 4) in training mode, from FixMatch's own code, a block at a time."""

    def norm(name, y):
        mean, variance = y.mean((0, 2, 3)), y.var((0, 2, 3), unbiased=False)
        y = (y - mean[:, None, None]) / (variance + 1e-5).sqrt()[:, None, None]
        weight, bias = state[f"{name}{suffix}.weight"], state[f"{name}{suffix}.bias"]
        return y * weight[:, None, None] + bias[:, None, None]

    def leaky(y):
        return torch.where(y > 0, y, 0.1 * y)

    x = F.conv2d(x, state["conv1.weight"], padding=1)
    for stage in (1, 2, 3):
        for i in range(blocks):
            at, stride = f"layer{stage}.{i}", 2 if i == 0 and stage > 1 else 1
            y = leaky(norm(f"{at}.bn1", x))
            if stage == 1 and i == 0:
                x = y
            y = F.conv2d(y, state[f"{at}.conv1.weight"], stride=stride, padding=1)
            y = F.conv2d(leaky(norm(f"{at}.bn2", y)), state[f"{at}.conv2.weight"], padding=1)
            if f"{at}.shortcut.weight" in state:
                x = F.conv2d(x, state[f"{at}.shortcut.weight"], stride=stride)
            x = x + y
    return leaky(norm("bn", x)).mean((2, 3))


@pytest.mark.parametrize(("name", "width"), [("wrn10", 4), ("wrn16", 8), ("wrn16", 16)])
def test_a_wide_resnet_agrees_with_its_paper_s_code(name, width):
    torch.manual_seed(0)
    net = build_backbone(name, width=width, stem="cifar", adversarial_norms=True).double()
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    x = torch.randn(5, 3, 16, 16, dtype=torch.float64)
    state, blocks = net.state_dict(), {"wrn10": 1, "wrn16": 2}[name]
    for adversarial in (False, True):
        oracle = naive_wrn(state, x, blocks, "_adv" if adversarial else "")
        torch.testing.assert_close(net(x, adversarial=adversarial), oracle)
    assert net.feature_dim == oracle.shape[1] == 4 * width


@pytest.mark.parametrize(
    ("width", "classes", "count"), [(32, 10, 1_467_610), (128, 100, 23_401_012)]
)
def test_wrn_28_has_as_many_parameters_as_published(width, classes, count):
    net = build_backbone("wrn28", width=width, stem="cifar", adversarial_norms=False)
    assert sum(p.numel() for p in net.parameters()) + (net.feature_dim + 1) * classes == count


def test_a_wide_resnet_has_one_stem():
    with pytest.raises(ValueError, match="stem must be cifar for a wide ResNet, and is 'imagenet'"):
        build_backbone("wrn10", width=4, stem="imagenet", adversarial_norms=False)


# --- the step


def settings(**values):
    options = dict(backbone="wrn10", width=4, size=SIZE, batch_size=B, mu=MU, threshold=0.606)
    return SemiConfig(**options | values)


def fixmatch(n=12, unknown=0, **values):
    """Trained on n images, of which the last `unknown` have no label."""
    config = settings(**values)
    labels = torch.arange(n) % CLASSES
    labels[n - unknown :] = -1
    views = recipe("none", config.size, MEAN, STD)
    about = About(views, labels, CLASSES, config.epochs, config.batch_size, config.seed)
    return build_method(config, about).double().train()


def three_views(seed=3):
    draw = functools.partial(torch.randn, generator=keyed_generator(seed), dtype=torch.float64)
    sizes = (B, MU * B, MU * B)
    return tuple(View(draw(n, 3, SIZE, SIZE), {}) for n in sizes)


BATCH = {"labelled": torch.tensor([2, 0, 7, 4]), "images": torch.tensor([1, 2, 3, 5, 8, 9, 10, 11])}


def a_vae():
    torch.manual_seed(2)
    return VAE(8, SIZE, width=4).double().eval()


def naive_step(net, views, labels, config, attack):
    """Loss, x′ and what is believed, image by image, in the order of the authors' repository."""

    def network(images, adversarial=False):
        e = net(images, adversarial=adversarial)
        return e.logits, e.h / e.h.norm(dim=1, keepdim=True)

    x, u, s = (view.images for view in views)
    logits, h = network(torch.cat([x, u, s]))
    p = logits[len(x) : len(x) + len(u)].detach().softmax(1)
    pseudo, trust = p.argmax(1), p.max(1).values >= config.threshold
    loss = sum(-logits[i].log_softmax(0)[label] for i, label in enumerate(labels)) / len(x)
    strong_logits = logits[len(x) + len(u) :]
    for i in range(len(u)):
        if trust[i]:
            loss = loss - config.lambda_u * strong_logits[i].log_softmax(0)[pseudo[i]] / len(u)
    if attack is None:
        return loss, None, trust

    def rows(anchor, output):
        logits, h = output
        for i in range(len(u)):
            if config.contrast == "ce":
                yield -logits[i].log_softmax(0)[pseudo[i]]
            else:
                scores = torch.stack([anchor[i] @ h[j] / config.temperature for j in range(len(u))])
                yield -scores.log_softmax(0)[i]

    with torch.no_grad():
        start = network(u, adversarial=True)[1]

    def contrast(candidate):
        return sum(rows(start, network(candidate, adversarial=True))) / len(u)

    x_adv = attack(contrast, u)
    contrasts = rows(h[len(x) : len(x) + len(u)].detach(), network(x_adv, adversarial=True))
    adversarial = sum(row for row, weight in zip(contrasts, trust, strict=True) if weight) / len(u)
    return loss + config.alpha * adversarial, x_adv, trust


def attacks(adversary, epsilon=0.5):
    """The library's adversary, and a slow one: (a loss of x′, the weak view) → x′."""
    vae = a_vae()
    if adversary == "clae":
        return CLAE(epsilon=epsilon), lambda loss, u: reference.ascend_pixels(loss, u, epsilon)
    if adversary == "idaa":
        return IDAA(vae, epsilon=epsilon), lambda loss, u: reference.ascend_latent(
            loss, vae, u, epsilon
        )
    signs = lambda loss, u: reference.random_signs(vae, u, epsilon, keyed_generator(9))  # noqa: E731
    return (RandomSign(vae, epsilon=epsilon), signs) if adversary == "random_sign" else (None, None)


def adversarial_view(adversary, step, epsilon=0.5):
    """x′ of the library's adversary."""
    attack = attacks(adversary, epsilon)[0]
    return attack(step.attacked.images, step.attack_loss, keyed_generator(9)).images


CONTRASTS = pytest.mark.parametrize("contrast", ["infonce", "ce"])


@CONTRASTS
@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_a_step_agrees_with_a_naive_one(adversary, contrast):
    values = dict(adversary=adversary, lambda_u=0.5)
    values |= {} if adversary == "none" else {"contrast": contrast, "alpha": 0.7}
    method, config = fixmatch(**values), settings(**values)
    network = copy.deepcopy(method.network)
    views, attack = three_views(), attacks(adversary)[1]
    labels = method.labels[BATCH["labelled"]]
    oracle, x_adv, trust = naive_step(network, views, labels, config, attack)
    assert 0 < trust.sum() < len(trust)  # or the test would not see the mask
    oracle.backward()

    step = method.step(views, BATCH, Moment())
    loss = step.loss
    if adversary != "none":
        view = adversarial_view(adversary, step)
        torch.testing.assert_close(view, x_adv)
        assert (view - step.attacked.images).abs().max() > 0.01
        loss = loss + config.alpha * step.adversarial_loss(view)
    loss.backward()
    torch.testing.assert_close(loss.detach(), oracle.detach())
    pairs = zip(method.network.named_parameters(), network.parameters(), strict=True)
    for (name, p), q in pairs:
        if q.grad is None:
            assert p.grad is None, name
        else:
            torch.testing.assert_close(p.grad, q.grad, msg=name)


@CONTRASTS
@pytest.mark.parametrize("adversary", ADVERSARIES[1:])
def test_epsilon_0_gives_the_adversarial_loss_of_the_weak_view_itself(adversary, contrast):
    values = dict(adversary=adversary, contrast=contrast, alpha=0.7)
    method = fixmatch(**values)
    network, views = copy.deepcopy(method.network), three_views()
    labels = method.labels[BATCH["labelled"]]
    oracle, _, trust = naive_step(network, views, labels, settings(**values), lambda loss, u: u)
    assert 0 < trust.sum() < len(trust)
    step = method.step(views, BATCH, Moment())
    total, total_at_half = (
        step.loss + 0.7 * step.adversarial_loss(adversarial_view(adversary, step, epsilon))
        for epsilon in (0.0, 0.5)
    )
    torch.testing.assert_close(total, oracle)
    assert (total_at_half - oracle).abs() > 1e-5  # so that agreement means something


@CONTRASTS
@pytest.mark.parametrize("adversary", ADVERSARIES[1:])
def test_of_the_norms_the_backbone_s_adversarial_ones_alone_see_the_attacked_view(
    adversary, contrast
):
    method = fixmatch(adversary=adversary, contrast=contrast)
    backbone = method.network.backbone
    norms = {name for name, m in method.named_modules() if isinstance(m, nn.BatchNorm2d)}
    backbone_norms = {name for name in norms if name.startswith("network.backbone.")}
    twins = {name for name in backbone_norms if name.endswith("_adv")}
    assert 0 < 2 * len(twins) == len(backbone_norms) == len(norms) / 2  # the other half: averages

    def find_changes(work):
        """The norms whose statistics `work` changes, and all buffers before it."""
        before = {name: buffer.clone() for name, buffer in method.named_buffers()}
        work()
        after = dict(method.named_buffers())
        buffers = {name for name in after if not torch.equal(after[name], before[name])}
        names = {name.rpartition(".")[0] for name in buffers}
        for statistic in ("running_mean", "running_var", "num_batches_tracked"):
            assert {f"{name}.{statistic}" for name in names} <= buffers
        return names, before

    steps = []
    work = lambda: steps.append(method.step(three_views(), BATCH, Moment()))  # noqa: E731
    assert find_changes(work)[0] == backbone_norms - twins
    x_adv = adversarial_view(adversary, *steps)
    attack_norms, before = find_changes(lambda: steps[0].adversarial_loss(x_adv))
    assert attack_norms == twins
    first = "layer1.0.bn1_adv.running_mean"
    expected = backbone.conv1(x_adv).mean((0, 2, 3))
    expected = 0.99 * before[f"network.backbone.{first}"] + 0.01 * expected
    torch.testing.assert_close(backbone.get_buffer(first), expected)


def test_infonce_of_features_that_are_all_alike_is_the_log_of_their_number():
    h = F.normalize(torch.ones(5, 3, dtype=torch.float64), dim=1)
    torch.testing.assert_close(one_way(h, h, 0.1, "none"), torch.full((5,), math.log(5)).double())


def test_pseudo_labels_are_counted():
    method, partial = fixmatch(), fixmatch(unknown=1)
    with torch.no_grad():  # says class 1 of everything, and is sure
        method.network.head.weight.zero_()
        method.network.head.bias.copy_(torch.tensor([0.0, 9.0, 0.0]))
    parts = method.step(three_views(), BATCH, Moment()).parts
    right = (method.labels[BATCH["images"]] == 1).double().mean().item()
    assert parts["believed"].item() == 100
    assert parts["pseudo_top1"].item() == pytest.approx(100 * right)
    assert parts["believed_right"].item() == pytest.approx(100 * right)
    assert "pseudo_top1" not in partial.step(three_views(), BATCH, Moment()).parts


def test_nothing_is_believed_below_the_threshold():
    method = fixmatch(threshold=1.0, adversary="clae")
    step = method.step(three_views(), BATCH, Moment())
    assert step.parts["believed"] == step.parts["unsupervised_loss"] == 0
    assert step.adversarial_loss(step.attacked.images) == 0


# --- averaged weights, optimiser


def test_weights_are_averaged_and_statistics_copied():
    method = fixmatch(ema_decay=0.9)
    optimizer = fit_of(method, settings(learning_rate=0.1)).optimizer
    expected = {name: p.detach().clone() for name, p in method.network.named_parameters()}
    assert all(torch.equal(p, expected[name]) for name, p in method.ema.named_parameters())
    for k in range(3):
        step = method.step(three_views(k), BATCH, Moment())
        step.loss.backward()
        optimizer.step()
        method.after_step(step, Moment(step=k, steps=3))
        for name, p in method.network.named_parameters():
            expected[name] = 0.9 * expected[name] + 0.1 * p.detach()
    for name, p in method.ema.named_parameters():
        torch.testing.assert_close(p, expected[name], msg=name)
        assert not p.requires_grad
    for ours, theirs in zip(method.ema.buffers(), method.network.buffers(), strict=True):
        assert torch.equal(ours, theirs)


def test_statistics_are_as_slow_as_the_average():
    norms = {
        name: m.momentum
        for name, m in fixmatch(adversary="clae", ema_decay=0.999).named_modules()
        if isinstance(m, nn.BatchNorm2d)
    }
    adversarial = {name for name in norms if name.endswith("_adv")}
    assert {norms[name] for name in adversarial} == {0.01}
    assert [norms[name] for name in norms.keys() - adversarial] == pytest.approx(
        [0.001] * (len(norms) - len(adversarial))
    )


def test_vectors_do_not_decay_and_the_rate_falls_by_seven_sixteenths_of_a_half_turn():
    method = fixmatch(steps_per_epoch=8)
    fit = fit_of(method, settings(weight_decay=1e-3, epochs=4))
    groups = fit.optimizer.param_groups
    names = {id(p): name for name, p in method.network.named_parameters()}
    matrices, vectors = ({names[id(p)] for p in group["params"]} for group in groups)
    assert vectors == {n for n in names.values() if "bn" in n or n.endswith("bias")}
    assert matrices | vectors == set(names.values())
    assert [group["weight_decay"] for group in groups] == [1e-3, 0]
    assert all(group["nesterov"] and group["momentum"] == 0.9 for group in groups)
    for factor in fit.schedules:
        assert factor(0) == 1
        assert factor(16) == pytest.approx(math.cos(7 * math.pi / 32))
        assert factor(32) == pytest.approx(0.19509, abs=1e-5)


# --- what is labelled, and in which order


@pytest.mark.parametrize("per_class", [4, 25, 100])
def test_the_labelled_subset_is_balanced_and_drawn_by_seed(per_class):
    labels = torch.randint(0, 10, (2000,), generator=keyed_generator(0))
    labels[::7] = -1  # unknown
    first, repeat, other = (labelled_subset(labels, per_class, 10, seed) for seed in (0, 0, 1))
    assert torch.equal(first, repeat)
    assert not torch.equal(first, other)
    assert labels[first].bincount(minlength=10).tolist() == [per_class] * 10
    assert len(first.unique()) == 10 * per_class


def test_a_class_without_enough_images_is_told():
    with pytest.raises(ConfigError, match="labels_per_class=3 is more than the 2 training images"):
        labelled_subset(torch.tensor([0, 0, 0, 1, 1]), 3, 2, 0)


def test_streams_visit_all_images_equally_often_and_any_epoch_is_known_alone():
    method = fixmatch(30, steps_per_epoch=5, labels_per_class=2)
    labels = torch.arange(30) % CLASSES
    epochs = [list(method.batches(epoch)) for epoch in range(3)]
    assert [len(batches) for batches in epochs] == [method.steps_per_epoch()] * 3
    batches = [batch for epoch in epochs for batch in epoch]  # 15 steps of 4 and of 8
    indices = torch.cat([batch["images"] for batch in batches])
    assert indices.bincount(minlength=30).tolist() == [4] * 30
    assert indices[:30].sort().values.tolist() == list(range(30))
    assert indices[:30].tolist() != indices[30:60].tolist()
    label_indices = torch.cat([batch["labelled"] for batch in batches])
    subset = labelled_subset(labels, 2, CLASSES, 0)
    assert label_indices.unique().tolist() == subset.tolist()
    assert label_indices.bincount(minlength=30)[subset].tolist() == [10] * 6
    assert method.images_per_step() == len(batches[0]["images"]) + len(batches[0]["labelled"])
    epoch_2 = list(method.batches(2))
    assert all(torch.equal(a[k], b[k]) for a, b in zip(epoch_2, epochs[2], strict=True) for k in a)
    assert fixmatch(100).steps_per_epoch() == 100 // (MU * B)


def test_several_processes_draw_what_one_would():
    method = fixmatch(size=32)
    images = {"labelled": photographs(4, 32), "images": photographs(8, 32)}
    views = views_of(method, 0, 1, images)
    halves = [{k: v.chunk(2)[rank] for k, v in images.items()} for rank in (0, 1)]
    parts = [views_of(method, rank, 2, half) for rank, half in enumerate(halves)]
    assert [len(view.images) for view in views] == [4, 8, 8]
    assert "operations" in views[2].params
    for k in range(3):
        assert torch.equal(torch.cat([part[k].images for part in parts]), views[k].images)


# --- two processes


class Plain(nn.Module):
    """A classifier without BatchNorm: the same on a half of a batch."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(3 * SIZE**2, 16), nn.Linear(16, CLASSES)

    def forward(self, images, condition=None, adversarial=False):
        h = self.first(images.flatten(1)).tanh()
        return Embedding(h, logits=self.head(h))


def a_step(rank, processes, wrap, kind):
    """This rank's part of a step of FixMatch + IDAA: δ and the parameters' gradients."""
    torch.manual_seed(0)
    net = Plain().double()
    method = fixmatch(adversary="idaa", contrast=kind, threshold=0.4)
    method.network = wrap(net)
    views = [View(view.images.chunk(processes)[rank], {}) for view in three_views()]
    batch = {k: index.chunk(processes)[rank] for k, index in BATCH.items()}
    step = method.step(tuple(views), batch, Moment())
    attack = IDAA(a_vae(), epsilon=0.5)(step.attacked.images, step.attack_loss)
    (step.loss + 0.7 * step.adversarial_loss(attack.images)).backward()
    gradients = {name: p.grad for name, p in net.named_parameters()}
    return {"delta": attack.delta, "believed": step.parts["believed"], **gradients}


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    wrap = functools.partial(nn.parallel.DistributedDataParallel, broadcast_buffers=False)
    for kind in ("infonce", "ce"):
        torch.save(a_step(rank, 2, wrap, kind), f"{folder}/{kind}-{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_step_like_one(tmp_path):
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    for kind in ("infonce", "ce"):
        ranks = [torch.load(tmp_path / f"{kind}-{rank}.pt") for rank in (0, 1)]
        single = a_step(0, 1, lambda network: network, kind)
        shares = [rank["believed"].item() for rank in ranks]
        assert 0 < sum(shares) / 2 == single["believed"] < 100
        assert torch.equal(torch.cat([r["delta"] for r in ranks]).sign(), single["delta"].sign())
        for name in single.keys() - {"delta", "believed"}:
            for rank in ranks:
                torch.testing.assert_close(rank[name], single[name], msg=name)


# --- configurations


def test_every_adversary_has_fixmatch_s_radius():
    with pytest.raises(ConfigError, match="temperature"):
        SemiConfig(temperature=-1)
    assert SemiConfig(adversary="idaa").epsilon == SemiConfig(adversary="clae").epsilon == 0.5


def test_the_paper_s_preset_is_the_public_recipe():
    config = SemiConfig(preset="paper")
    assert config.epochs * config.steps_per_epoch == 2**20
    values = dict(
        dataset="cifar100", backbone="wrn28", width=16 * 8, batch_size=64, mu=7, ema_decay=0.999,
        learning_rate=0.03, weight_decay=1e-3, threshold=0.95, lambda_u=1.0,
    )  # fmt: skip
    assert {name: getattr(config, name) for name in values} == values


# --- whole runs

TINY = dict(
    limit=200, width=4, labels_per_class=2, batch_size=8, mu=2, epochs=2, steps_per_epoch=6,
    threshold=0.3, log_every=4, device="cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def vae_run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IDAA_OUTPUTS", str(tmp_path_factory.mktemp("outputs")))
        values = dict(limit=256, batch_size=32, epochs=4, width=4, dim=8, device="cpu")
        yield train_vae(VAEConfig(**values))


@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_a_run_that_was_interrupted_ends_bit_for_bit_like_one_that_was_not(
    outputs, vae_run, monkeypatch, adversary
):
    config = SemiConfig(**TINY, **attacked_by(adversary, vae_run))
    result, repeat = whole_and_resumed(train_semi, config, monkeypatch, 9, 12)
    assert result[0].keys() == repeat[0].keys()
    assert all(torch.equal(result[0][k], repeat[0][k]) for k in result[0])
    assert result[1:] == repeat[1:]


def test_a_run_says_how_it_was_judged_and_its_encoder_can_be_evaluated(outputs):
    run = train_semi(SemiConfig(**TINY))
    summary, test = run.summary, load("photos", "test")
    assert summary["ema_n"] == len(test) == 1000
    assert summary["ema_low"] <= summary["ema_top1"] <= summary["ema_high"]
    assert summary["ema_protocol"].endswith("2 labels a class of 200 training images")
    assert summary["images_per_second"] == pytest.approx(12 * 24 / summary["seconds"])
    # It goes on with more images, whose labels are drawn anew.
    more = train_semi(SemiConfig(**TINY | {"limit": 240, "continue_from": run.id}))
    assert more.summary["ema_protocol"].endswith("2 labels a class of 240 training images")
    lines = run.metrics()
    assert [line["step"] for line in lines if "ema_top1_val" in line] == [6, 12]
    names = set().union(*lines)
    assert {"supervised_loss", "unsupervised_loss", "believed", "pseudo_top1"} <= names

    (run.path / "environment.json").unlink()  # for the record alone
    module, *units = load_encoder(run.id, "classifier")
    guess = features(module, test.images, *units).argmax(1)
    accuracy = 100 * (guess == test.labels).double().mean().item()
    assert accuracy == pytest.approx(summary["ema_top1"])
    tensors = checkpoints.load(run)[0]
    backbone = load_encoder(run).module
    assert torch.equal(backbone.conv1.weight, tensors["method.ema.backbone.conv1.weight"])
    assert not torch.equal(random_encoder(run).module.conv1.weight, backbone.conv1.weight)
    z = features(load_encoder(run, "projector").module, test.images[:9], *units)
    torch.testing.assert_close(z.norm(dim=1), torch.ones(9))
    evaluation = evaluate(EvalConfig(run=run.id, limit=100, references=False))
    assert evaluation.summary["knn_n"] == 100
    with pytest.raises(ConfigError, match="protocol='official' is of self-supervised runs"):
        evaluate(EvalConfig(run=run.id, limit=100, protocol="official"))


def test_fewer_labels_than_asked_for_is_told_before_anything_is_written(outputs):
    with pytest.raises(ConfigError, match="labels_per_class=40 is more than the"):
        train_semi(SemiConfig(**TINY | {"labels_per_class": 40}))
    assert not (outputs / "semi").exists()


def test_another_labelled_subset_is_another_run(outputs):
    one, other = (locate(SemiConfig(**TINY | {"labels_per_class": n})) for n in (2, 4))
    assert one != other
    assert one.id.startswith("semi-photos-none")


@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_training_lowers_the_loss_lifts_knn_and_believes_more(outputs, vae_run, adversary):
    values = TINY | dict(
        limit=400, width=8, labels_per_class=4, batch_size=13, epochs=2, steps_per_epoch=25,
        threshold=0.6, ema_decay=0.9, seed=1,
    )  # fmt: skip
    run = train_semi(SemiConfig(**values | attacked_by(adversary, vae_run)))
    lines = [line for line in run.metrics() if "loss" in line]
    for name in ("loss", "supervised_loss"):  # the first grows by all that comes to be believed
        assert lines[-1][name] < lines[0][name] - 0.3
    assert lines[-1]["believed"] > lines[0]["believed"]
    if adversary != "none":
        assert lines[-1]["adversarial_loss"] > 0  # it took part
    assert run.summary["ema_top1_val"] > 3 * 100 / 13
    start, end = knn_top1(random_encoder(run)), knn_top1(load_encoder(run))
    assert end > start + 3


# --- CIFAR-100, whose published normalisation is not CIFAR-10's

CIFAR100 = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


class ThreePhotographs:
    """In the place of `torchvision.datasets.CIFAR100`."""

    classes = ("astronaut", "chelsea", "coffee")

    def __init__(self, root, train, download):
        self.images = photographs(96, 32)[slice(48) if train else slice(48, None)]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return to_pil(self.images[i]), i % 3


@pytest.mark.parametrize("adversary", ["idaa", "random_sign"])
def test_a_vae_sees_cifar_100_s_views_in_its_own_units(outputs, tmp_path, monkeypatch, adversary):
    monkeypatch.setenv("IDAA_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", ThreePhotographs)
    values = dict(dataset="cifar100", epochs=1, width=4, precision="fp32", device="cpu")
    vae = load_vae(train_vae(VAEConfig(**values, batch_size=8, dim=8)))
    assert (vae.mean, vae.std) == (MEAN, STD)
    mean, std, vae_mean, vae_std = (torch.tensor(v).view(3, 1, 1) for v in (*CIFAR100, MEAN, STD))
    assert_close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    kind = {"idaa": IDAA, "random_sign": RandomSign}[adversary]
    original, results = kind.__call__, []

    def attack(self, x, attack_loss, **turn):
        result = original(self, x, attack_loss, **turn)
        levels = 255 * (x * std + mean)
        pixels = levels.round() / 255  # a weak view is moved and mirrored: whole levels
        assert (levels - 255 * pixels).abs().max() < 0.01
        assert pixels.min() >= 0 and pixels.max() <= 1
        zeta = vae.encode((pixels - vae_mean) / vae_std)[0].requires_grad_()
        G = vae.decode(zeta) * vae_std + vae_mean
        (gradient,) = torch.autograd.grad(attack_loss((pixels - G.detach() + G - mean) / std), zeta)
        if adversary == "idaa":
            mask = gradient.abs() > 0.01 * gradient.abs().mean()
            assert mask.double().mean() > 0.9
            assert torch.equal(result.delta.sign()[mask], gradient.sign()[mask])
        with torch.no_grad():
            assert_close(result.delta.abs(), torch.full_like(zeta, 0.5))
            assert_close(result.z, zeta + result.delta)
            assert_close(result.reconstruction, (G - mean) / std)
            reconstruction = vae.decode(zeta + result.delta) * vae_std + vae_mean
            assert_close(result.images, (pixels - G + reconstruction - mean) / std)
            # What an attack without conversion would give lies elsewhere.
            images = x - vae.decode(vae.encode(x)[0]) + vae.decode(vae.encode(x)[0] + result.delta)
            assert (images - result.images).abs().max() > 0.01
        results.append(result)
        return result

    monkeypatch.setattr(kind, "__call__", attack)
    values |= dict(batch_size=4, mu=2, steps_per_epoch=2, labels_per_class=2)
    run = train_semi(SemiConfig(**values, adversary=adversary))
    assert len(results) == 2
    assert load_encoder(run)[2:] == CIFAR100


def test_the_notebook_runs_beside_labels_alone(outputs, tmp_path):
    sweeps.execute(
        "07_semi_supervised", TINY | {"adversary": "clae", "epochs": 1}, tmp_path / "out.ipynb"
    )
    trainings = runs.find("semi")
    kinds = {(run.config.adversary, run.config.lambda_u) for run in trainings}
    assert kinds == {("none", 0.0), ("none", 1.0), ("clae", 1.0)}
    (run,) = (run for run in trainings if run.config.adversary == "clae")
    assert {path.name for path in (run.path / "figures").glob("*.png")} == {
        "curves.png", "views.png", "losses.png", "pseudo_labels.png", "accuracy.png",
        "validation.png",
    }  # fmt: skip


def test_the_picture_of_a_step_is_read_back(outputs):
    run = train_semi(SemiConfig(**TINY, adversary="clae"))
    rows = samples.read(run)
    assert list(rows) == ["weak view", "strong view", "x′", "x′ − x, × 3"]
    assert {tuple(images.shape) for images in rows.values()} == {(8, 3, 32, 32)}
    view, x_adv, difference = (rows[k] for k in ("weak view", "x′", "x′ − x, × 3"))
    mask = (x_adv > 0) & (x_adv < 1) & (difference > 0) & (difference < 1)
    errors = (0.5 + 3 * (x_adv - view) - difference)[mask].abs()
    assert errors.max() < 4.5 / 255  # three roundings, those of x′ and x tripled

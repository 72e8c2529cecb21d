"""Every method with every adversary: losses against slow oracles, what the norms see, resuming,
learning. What SimCLR alone has is in test_simclr.py."""

import copy
import functools
import importlib
import math
from itertools import product
from types import SimpleNamespace

import pytest
import reference
import torch
import torch.distributed as dist
from conftest import fit_of, whole_and_resumed
from torch import nn
from torch.nn import functional as F

from idaa_lib.adversaries import CLAE, IDAA, RandomSign
from idaa_lib.configs import ConfigError, EvalConfig, SSLConfig, VAEConfig
from idaa_lib.data.cached import load
from idaa_lib.evaluate.encoders import features, load_encoder, random_encoder
from idaa_lib.evaluate.knn import knn
from idaa_lib.evaluate.stage import evaluate
from idaa_lib.methods import METHODS, About, Moment, Step, build_method
from idaa_lib.methods.schedules import build_schedule
from idaa_lib.methods.uel import spreading
from idaa_lib.nets import BACKBONES
from idaa_lib.nets.resnet import ResNet
from idaa_lib.nets.vae import VAE
from idaa_lib.registry import CHOICES
from idaa_lib.train import train_ssl, train_vae
from idaa_lib.train.loop import Fit
from idaa_lib.views import RECIPES, View, keyed_generator, recipe

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
B, SIZE, QUEUE = 5, 16, 16
METHOD_NAMES = ("simclr", "plain", "uel", "simsiam", "moco", "byol", "barlow", "rsa", "ipirm")
ALL_KEYS = ("blur", "color", "color_diff", "crop", "flip", "grayscale")
# SimSiam's two pairings are two methods here; so are methods that are conditioned as CASSLE's, on
# all there is, those with AugSelf's heads, and IP-IRM of mixed images.
CASSLE, AUGSELF = (
    ("simclr/cassle", "byol/cassle"), ("moco/augself", "simsiam/augself"),
)  # fmt: skip
VARIANTS = (*METHOD_NAMES, "simsiam/imagenet", *CASSLE, *AUGSELF, "ipirm/mixup")
WEIGHTS = {"blur": 0.2, "color": 0.5, "crop": 0.7, "flip": 0.3}
# Random numbers of IP-IRM's mixup, for the whole of a batch and in two partitions.
DRAWS = torch.rand(6, 3, 2, dtype=torch.float64, generator=keyed_generator(8))
# Within a training, where β of RSA is neither its first value nor its last.
MOMENT = Moment(
    step=2,
    steps=8,
    progress=torch.tensor(0.25, dtype=torch.float64),
    numbers={"mixup": DRAWS[:B]},
)
# Sides of each image in two partitions of IP-IRM, the first two and the second two of the 6.
PARTITIONS = torch.tensor([[0, 0, 1, 1, 0, 1], [0, 1, 0, 1, 0, 1]])
ADVERSARIES = ("none", "clae", "idaa", "random_sign")
SMALL = dict(width=4, batch_size=B)
BATCH = {"images": torch.arange(B)}
KNOBS = dict(projection_dim=8, queue=QUEUE, momentum=0.8, temperature=0.3)


def knobs_of(variant, **knobs):
    """Of values for all methods those that this one has."""
    names = METHODS[variant.partition("/")[0]].Options.model_fields
    return {name: value for name, value in knobs.items() if name in names}


def values_of(variant):
    name, _, kind = variant.partition("/")
    options = {
        "": {},
        "imagenet": {"pairing": "imagenet"},
        "mixup": {"mixup": True},
        "cassle": {"condition": ALL_KEYS, "gamma_depth": 2, "gamma_width": 6},
        "augself": {"augself": WEIGHTS},
    }
    return {"method": name} | options[kind]


def views_of(variant):
    """Views that draw what a variant needs: RSA photometry, CASSLE and AugSelf all there is."""
    return {"rsa": "rsa"}.get(variant, "cassle" if variant in CASSLE + AUGSELF else "none")


def total(loss):
    """A loss that may be closures, which are differentiated one after another, as one scalar."""
    return loss if isinstance(loss, torch.Tensor) else sum(part() for part in loss)


def a_config(variant, adversary="idaa", **values):
    options = knobs_of(variant, **KNOBS) | values_of(variant)
    return SSLConfig(**SMALL | {"adversary": adversary} | options | values)


def a_method(variant, adversary="idaa", n=0, **values):
    config = a_config(variant, adversary, **{"augmentation": views_of(variant)} | values)
    views = recipe(config.augmentation, SIZE, MEAN, STD)
    n = n or 6 * variant.startswith("ipirm")
    about = About(views, torch.zeros(n), batch_size=config.batch_size, seed=config.seed)
    method = build_method(config, about).double().train()
    if variant.startswith("ipirm") and n == 6:
        for partition in PARTITIONS:
            method.keep(partition)
    if hasattr(method, "target"):  # as after some steps: not its network's twin
        generator = keyed_generator(7)
        for p in method.target.parameters():
            p.data += 0.05 * torch.randn(p.shape, dtype=p.dtype, generator=generator)
    return method


def noise(seed, n=B):
    return torch.randn(n, 3, SIZE, SIZE, dtype=torch.float64, generator=keyed_generator(seed))


def two_views(n=B):
    """Views of noise, with parameters as the recipe `cassle` draws them of sources of 20 × 30."""
    views, params = recipe("cassle", SIZE, MEAN, STD), []
    for seed in (5, 6):
        parameters = views.parameters(views.numbers(n, keyed_generator(seed)), (20, 30))
        parameters["color_diff"] = 0.1 * torch.randn(n, 3, generator=keyed_generator(seed, 1))
        params.append({name: value.double() for name, value in parameters.items()})
    return View(noise(3, n), params[0]), View(noise(4, n), params[1])


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(2)
    vae = VAE(8, SIZE, width=4).double().train()
    with torch.no_grad():
        for _ in range(40):
            vae(noise(5, 16))
    return vae.eval().requires_grad_(False)


def test_all_that_is_registered_is_tested():
    """FixMatch, of another stage, is in test_fixmatch.py."""
    ours = {k for k, v in METHODS.items() if v.__module__.startswith("idaa_lib")}
    assert ours == {*METHOD_NAMES, "fixmatch"}
    assert ours & SSLConfig.list_kinds("method").keys() == set(METHOD_NAMES)


# --- losses and gradients against the specification, sample by sample


class Oracle:
    """The three losses of a step by spec §2 and §4; for MoCo and BYOL by the general rule; for RSA
    by docs/spec/siblings.md §3.2 at `MOMENT`, its two views aggressive and weak alike."""

    def __init__(self, variant, method, views):
        self.contrasts = {
            "simclr": reference.nt_xent, "plain": reference.one_way, "uel": reference.spreading,
            "ipirm": reference.nt_xent,
        }  # fmt: skip
        self.method, (self.v1, self.v2) = method, (view.images for view in views)
        self.whole, (self.variant, _, kind) = variant, variant.partition("/")
        self.params, self.kind = [view.params for view in views], kind
        self.draws = MOMENT.numbers["mixup"]

    def contrast(self, z1, z2):
        return self.contrasts[self.variant](z1, z2, 0.3)

    def nce(self, q):
        k = self.unit(self.v2, target=True).detach()
        return reference.info_nce(q, k, self.method.queue, 0.3)

    def unit(self, x, adversarial=False, target=False):
        """z, L2-normalised."""
        z = self.zp(x, adversarial, target)[0]
        return z / z.norm(dim=1, keepdim=True)

    def zp(self, x, adversarial=False, target=False):
        """z and its prediction, where there is one; of any length."""
        net = self.method.target if target else self.method.network
        h = net.backbone(x, adversarial=adversarial)
        if self.kind == "cassle":  # x′ has the parameters of its view
            params = self.params[x is self.v2]
            rows = [
                reference.descriptor(params, i, ALL_KEYS, (0.4, 0.4, 0.4, 0.1)) for i in range(B)
            ]
            gamma = net.projector.gamma(torch.tensor(rows, dtype=torch.float64))
            z = net.projector.head(torch.cat([h, gamma], 1))
        else:
            z = net.projector(h)
        return z, net.predictor(z) if hasattr(net, "predictor") else None

    def both(self, p1, z1, p2, z2):
        scale = {"simsiam": 1, "byol/cassle": 2}.get(self.whole, 0.5)
        return scale * (reference.negative_cosine(p1, z2) + reference.negative_cosine(p2, z1))

    def rsa(self, p1, p2, both=True):
        """RSA's loss of predictions p₁, p₂, or its first direction alone."""
        beta = reference.rsa_beta(0.4, 3, 8)
        t1, t2 = (self.unit(v, target=True) for v in (self.v1, self.v2))
        directions = [(p1, p2, t2), (p2, p1, t1)][: 1 + both]
        d = lambda p, z: 2 + 2 * reference.negative_cosine(p, z)  # noqa: E731
        return sum(beta * d(p, q) + (1 - beta) * d(p, t) for p, q, t in directions)

    def mixed(self, x, adversarial=False):
        embed = functools.partial(self.unit, adversarial=adversarial)
        batch = torch.arange(B), PARTITIONS, self.draws
        return reference.ip_irm_mixed(embed, self.unit, x, self.v2, *batch, 0.3)

    def clean(self):
        if self.kind != "augself":
            return self.contrastive()
        net, second_network = self.method.network, self.method.network
        if self.variant == "moco":  # the second view's features are the key encoder's, held
            second_network = self.method.target
        h = net.backbone(self.v1), second_network.backbone(self.v2)
        jitter = (0.4, 0.4, 0.4, 0.1)
        return self.contrastive() + reference.augself(
            net.differences, WEIGHTS, h, self.params, jitter
        )

    def contrastive(self):
        if self.variant == "barlow":
            z1, z2 = self.zp(self.v1)[0], self.zp(self.v2)[0]
            return reference.barlow(z1, z2, 0.0051)
        if self.kind == "mixup":
            return self.mixed(self.v1)
        if self.variant == "ipirm":
            z1, z2 = self.unit(self.v1), self.unit(self.v2)
            return reference.ip_irm(z1, z2, torch.arange(B), PARTITIONS, 0.3)
        if self.variant in self.contrasts:
            return self.contrast(self.unit(self.v1), self.unit(self.v2))
        if self.variant == "moco":
            return self.nce(self.unit(self.v1))
        (z1, p1), (z2, p2) = self.zp(self.v1), self.zp(self.v2)
        if self.variant == "rsa":
            return self.rsa(p1, p2)
        if self.variant == "byol":
            z1, z2 = (self.zp(v, target=True)[0] for v in (self.v1, self.v2))
        return self.both(p1, z1, p2, z2)

    def attack(self, x):
        if self.kind == "mixup":
            mixture, *pairs = reference.mixup(x, self.draws[:, 0])
            anchor = self.unit(self.v1, True).detach()
            return reference.mixed_contrast(self.unit(mixture, True), anchor, 0.3, *pairs)[0]
        if self.variant in self.contrasts:
            return self.contrast(self.unit(self.v1, True).detach(), self.unit(x, True))
        if self.variant == "moco":
            return self.nce(self.unit(x, True))
        if self.variant == "barlow":
            return reference.barlow(self.zp(x, True)[0], self.zp(self.v2)[0].detach(), 0.0051)
        if self.variant == "rsa":
            return self.rsa(self.zp(x, True)[1], self.zp(self.v2)[1], both=False)
        aim = (
            self.unit(self.v2, target=True) if self.variant == "byol" else self.unit(self.v1, True)
        )
        return reference.negative_cosine(self.zp(x, True)[1], aim)

    def adversarial(self, x):
        if self.kind == "mixup":
            return self.mixed(x, True)
        if self.variant == "ipirm":
            z1, z2 = self.unit(x, True), self.unit(self.v2)
            return reference.ip_irm(z1, z2, torch.arange(B), PARTITIONS, 0.3)
        if self.variant in self.contrasts:
            return self.contrast(self.unit(self.v1), self.unit(x, True))
        if self.variant == "moco":
            return self.nce(self.unit(x, True))
        z, p = self.zp(x, True)
        if self.variant == "barlow":
            return reference.barlow(z, self.zp(self.v2)[0], 0.0051)
        if self.variant == "rsa":
            return self.rsa(p, self.zp(self.v2)[1])
        partner = self.v2 if self.whole in ("simsiam/imagenet", "byol", "byol/cassle") else self.v1
        z_partner, p_partner = self.zp(partner)
        if self.variant == "byol":
            z, z_partner = self.zp(x, True, target=True)[0], self.zp(partner, target=True)[0]
        return self.both(p, z, p_partner, z_partner)


@pytest.mark.parametrize("adversary", ADVERSARIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_agrees_with_its_oracle(variant, adversary, vae):
    """x′, the losses, and the gradient of their sum for every weight."""
    alpha, epsilon = 0.7, 0.4
    views = two_views()
    x = views[0].images
    method = a_method(variant, adversary)
    twin = copy.deepcopy(method)
    oracle = Oracle(variant, twin, views)
    step = method.step(views, BATCH, MOMENT)
    loss, expected = total(step.loss), oracle.clean()
    if adversary != "none":
        if adversary == "clae":
            x_adv = CLAE(epsilon=epsilon)(x, step.attack_loss).images
            x_oracle = reference.ascend_pixels(oracle.attack, x, epsilon)
        elif adversary == "idaa":
            x_adv = IDAA(vae, epsilon=epsilon)(x, step.attack_loss).images
            x_oracle = reference.ascend_latent(oracle.attack, vae, x, epsilon)
        else:
            x_adv = RandomSign(vae, epsilon=epsilon)(x, step.attack_loss, keyed_generator(9)).images
            x_oracle = reference.random_signs(vae, x, epsilon, keyed_generator(9))
        torch.testing.assert_close(x_adv, x_oracle, rtol=0, atol=1e-9)
        assert (x_adv - x).abs().max() > 0.01
        adversarial, oracle_s = total(step.adversarial_loss(x_adv)), oracle.adversarial(x_oracle)
        torch.testing.assert_close(adversarial, oracle_s)
        loss, expected = loss + alpha * adversarial, expected + alpha * oracle_s
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    count = 0
    for (name, p), q in zip(method.named_parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-9, msg=name)
            count += p.grad.abs().max() > 1e-6
    assert count > 30
    if hasattr(method, "target"):
        assert all(p.grad is None for p in method.target.parameters())
    for z in step.embeddings:
        assert not z.requires_grad
        torch.testing.assert_close(z.norm(dim=1), torch.ones(B, dtype=torch.float64))


@pytest.mark.parametrize("reuse_anchor", [True, False])
@pytest.mark.parametrize("variant", ["plain", "uel", "simsiam", "simsiam/imagenet"])
def test_reusing_the_anchor_changes_no_attack(variant, reuse_anchor, vae):
    method, views = a_method(variant), two_views()
    oracle = Oracle(variant, copy.deepcopy(method), views)
    batches = method.network.backbone.bn1_adv.num_batches_tracked
    adversary = IDAA(vae, epsilon=0.4, steps=2, reuse_anchor=reuse_anchor)
    attack = adversary(views[0].images, method.step(views, BATCH, Moment()).attack_loss)
    assert batches == (2 if reuse_anchor else 3)
    x, zeta = views[0].images, vae.encode(views[0].images)[0]
    delta = torch.zeros_like(zeta)
    for _ in range(2):  # steps of 2.5·ε/2, projected
        leaf = delta.clone().requires_grad_()
        x_adv = vae.decode(zeta + leaf) + (x - vae.decode(zeta))
        (gradient,) = torch.autograd.grad(oracle.attack(x_adv), leaf)
        delta = (delta + 2.5 * 0.4 / 2 * gradient.sign()).clamp(-0.4, 0.4)
    torch.testing.assert_close(attack.delta, delta)


def test_at_the_start_simsiam_is_attacked_and_the_others_by_their_negatives_alone(vae):
    """Spec §2, "Crucial": without a predictor a view's own embedding pulls it nowhere."""
    for variant in ("simsiam", "simsiam/imagenet"):
        step = a_method(variant).step(two_views(), BATCH, Moment())
        x = step.attacked.images.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(step.attack_loss(x, at_start=True), x)
        assert gradient.abs().max() > 1e-4
    for variant in ("plain", "uel"):
        method = a_method(variant)
        x = noise(3).requires_grad_()
        z = method.network(x, adversarial=True).z
        (gradient,) = torch.autograd.grad((z.detach() * z).sum(), x)
        assert gradient.abs().max() < 1e-10


def adversaries(vae, epsilon):
    return IDAA(vae, epsilon=epsilon), RandomSign(vae, epsilon=epsilon), CLAE(epsilon=epsilon)


@pytest.mark.parametrize("variant", VARIANTS)
def test_epsilon_0_gives_the_adversarial_loss_of_the_view_itself(variant, vae):
    for still, moving in zip(adversaries(vae, 0.0), adversaries(vae, 0.4), strict=True):
        views, method = two_views(), a_method(variant)
        oracle = Oracle(variant, copy.deepcopy(method), views)
        expected = oracle.adversarial(views[0].images)
        step = method.step(views, BATCH, MOMENT)
        attack, other = (
            adversary(step.attacked.images, step.attack_loss, keyed_generator(0))
            for adversary in (still, moving)
        )
        torch.testing.assert_close(total(step.adversarial_loss(attack.images)), expected)
        difference = total(step.adversarial_loss(other.images)) - expected
        assert difference.abs() > 1e-5, type(moving)  # so that agreement means something


def count_batches(module):
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d)
    norms = {name: part for name, part in module.named_modules() if isinstance(part, kinds)}
    return {name: part.num_batches_tracked.item() for name, part in norms.items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_of_the_backbone_s_norms_the_adversarial_ones_alone_see_the_attacked_view(variant, vae):
    for adversary in adversaries(vae, 0.1):
        method = a_method(variant)
        step = method.step(two_views(), BATCH, MOMENT)
        total(step.loss)
        before = count_batches(method)
        for name, count in before.items():
            assert (count == 0) == (name.split(".")[-1].endswith("_adv")), name
        x_adv = adversary(step.attacked.images, step.attack_loss, keyed_generator(0)).images
        passes = 1 if isinstance(adversary, RandomSign) else 2  # which looks at no loss
        total(step.adversarial_loss(x_adv))
        mixes = variant == "ipirm/mixup"  # x′ and x₂ again, in three parts
        for name, count in count_batches(method).items():
            target, backbone = name.startswith("target."), "backbone." in name
            if target and not variant.startswith("byol"):
                assert count == before[name], name  # of clean views alone
            elif backbone and name.endswith("_adv"):
                assert count == (1 if target else 5 + 2 * (passes - 1) if mixes else passes), name
            elif backbone or ".differences." in name:  # AugSelf's heads see clean views alone
                assert count == before[name] + 3 * mixes, name
            else:
                assert count > before[name], name  # a head's norms are shared


@pytest.mark.parametrize("variant", METHOD_NAMES)
def test_without_an_adversary_no_norm_has_a_twin(variant):
    assert not any("_adv" in name for name in a_method(variant, "none").state_dict())


def test_spreading_is_finite_where_a_row_is_certain_of_another():
    f = F.normalize(torch.tensor([[1.0, 0], [1, 0], [-1, 0]]), dim=1).requires_grad_()
    loss = spreading(f, -f, 0.02)
    (gradient,) = torch.autograd.grad(loss, f)
    assert loss.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("n", [2, 30])
def test_losses_of_identical_rows(n):
    z = F.normalize(torch.ones(n, 4, dtype=torch.float64), dim=1)
    step = lambda name, **kw: METHODS[name].contrast(a_method(name, "none", **kw), z, z)  # noqa: E731
    assert step("plain").item() == pytest.approx(math.log(n))
    p = 1 / (2 * n - 1)  # of every other row
    assert step("uel").item() == pytest.approx(-math.log(p) - (2 * n - 2) * math.log(1 - p))


# --- what may be recorded as a CUDA graph


def is_recorded(method, adversary):
    """Whether the loop records steps of these classes on one GPU."""
    kinds = dict(method=object.__new__(method), adversary=object.__new__(adversary))
    return Fit._recordable(SimpleNamespace(**kinds, device=torch.device("cuda"), processes=1))


@pytest.mark.parametrize("name", [n for n in (*METHOD_NAMES, "fixmatch") if n != "ipirm"])
@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_a_user_s_subclass_is_recorded_only_if_it_says_so_itself(name, adversary):
    """It may draw on the host or read values where the class above it does not."""
    ours = METHODS[name], CHOICES["adversary"][adversary]
    silent_pair, outspoken_pair = (
        [type("Own", (kind,), names) for kind in ours] for names in ({}, {"recordable": True})
    )
    assert is_recorded(*ours) and is_recorded(*outspoken_pair)
    assert not is_recorded(silent_pair[0], ours[1]) and not is_recorded(ours[0], silent_pair[1])


# --- queue and moving average


def test_the_queue_keeps_the_newest_keys_and_the_key_encoder_follows():
    method = a_method("moco", "none")
    network = method.network
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1)
    expected = list(method.queue.clone())
    targets = [p.clone() for p in method.target.parameters()]
    for i in range(4):  # of 5 keys each: round the end of 16 places
        views = View(noise(10 + i), {}), View(noise(20 + i), {})
        step = method.step(views, BATCH, Moment())
        for row, key in enumerate(step.carry["queued"]):
            expected[(5 * i + row) % QUEUE] = key
        method.after_step(step, Moment(step=i, steps=4))
        targets = [0.8 * t + 0.2 * p for t, p in zip(targets, network.parameters(), strict=True)]
    torch.testing.assert_close(method.queue, torch.stack(expected), rtol=0, atol=0)
    torch.testing.assert_close(list(method.target.parameters()), targets)
    torch.testing.assert_close(method.queue.norm(dim=1), torch.ones(QUEUE, dtype=torch.float64))
    assert method.oldest == 20 % QUEUE


def test_byol_s_target_follows_ever_more_slowly():
    """τ = 1 − (1 − τ_base)·(cos πk/K + 1)/2 (arXiv:2006.07733, §3.3)."""
    for k, total in ((0, 10), (5, 10), (9, 10)):
        method = a_method("byol", "none")
        online = list(method.network.parameters())
        before = [p.clone() for p in method.target.parameters()]
        assert len(online) > len(before)  # the predictor has no target
        method.after_step(Step(torch.tensor(0.0)), Moment(step=k, steps=total))
        tau = 1 - (1 - 0.8) * (math.cos(math.pi * k / total) + 1) / 2
        expected = [tau * t + (1 - tau) * p for t, p in zip(before, online, strict=False)]
        torch.testing.assert_close(list(method.target.parameters()), expected)
    names = [n for n, _ in method.network.named_parameters() if not n.startswith("predictor.")]
    assert names == [n for n, _ in method.target.named_parameters()]


def test_a_queue_too_short_for_a_batch_is_refused():
    with pytest.raises(ConfigError, match="queue must hold a batch of 5 keys, and is 4"):
        a_method("moco", queue=4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_seed_decides_the_initial_weights(variant):
    torch.manual_seed(9)  # the global generator has no part in it
    one, again, other = (a_method(variant, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(value, again[name]) for name, value in one.items())
    weights = [name for name in one if "weight" in name and one[name].ndim > 1]
    assert len(weights) > 20
    assert not any(torch.equal(one[name], other[name]) for name in weights)


# --- two processes


@pytest.mark.parametrize("adversary", ["none", "idaa", "random_sign", "clae"])
@pytest.mark.parametrize("variant", ["simclr", "moco"])
def test_two_processes_draw_what_one_would(variant, adversary, vae):
    """Numbers of views and of the attack, which starts at random."""
    config = a_config(variant, "none", batch_size=6)
    method = a_method(variant, "none", n=12, batch_size=6, augmentation="simclr")
    start = dict(random_start=True, norm="l2")
    attacker = {
        "none": None,
        "idaa": IDAA(vae, epsilon=0.1, **start),
        "random_sign": RandomSign(vae, epsilon=0.1),
        "clae": CLAE(epsilon=0.1, **start),
    }[adversary]

    def rows(rank, processes, step=3):
        fit = fit_of(method, config, rank, processes, attacker)
        return fit._numbers(step, {"images": 6 // processes})

    numbers, parts, next_numbers = rows(0, 1), [rows(rank, 2) for rank in (0, 1)], rows(0, 1, 4)
    names = {"none": [], "random_sign": ["signs"]}.get(adversary, ["start", "radius"])
    assert numbers.keys() == {"view 0", "view 1", *(f"attack {name}" for name in names)}
    for name, value in numbers.items():
        assert len(value.unique(dim=0)) == 6, name  # each image has its own
        assert torch.equal(torch.cat([part[name] for part in parts]), value), name
        assert not torch.equal(next_numbers[name], value), name


def a_shared_step(variant, rank, processes, wrap):
    """This rank's part of a step with IDAA: loss, gradients, and the queue after it."""
    method = a_method(variant, batch_size=6)
    for module in [*method.modules()]:  # whose statistics would be of half a batch
        for name, part in module.named_children():
            if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
    if variant == "ipirm/mixup":  # of 5 images one process embeds 3, and of 1 neither any
        method.keep(torch.tensor([0, 0, 0, 0, 1, 0]))
    inner = method.network
    method.network = wrap(inner)
    part = slice(rank * 6 // processes, (rank + 1) * 6 // processes)
    views = tuple(
        View(view.images[part], {name: value[part] for name, value in view.params.items()})
        for view in two_views(6)
    )
    moment = Moment(numbers={"mixup": DRAWS[part]})
    step = method.step(views, {"images": torch.arange(6)[part]}, moment)
    torch.manual_seed(2)
    attack = IDAA(VAE(8, SIZE, width=4).double(), epsilon=0.5)(
        step.attacked.images, step.attack_loss
    )
    loss = total(step.loss) + 0.7 * total(step.adversarial_loss(attack.images))
    loss.backward()
    method.after_step(step, Moment(step=1, steps=2))
    queue = {f"state.{k}": v for k, v in method.state_dict().items() if k in ("queue", "oldest")}
    gradients = {name: p.grad for name, p in inner.named_parameters()}
    return {"loss": loss.detach(), "delta": attack.delta} | gradients | queue


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    wrap = functools.partial(nn.parallel.DistributedDataParallel, broadcast_buffers=False)
    for i, variant in enumerate(VARIANTS):
        torch.save(a_shared_step(variant, rank, 2, wrap), f"{folder}/{i}-{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_step_like_one(tmp_path):
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    for i, variant in enumerate(VARIANTS):
        ranks = [torch.load(tmp_path / f"{i}-{rank}.pt") for rank in (0, 1)]
        one = a_shared_step(variant, 0, 1, lambda network: network)
        delta, loss = (torch.stack([r.pop(name) for r in ranks]) for name in ("delta", "loss"))
        torch.testing.assert_close(delta.flatten(0, 1), one.pop("delta"))
        torch.testing.assert_close(loss.mean(), one.pop("loss"))
        for rank in ranks:
            for name, expected in one.items():
                torch.testing.assert_close(rank[name], expected, msg=f"{variant} {name}")


# --- recipes


def build_published(variant, steps_per_epoch, **values):
    """A method, and the loop that trains it by the recipe `paper`."""
    options = values_of(variant) | {"dataset": "imagenet", "batch_size": B}
    config = SSLConfig(preset="paper", **options | values)
    method = a_method(variant, "none", n=B * steps_per_epoch)
    return method, fit_of(method, config)


def schedules(variant, epochs, steps_per_epoch):
    """The factor of the learning rate by step, for each group."""
    return build_published(variant, steps_per_epoch, epochs=epochs)[1].schedules


def rates(variant, epochs, steps_per_epoch):
    """Learning rate over the base by epoch's first step, for each group."""
    factors = schedules(variant, epochs, steps_per_epoch)
    return [[factor(steps_per_epoch * e) for e in range(epochs)] for factor in factors]


# Epochs, batch, rate, decay, optimiser, views (spec §4; MoCo and BYOL: their public CIFAR-10 code).
PUBLISHED = {
    "simclr": (300, 256, 3e-4, 0, "adam", "simclr"),
    "plain": (301, 128, 0.03, 5e-4, "sgd", "normal"),
    "uel": (301, 128, 0.03, 5e-4, "sgd", "normal"),
    "simsiam": (300, 256, 0.03, 5e-4, "sgd", "simsiam"),
    "simsiam/imagenet": (100, 256, 0.05, 1e-4, "sgd", "simsiam"),
    "moco": (200, 512, 0.06, 5e-4, "sgd", "simsiam"),
    "byol": (200, 128, 0.06, 5e-4, "sgd", "byol"),
    "rsa": (200, 256, 0.1, 5e-4, "sgd", "rsa"),
    "ipirm": (400, 256, 1e-3, 1e-6, "adam", "ipirm"),
    "barlow": (200, 128, 0.06, 5e-4, "sgd", "simclr"),
    "ipirm/mixup": (400, 256, 1e-3, 1e-6, "adam", "ipirm"),
}


@pytest.mark.parametrize("variant", PUBLISHED)
def test_the_loop_trains_as_published(variant):
    epochs, batch, rate, decay, optimizer, views = PUBLISHED[variant]
    config = SSLConfig(preset="paper", dataset="imagenet", **values_of(variant))
    assert (config.epochs, config.batch_size, config.learning_rate) == (epochs, batch, rate)
    assert (config.optimizer, config.augmentation) == (optimizer, views)
    method, fit = build_published(variant, 5, batch_size=batch)
    groups = fit.optimizer.param_groups
    assert all(group["weight_decay"] == decay for group in groups)
    fit._numbers = lambda *place: {}
    fit._work = lambda *inputs: (Step(torch.zeros(())), {})
    method.after_step = lambda *inputs: None
    for step in (0, 7, 5 * epochs // 2, 5 * epochs - 1):
        fit.train_step(step, {}, {})
        expected = [rate * schedule(step) for schedule in fit.schedules]
        if variant == "barlow":  # biases and norms (the paper, §3)
            expected[1] *= 0.024
        assert [group["lr"] for group in groups] == pytest.approx(expected)


@pytest.mark.parametrize("variant", ["plain", "uel"])
def test_plain_s_rate_falls_at_the_published_epochs(variant):
    (factors,) = rates(variant, 301, 390)
    expected = [1.0] * 120 + [0.1] * 40 + [0.05] * 40 + [0.01] * 101
    assert factors == expected
    (curve,) = rates(variant, 151, 3)
    assert (curve.index(0.1), curve.index(0.05), curve.index(0.01)) == (61, 81, 101)


def test_simsiam_warms_up_and_its_predictor_keeps_its_rate():
    body, predictor = rates("simsiam", 300, 7)
    assert body[:11] == pytest.approx([e / 10 for e in range(11)])
    cosine = [(1 + math.cos(math.pi * (e - 10) / 290)) / 2 for e in range(10, 300)]
    assert body[10:] == pytest.approx(cosine)
    assert predictor == [1.0] * 300
    schedule, constant_schedule = schedules("simsiam", 300, 7)
    assert constant_schedule(7 * 150 + 3) == 1
    assert schedule(7 * 150 + 3) == pytest.approx((1 + math.cos(math.pi * (980 + 3) / 2030)) / 2)
    assert schedule(0) == 0.0
    short_schedule, _ = schedules("simsiam", 3, 7)
    assert short_schedule(0) == 1.0  # no warm-up that outlives the training
    long_factor = build_schedule("constant", 60, 7, warmup=50)
    assert [long_factor(7 * epoch) for epoch in (25, 50)] == [0.5, 1.0]


@pytest.mark.parametrize("variant", ["moco", "byol", "rsa", "simsiam/imagenet"])
def test_a_cosine_by_epoch(variant):
    (factors,) = rates(variant, 20, 5)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    for rate in factors:
        assert rate == pytest.approx(cosine.get_last_lr()[0])
        optimizer.step()
        cosine.step()


@pytest.mark.parametrize("variant", [v for v in PUBLISHED if not v.startswith(("simclr", "ipirm"))])
def test_the_optimiser_is_sgd_with_momentum_and_decay_of_every_parameter(variant):
    method, fit = build_published(variant, 5, weight_decay=0.3, learning_rate=0.1)
    optimizer, groups = fit.optimizer, fit.optimizer.param_groups
    every = [p for g in groups for p in g["params"]]
    assert {id(p) for p in every} == {id(p) for p in method.network.parameters()}
    assert len(every) == len(list(method.network.parameters()))
    assert all(g["weight_decay"] == 0.3 for g in groups)
    start = every[0].detach().clone()
    velocity, p = torch.zeros_like(start), start.clone()
    for _ in range(3):
        for q in every:
            q.grad = torch.ones_like(q)
        optimizer.step()
        velocity = 0.9 * velocity + (1 + 0.3 * p)
        p = p - 0.1 * velocity
    torch.testing.assert_close(every[0].detach(), p)


def test_heads_are_the_papers():
    """Layers at full width (spec §4): [2048]-BN-ReLU-[2048]-BN and its kin."""

    def layers(module):
        parts = []
        for part in module.modules():
            if isinstance(part, nn.Linear):
                parts.append((part.in_features, part.out_features, part.bias is not None))
            elif isinstance(part, nn.BatchNorm1d):
                parts.append("BN" if part.affine else "BN without affine")
            elif isinstance(part, nn.ReLU):
                parts.append("ReLU")
        return parts

    def heads(**values):
        config = SSLConfig(preset="paper", **values)
        network = build_method(config, About(recipe(config.augmentation, 32, MEAN, STD))).network
        return layers(network.projector), layers(getattr(network, "predictor", nn.Identity()))

    layer, head = (2048, 2048, True), [(2048, 512, True), "BN", "ReLU", (512, 2048, True)]
    assert heads(method="simsiam") == (
        [(512, 2048, True), "BN", "ReLU", layer, "BN"], head,
    )  # fmt: skip
    imagenet = dict(pairing="imagenet", dataset="imagenet", backbone="resnet50", stem="imagenet")
    # facebookresearch/simsiam, simsiam/builder.py: no bias before a BatchNorm.
    assert heads(method="simsiam", **imagenet) == (
        [*[(2048, 2048, False), "BN", "ReLU"] * 2, layer, "BN without affine"],
        [(2048, 512, False), *head[1:]],
    )
    assert heads(method="plain") == heads(method="uel") == ([(512, 128, True)], [])
    assert heads(method="moco") == ([(512, 512, True), "ReLU", (512, 128, True)], [])
    assert heads(method="byol") == (
        [(512, 1024, True), "BN", "ReLU", (1024, 256, True)],
        [(256, 1024, True), "BN", "ReLU", (1024, 256, True)],
    )
    assert heads(method="ipirm") == (
        [(2048, 512, False), "BN", "ReLU", (512, 128, True)], [],
    )  # fmt: skip
    # docs/spec/siblings.md §3.2: hidden and out 1024 and 128, of a ResNet-50 4096 and 256.
    assert heads(method="rsa") == (
        [(512, 1024, True), "BN", "ReLU", (1024, 128, False)],
        [(128, 1024, True), "BN", "ReLU", (1024, 128, False)],
    )
    assert heads(method="rsa", backbone="resnet50", projection_dim=256) == (
        [(2048, 4096, True), "BN", "ReLU", (4096, 256, False)],
        [(256, 4096, True), "BN", "ReLU", (4096, 256, False)],
    )


@pytest.mark.parametrize(
    ("backbone", "depths", "last"),
    [("resnet18", (2, 2, 2, 2), "bn2"), ("resnet50", (3, 4, 6, 3), "bn3")],
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_simsiam_s_imagenet_pairing_rsa_and_augself_s_heads_alone_start_residual_branches_at_0(
    variant, backbone, depths, last
):
    weights = {
        name: part.weight
        for name, part in a_method(variant, backbone=backbone).network.named_modules()
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d) and part.affine
    }
    ends = {
        f"backbone.layer{stage}.{block}.{last}{twin}"
        for stage, depth in enumerate(depths, 1)
        for block in range(depth)
        for twin in ("", "_adv")
    }
    assert ends < weights.keys()
    zero = ends if variant in ("simsiam/imagenet", "rsa", *CASSLE, *AUGSELF) else set()
    for name, weight in weights.items():
        assert torch.equal(weight, torch.full_like(weight, float(name not in zero))), name


def test_recipes_go_over_the_preset_and_under_what_is_given(monkeypatch):
    paper = SSLConfig(preset="paper", method="plain")
    assert (paper.epochs, paper.batch_size, paper.learning_rate) == (301, 128, 0.03)
    assert (paper.augmentation, paper.temperature, paper.projection_dim) == ("normal", 0.1, 128)
    assert (paper.weight_decay, paper.split) == (5e-4, "trainval")
    assert not hasattr(paper, "reuse_anchor")  # there is nothing to anchor
    assert not paper.replace(adversary="clae").reuse_anchor
    assert SSLConfig(preset="cifar10", method="plain", adversary="clae").reuse_anchor
    assert not paper.list_changes()
    cifar_config = SSLConfig(preset="cifar10", method="plain", learning_rate=0.01, epochs=7)
    assert cifar_config.list_changes() == {"learning_rate": 0.01, "epochs": 7}
    assert SSLConfig(preset="cifar10", method="moco").epochs == 100
    demo, plain_config = SSLConfig(method="moco"), SSLConfig()
    assert (demo.epochs, demo.batch_size) == (plain_config.epochs, plain_config.batch_size)
    options = dict(preset="paper", method="simsiam", pairing="imagenet", dataset="imagenet")
    imagenet = SSLConfig(**options)
    assert (imagenet.learning_rate, imagenet.weight_decay) == (0.05, 1e-4)
    assert (imagenet.backbone, imagenet.stem, imagenet.size) == ("resnet50", "imagenet", 224)
    assert (imagenet.epochs, imagenet.batch_size) == (100, 256)
    assert SSLConfig(**options, size=64, backbone="resnet18").list_changes()["size"] == 64
    with pytest.raises(ConfigError, match="dataset must be given at size=224"):
        SSLConfig(**{k: v for k, v in options.items() if k != "dataset"})
    cifar = SSLConfig(preset="cifar10", method="simsiam", pairing="imagenet")
    assert (cifar.backbone, cifar.stem, cifar.size) == ("resnet18", "cifar", 32)
    # Linear scaling, lr·B/256 (spec §4), where the rate is not given.
    for values, base in ((dict(preset="paper", method="simsiam"), 0.03), (options, 0.05)):
        scaled_config = SSLConfig(**values, batch_size=512)
        assert scaled_config.learning_rate == pytest.approx(2 * base)
        assert SSLConfig(**dict(scaled_config) | {"learning_rate": 0.07}).learning_rate == 0.07
    attack = options | {"adversary": "idaa"}
    assert SSLConfig(**attack).epsilon == 0.01 and SSLConfig(**attack, epsilon=1).epsilon == 1
    assert SSLConfig(**attack | {"adversary": "clae"}).epsilon == 0.03

    class Mine(METHODS["simclr"]):
        class Options(METHODS["simclr"].Options):
            queue: int = 1

    monkeypatch.setitem(METHODS, "mine", Mine)
    own_config = SSLConfig(preset="paper", method="mine", queue=7)
    assert own_config.list_changes() == {"queue": 7}
    assert own_config.learning_rate == SSLConfig(preset="paper").learning_rate


def test_knobs_of_another_choice_are_refused_and_say_whose_they_are():
    """By the registry: each knob of any method or adversary, with all that do not have it."""
    kinds = {choice: SSLConfig.list_kinds(choice) for choice in SSLConfig.choices}
    knobs_by_choice = {choice: set() for choice in kinds}
    for row in SSLConfig.fields():
        if row["of"] != "all":
            knobs_by_choice[row["of"].partition(" = ")[0]].add(row["name"])
    assert {"queue", "momentum", "pairing", "temperature"} <= knobs_by_choice["method"]
    assert {"epsilon", "reuse_anchor", "vae", "alpha"} <= knobs_by_choice["adversary"]
    for choice, knobs in knobs_by_choice.items():
        for knob in knobs:
            owners = [k for k, v in kinds[choice].items() if knob in v.Options.model_fields]
            prefix = f"{knob} is a knob of {choice}={' or '.join(map(repr, owners))}, and {choice}"
            value = kinds[choice][owners[0]].Options.model_fields[knob].default or "some"
            for other in kinds[choice].keys() - set(owners):
                with pytest.raises(ConfigError, match=f"{prefix} is {other!r}: leave it out"):
                    SSLConfig(**{choice: other, knob: value})
    for values, words in (
        (dict(method="moco", queue=0), "queue must be greater than 0"),
        (dict(method="simclr", temperature="hot"), "temperature must be a number"),
        (dict(method="byol", momentum=2), "momentum must be less than or equal to 1"),
        (dict(method="simsiam", pairing="both"), "pairing must be 'cifar' or 'imagenet'"),
    ):
        with pytest.raises(ConfigError, match=words):
            SSLConfig(**values)


def test_fields_that_came_later_leave_simclr_s_identity_as_it_was():
    names = {"weight_decay", "pairing", "queue", "momentum"}
    assert not names & SSLConfig().identity().keys()
    assert SSLConfig(weight_decay=1e-4).identity()["weight_decay"] == 1e-4
    assert SSLConfig(method="simsiam", pairing="imagenet").identity()["pairing"] == "imagenet"


# --- runs

TINY = dict(size=SIZE, width=4, limit=16, batch_size=8, epochs=2, device="cpu", log_every=1)


@pytest.fixture(scope="module")
def vae_run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IDAA_OUTPUTS", str(tmp_path_factory.mktemp("outputs")))
        yield train_vae(VAEConfig(**TINY | {"limit": 256, "batch_size": 32, "epochs": 4}, dim=8))


@pytest.fixture
def shallow(monkeypatch):
    """The name of a ResNet with one block a stage: half the time, and it learns in fewer steps."""
    monkeypatch.setitem(BACKBONES, "resnet10", functools.partial(ResNet, (1, 1, 1, 1)))
    return "resnet10"


def attacked_by(adversary, vae_run):
    """The values of a configuration that name an adversary, and its VAE if it needs one."""
    needs = adversary in ("idaa", "random_sign")
    return {"adversary": adversary} | ({"vae": str(vae_run.path)} if needs else {})


@pytest.mark.parametrize("adversary", ADVERSARIES)
@pytest.mark.parametrize(
    "variant", [*METHOD_NAMES[1:], "simsiam/imagenet", "simclr/cassle", "moco/augself"]
)
def test_an_interrupted_run_ends_bit_for_bit_like_one_that_was_not(
    outputs, monkeypatch, vae_run, shallow, variant, adversary
):
    """SimCLR's are in test_train.py."""
    options = knobs_of(variant, queue=16, projection_dim=8, momentum=0.9)
    if variant in CASSLE + AUGSELF:
        options["augmentation"] = "cassle"
    config = SSLConfig(
        **TINY, **values_of(variant), **options, **attacked_by(adversary, vae_run), backbone=shallow
    )
    expected, outcome = whole_and_resumed(train_ssl, config, monkeypatch, 3, 4)
    assert expected[0].keys() == outcome[0].keys()
    assert all(torch.equal(expected[0][k], outcome[0][k]) for k in expected[0])
    assert expected[1:] == outcome[1:]
    names = {"moco": ("queue", "oldest", "target."), "byol": ("target.",), "rsa": ("target.",)}.get(
        variant, ()
    )
    for name in names:
        assert any(key.startswith(f"method.{name}") for key in expected[0])


# What learns in a few dozen steps: views that are crops alone, and these rates.
LEARNS = {
    "simclr": dict(learning_rate=0.003, epochs=2),
    "plain": dict(learning_rate=0.03, epochs=2),
    "uel": dict(learning_rate=0.03, epochs=2),
    "simsiam": dict(learning_rate=0.05, epochs=5, projection_dim=128),
    "simsiam/imagenet": dict(learning_rate=0.05, epochs=5, projection_dim=128),
    "moco": dict(learning_rate=0.03, epochs=3),
    "byol": dict(learning_rate=0.2, epochs=5, projection_dim=64, momentum=0.98),
    "ipirm": dict(learning_rate=0.003, epochs=2),
    "ipirm/mixup": dict(learning_rate=0.003, epochs=2),
    "rsa": dict(learning_rate=0.02, epochs=10, projection_dim=64, momentum=0.9),
    "barlow": dict(learning_rate=0.05, epochs=15),
    "simclr/cassle": dict(learning_rate=0.003, epochs=3),
    "moco/augself": dict(learning_rate=0.03, epochs=3),
    # The seed: what encoder 0 starts with is worth as much as it learns, on some processors.
    "simsiam/augself": dict(learning_rate=0.1, epochs=12, projection_dim=128, seed=1),
}


def knn_top1(encoder, limit=1000):
    """Backbone features of 500 photographs' crops against those of `limit` others, percent."""
    bank, queries = (load("photos", split, encoder.size, limit) for split in ("train", "val"))
    of = [features(encoder.module, s.images, *encoder[1:]) for s in (bank, queries)]
    guess = knn(of[0], bank.labels, of[1], classes=len(bank.classes), k=50)
    return 100 * (guess == queries.labels).double().mean().item()


@pytest.mark.parametrize(
    ("variant", "adversary"),
    # Each method alone; under IDAA one of each kind of loss. That an attack's loss and gradient are
    # right for all others is compared with the oracles above.
    [
        *product(LEARNS, ("none",)),
        *product(("simclr", "uel", "moco", "byol"), ("idaa",)),
        *product(("simclr",), ("clae", "random_sign")),
    ],
)
def test_training_lowers_the_loss_and_lifts_knn(
    outputs, monkeypatch, vae_run, shallow, variant, adversary
):
    photometry = {"gray": 0.2} if variant == "rsa" else {}  # which needs photometry
    if variant in CASSLE + AUGSELF:
        photometry = {"gray": 0.1, "blur": 0.1, "jitter": (0.1,) * 4, "jitter_probability": 0.5}
    monkeypatch.setitem(RECIPES, "simclr", {"crop_scale": (0.3, 1.0), "flip": 0.5} | photometry)
    values = dict(size=SIZE, width=8, backbone=shallow, limit=512, batch_size=32, device="cpu")
    values |= dict(log_every=1, knn_every=9, checkpoint_every=9, augmentation="simclr")
    values |= knobs_of(variant, projection_dim=32, queue=64) | attacked_by(adversary, vae_run)
    config = SSLConfig(**values | values_of(variant) | LEARNS[variant])
    run = train_ssl(config)
    losses = [line["loss"] for line in run.metrics() if "loss" in line]
    # MoCo's queue is full of its own keys after two steps.
    assert sum(losses[-6:]) / 6 < sum(losses[2:8]) / 6 - 0.1
    start, end = knn_top1(random_encoder(run)), knn_top1(load_encoder(run))
    assert end > start + 3


@pytest.mark.parametrize(
    ("method", "knn_layer", "linear_layer", "of", "tau"),
    [
        ("simclr", "projected z", "backbone features", "SimCLR", "0.5"),
        ("uel", "projected z", "projected z", "Plain and UEL", "0.1"),
        ("simsiam", "backbone features", "backbone features", "SimSiam", "0.5"),
        ("byol", "backbone features", "backbone features", "SimSiam", "0.5"),
    ],
)
def test_the_official_protocol_is_the_method_s(
    outputs, monkeypatch, shallow, method, knn_layer, linear_layer, of, tau
):
    probes = []
    stage = importlib.import_module("idaa_lib.evaluate.stage")
    official_probe = stage.official_probe

    def probe(*sets, **how):
        probes.append(how)
        return official_probe(*sets, **how, epochs=1)

    monkeypatch.setattr(stage, "official_probe", probe)
    options = knobs_of(method, projection_dim=8, queue=16)
    run = train_ssl(SSLConfig(**TINY, method=method, backbone=shallow, **options))
    config = EvalConfig(run=run.id, limit=60, protocol="official", temperature=0.7, device="cpu")
    summary = evaluate(config).summary
    bank = "(bank without the release's fault)"
    assert summary["knn_protocol"].startswith(f"official of {of} {bank}: {knn_layer}, k=")
    assert f"τ={tau}," in summary["knn_protocol"]
    assert summary["linear_protocol"].startswith(f"official of {of}: {linear_layer}, Adam")
    assert summary["pixels_linear_protocol"].startswith(f"official of {of}: raw pixels, Adam")
    assert [how["batch_size"] for how in probes] == [128 if method == "uel" else 256] * 3
    assert config == EvalConfig(run=run.id, limit=60, protocol="official", device="cpu")

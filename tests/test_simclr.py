"""SimCLR: its loss, its step with IDAA and CLAE against the official order of work, its schedule,
and two processes against one."""

import copy
import functools
import gc
import math

import pytest
import reference
import torch
import torch.distributed as dist
from conftest import fit_of, views_of
from torch import nn
from torch.nn import functional as F

from idaa_lib.adversaries import CLAE, IDAA, RandomSign
from idaa_lib.configs import ConfigError, SSLConfig
from idaa_lib.methods import About, Moment, build_method
from idaa_lib.methods.simclr import nt_xent
from idaa_lib.nets.heads import Embedding
from idaa_lib.nets.processes import gather
from idaa_lib.nets.vae import VAE
from idaa_lib.views import View, keyed_generator, recipe

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
B, SIZE, TEMPERATURE = 6, 16, 0.5


def simclr(n=0, batch_size=B, **values):
    options = dict(adversary="idaa", width=4, projection_dim=8, temperature=TEMPERATURE)
    config = SSLConfig(**options | values)
    about = About(
        recipe("simclr", SIZE, MEAN, STD), torch.zeros(n), batch_size=batch_size, seed=config.seed
    )
    return build_method(config, about).double().train()


class Projected(nn.Module):
    """A network as the oracles call one: images → z."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images, adversarial=False):
        return self.network(images, adversarial=adversarial).z


def a_vae():
    """In train mode, with statistics from noise images."""
    torch.manual_seed(2)
    vae = VAE(8, SIZE, width=4).double().train()
    for part in vae.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = 1.0
    with torch.no_grad():
        vae(torch.randn(16, 3, SIZE, SIZE, dtype=torch.float64))
    return vae


def two_views(seed=3, n=B):
    generator = keyed_generator(seed)
    draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    return tuple(View(draw(n, 3, SIZE, SIZE), {}) for _ in range(2))


def sphere(n, dim, seed=0):
    raw = torch.randn(2, n, dim, dtype=torch.float64, generator=keyed_generator(seed))
    return F.normalize(raw, dim=2)


# --- the loss


@pytest.mark.parametrize("temperature", [0.05, 0.5, 2.0])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_nt_xent_agrees_with_naive_loops(n, temperature):
    raw = torch.randn(2, n, 5, dtype=torch.float64, generator=keyed_generator(n))
    values = []
    for loss in (nt_xent, reference.nt_xent):
        leaf = raw.clone().requires_grad_()
        value = loss(*F.normalize(leaf, dim=2), temperature)
        values.append((value.detach(), *torch.autograd.grad(value, leaf)))
    (value, gradient), (oracle, oracle_gradient) = values
    torch.testing.assert_close(value, oracle)
    torch.testing.assert_close(gradient, oracle_gradient)


@pytest.mark.parametrize("n", [1, 2, 50])
def test_nt_xent_of_identical_rows(n):
    z = F.normalize(torch.ones(n, 4, dtype=torch.float64), dim=1)
    assert nt_xent(z, z, 0.1).item() == pytest.approx(math.log(2 * n - 1))


def test_nt_xent_is_symmetric_and_blind_to_order_and_rotation():
    z1, z2 = sphere(6, 4)
    value = nt_xent(z1, z2, 0.3)
    order = torch.randperm(6, generator=keyed_generator(1))
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    torch.testing.assert_close(nt_xent(z2, z1, 0.3), value)
    torch.testing.assert_close(nt_xent(z1[order], z2[order], 0.3), value)
    torch.testing.assert_close(nt_xent(z1 @ rotation, z2 @ rotation, 0.3), value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nt_xent_is_fp32_inside_autocast(dtype):
    z1, z2 = sphere(32, 64).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert (z1 @ z2.T).dtype == torch.bfloat16  # autocast is at work
        value = nt_xent(z1, z2, 0.05)
    assert value.dtype == torch.float32
    oracle = nt_xent(z1.double(), z2.double(), 0.05)
    torch.testing.assert_close(value.double(), oracle, rtol=1e-6, atol=1e-6)


# --- the step


def steps(adversary, epsilon, network, vae, **knobs):
    """The library's adversary and the oracle's attack, bound to copies of their own."""
    if adversary == "clae":
        attack = functools.partial(
            reference.clae, network, epsilon=epsilon, temperature=TEMPERATURE
        )
        return CLAE(epsilon=epsilon, **knobs), attack
    twin = copy.deepcopy(vae)
    attack = functools.partial(
        reference.idaa, network, twin, epsilon=epsilon, temperature=TEMPERATURE
    )
    return IDAA(vae, epsilon=epsilon, **knobs), attack


@pytest.mark.parametrize("reuse_anchor", [True, False])
@pytest.mark.parametrize("alpha", [1.0, 0.3])
@pytest.mark.parametrize("kind", ["idaa", "clae"])
def test_a_step_agrees_with_the_official_order_of_work(kind, alpha, reuse_anchor):
    method, views, vae = simclr(adversary=kind), two_views(), a_vae()
    network = copy.deepcopy(method.network)
    oracle_network = Projected(network)
    adversary, attack = steps(kind, 0.5, oracle_network, vae, reuse_anchor=reuse_anchor)
    oracle, x_adv = reference.simclr_step(
        oracle_network, views[0].images, views[1].images, attack, alpha, TEMPERATURE
    )

    step = method.step(views, {}, Moment())
    result = adversary(step.attacked.images, step.attack_loss)
    loss = step.loss + alpha * step.adversarial_loss(result.images)
    loss.backward()
    torch.testing.assert_close(result.images, x_adv, rtol=0, atol=1e-10)
    torch.testing.assert_close(loss.detach(), oracle)
    for (name, p), q in zip(method.network.named_parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-9, msg=name)
    assert all(p.grad is None for p in vae.parameters())

    # The running statistics, too, are the official code's, where a step sees them as often.
    for (name, ours), theirs in zip(method.network.named_buffers(), network.buffers(), strict=True):
        if "_adv." not in name or not reuse_anchor:
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12, msg=name)


def test_without_adversary_the_loss_is_nt_xent_of_the_views():
    method, views = simclr(adversary="none"), two_views()
    assert not any("_adv" in name for name in method.state_dict())
    twin = Projected(copy.deepcopy(method.network))
    oracle = reference.nt_xent(twin(views[0].images), twin(views[1].images), TEMPERATURE)
    torch.testing.assert_close(method.step(views, {}, Moment()).loss, oracle)


@pytest.mark.parametrize("kind", [IDAA, CLAE])
def test_reusing_the_anchor_changes_no_direction(kind):
    views, vae, units = two_views(), a_vae(), []
    for reuse_anchor in (True, False):
        step = simclr().step(views, {}, Moment())
        adversary = CLAE if kind is CLAE else functools.partial(IDAA, vae)
        adversary = adversary(0.1, reuse_anchor=reuse_anchor)
        units.append(adversary.direction(step.attacked.images, step.attack_loss).unit)
    assert torch.equal(*units)
    assert units[0].any()


@pytest.mark.parametrize("random_start", [False, True])
def test_reusing_the_anchor_changes_no_attack_of_several_steps(random_start):
    views, vae, attacks = two_views(), a_vae(), []
    for reuse_anchor in (True, False):
        step = simclr().step(views, {}, Moment())
        adversary = IDAA(
            vae, epsilon=0.5, steps=3, random_start=random_start, reuse_anchor=reuse_anchor
        )
        x = step.attacked.images
        attacks.append(adversary(x, step.attack_loss, generator=keyed_generator(1)))
    torch.testing.assert_close(attacks[0].images, attacks[1].images, rtol=0, atol=1e-9)


@pytest.mark.parametrize("reuse_anchor", [True, False])
def test_positive_pair_gives_no_gradient_at_the_start(reuse_anchor):
    """Anchor and start are the same view, so only the negatives move x′ (spec §2)."""
    method, views = simclr(), two_views()
    step = method.step(views, {}, Moment())
    x = step.attacked.images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(step.attack_loss(x, at_start=reuse_anchor), x)
    network = Projected(copy.deepcopy(method.network))
    anchor = network(step.attacked.images, adversarial=True).detach()
    z = network(x, adversarial=True)
    (positive_gradient,) = torch.autograd.grad((anchor * z).sum(), x, retain_graph=True)
    assert positive_gradient.abs().max() < 1e-10 < 1e-6 < gradient.abs().max()
    rows = torch.cat([anchor, z])
    losses = (rows @ rows.T / TEMPERATURE).fill_diagonal_(-torch.inf).logsumexp(1).mean()
    (negatives,) = torch.autograd.grad(losses, x)
    torch.testing.assert_close(gradient, negatives, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize(
    ("adversary", "reuse_anchor", "adversarial"),
    [(IDAA, False, 3), (IDAA, True, 2), (CLAE, False, 3), (CLAE, True, 2), (RandomSign, True, 1)],
)
def test_statistics_updates_per_step(adversary, reuse_anchor, adversarial):
    method = simclr()
    step = method.step(two_views(), {}, Moment())
    anchor = {} if adversary is RandomSign else {"reuse_anchor": reuse_anchor}
    attack = adversary(*[] if adversary is CLAE else [a_vae()], epsilon=0.1, **anchor)
    step.adversarial_loss(attack(step.attacked.images, step.attack_loss).images).backward()
    counts = {
        name: tensor.item()
        for name, tensor in method.named_buffers()
        if name.endswith("num_batches_tracked")
    }
    assert counts == {name: adversarial if "_adv." in name else 2 for name in counts}


def test_the_attack_moves_nothing_but_x():
    """No gradient reaches the anchor, the second view, or the weights through the attack."""
    method, views = simclr(), two_views()
    step = method.step(views, {}, Moment())
    IDAA(a_vae(), epsilon=0.1)(step.attacked.images, step.attack_loss)
    assert all(p.grad is None for p in method.parameters())
    assert step.attacked is views[0]
    assert not any(z.requires_grad for z in step.embeddings)
    for z in step.embeddings:
        torch.testing.assert_close(z.norm(dim=1), torch.ones(B, dtype=torch.float64))


def test_projector_is_the_paper_s():
    network = simclr(projection_dim=5).network
    assert [p.shape for p in network.projector.parameters()] == [(32, 32), (32,), (5, 32), (5,)]
    x = two_views()[0].images
    h = network.eval().backbone(x)
    weights = network.projector.state_dict()
    z = (h @ weights["0.weight"].T + weights["0.bias"]).relu()
    z = z @ weights["2.weight"].T + weights["2.bias"]
    torch.testing.assert_close(network(x).z, z / z.norm(dim=1, keepdim=True))


# --- schedule, optimiser, batches, views


def paper_schedule(epochs, steps_per_epoch):
    """The learning rate by step, as the loop has it by the recipe `paper`."""
    config = SSLConfig(preset="paper", epochs=epochs)
    method = simclr(n=config.batch_size * steps_per_epoch, batch_size=config.batch_size)
    (factor,) = fit_of(method, config).schedules
    return lambda step: config.learning_rate * factor(step)


@pytest.mark.parametrize(("epochs", "steps_per_epoch"), [(300, 195), (20, 1)])
def test_learning_rate_is_the_official_schedule(epochs, steps_per_epoch):
    schedule = paper_schedule(epochs, steps_per_epoch)
    rates = reference.simclr_rates(epochs)
    for epoch, rate in enumerate(rates):
        for step in (epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch - 1):
            assert schedule(step) == pytest.approx(rate)


@pytest.mark.parametrize(
    ("epoch", "rate"), [(0, 3e-4), (11, 3e-4), (12, 2.99992e-4), (299, 1.183e-6)]
)
def test_learning_rate_at_published_epochs(epoch, rate):
    assert paper_schedule(300, 195)(195 * epoch) == pytest.approx(rate, rel=5e-4, abs=2e-9)


def test_optimiser_is_adam_over_every_parameter_without_decay():
    method, config = simclr(n=256), SSLConfig(preset="paper", learning_rate=1e-3)
    twin = copy.deepcopy(method)
    ours = fit_of(method, config).optimizer
    (group,) = ours.param_groups
    assert [p.shape for p in group["params"]] == [p.shape for p in method.parameters()]
    assert group["weight_decay"] == 0
    theirs = torch.optim.Adam(twin.parameters(), lr=1e-3, foreach=False)
    views = two_views()
    for _ in range(2):
        for one, optimizer in ((method, ours), (twin, theirs)):
            optimizer.zero_grad()
            one.step(views, {}, Moment()).loss.backward()
            optimizer.step()
    for p, q in zip(method.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9)


def epoch_of(n, batch_size, seed, epoch):
    method = simclr(n, batch_size, seed=seed)
    batches = torch.stack([b["images"] for b in method.batches(epoch)])
    assert batches.shape == (method.steps_per_epoch(), method.images_per_step())
    return batches


def test_batches_are_permutations_keyed_by_seed_and_epoch():
    first = epoch_of(103, 10, 0, 0)
    assert first.shape == (10, 10)
    assert first.dtype == torch.int64
    assert len(first.unique()) == 100
    assert first.min() >= 0 and first.max() <= 102
    assert sorted(epoch_of(100, 10, 0, 0).flatten().tolist()) == list(range(100))
    torch.manual_seed(99)  # the global generator has no part in it
    assert torch.equal(first, epoch_of(103, 10, 0, 0))
    assert not torch.equal(first, epoch_of(103, 10, 0, 1))
    assert not torch.equal(first, epoch_of(103, 10, 1, 0))


def test_views_differ_and_two_ranks_draw_what_one_process_draws():
    method = simclr(n=B)
    images = torch.randint(256, (6, 3, 20, 20), dtype=torch.uint8, generator=keyed_generator(0))
    views = views_of(method, 0, 1, {"images": images})
    assert len(views) == 2
    assert not torch.allclose(views[0].images, views[1].images)
    parts = [views_of(method, rank, 2, {"images": images.chunk(2)[rank]}) for rank in (0, 1)]
    for k in (0, 1):
        for name, value in views[k].params.items():
            assert torch.equal(torch.cat([part[k].params[name] for part in parts]), value)
        torch.testing.assert_close(torch.cat([part[k].images for part in parts]), views[k].images)


def test_unknown_method_is_refused():
    with pytest.raises(ConfigError, match=r"method must be one of .*simclr.*, and is 'simclrr'"):
        SSLConfig(method="simclrr")


# --- two processes


class Plain(nn.Module):
    """An embedder without BatchNorm: the same on a half of a batch."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3 * SIZE**2, 16), nn.Linear(16, 8)

    def forward(self, images, condition=None, adversarial=False):
        h = self.first(images.flatten(1)).tanh()
        return Embedding(h, F.normalize(self.last(h), dim=1))


def a_step(rank, processes, wrap, reuse_anchor):
    """This rank's part of a step of SimCLR + IDAA: loss, δ, and the parameters' gradients."""
    torch.manual_seed(0)
    network = Plain().double()
    method = simclr()
    method.network = wrap(network)
    part = slice(rank * B // processes, (rank + 1) * B // processes)
    views = tuple(View(view.images[part], {}) for view in two_views())
    step = method.step(views, {}, Moment())
    attack = IDAA(a_vae(), epsilon=0.5, reuse_anchor=reuse_anchor)(
        step.attacked.images, step.attack_loss
    )
    loss = step.loss + 0.7 * step.adversarial_loss(attack.images)
    loss.backward()
    return {
        "loss": loss.detach(),
        "delta": attack.delta,
        "embeddings": step.embeddings[0].detach(),  # else its graph outlives the process group
        **{name: p.grad for name, p in network.named_parameters()},
    }


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    wrap = functools.partial(nn.parallel.DistributedDataParallel, broadcast_buffers=False)
    for reuse_anchor in (True, False):
        tensors = a_step(rank, 2, wrap, reuse_anchor)
        torch.save(tensors, f"{folder}/{reuse_anchor}-{rank}.pt")
    gc.collect()  # a wrapped network in a cycle would hold the group past its end
    dist.barrier()  # neither leaves while the other still talks to it
    dist.destroy_process_group()


def test_two_processes_step_like_one(tmp_path):
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    for reuse_anchor in (True, False):
        ranks = [torch.load(tmp_path / f"{reuse_anchor}-{rank}.pt") for rank in (0, 1)]
        one = a_step(0, 1, lambda network: network, reuse_anchor)
        assert torch.equal(torch.cat([r["delta"] for r in ranks]).sign(), one["delta"].sign())
        halves = torch.cat([rank["embeddings"] for rank in ranks])
        torch.testing.assert_close(halves, one["embeddings"])
        for rank in ranks:
            for name in one.keys() - {"delta", "embeddings"}:
                torch.testing.assert_close(rank[name], one[name], msg=name)


def test_one_process_gathers_nothing():
    z = torch.randn(3, 2)
    assert gather(z) is z

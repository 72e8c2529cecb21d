"""Information, bounds and identity: closed forms, naive loops, quadrature; and the study of 08."""

import dataclasses
import itertools
import json
import math
import re
import shlex
import statistics

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch.nn import functional as F

from idaa_lib import results, runs, sweeps
from idaa_lib.configs import ConfigError, SSLConfig, TheoryConfig, VAEConfig
from idaa_lib.identity import networks, scene, stage, study, theory
from idaa_lib.identity.networks import UNTRAINED
from idaa_lib.identity.theory import bound
from idaa_lib.lab import pictures, verdict
from idaa_lib.lab.rows import row_of
from idaa_lib.nets.vae import rate
from idaa_lib.runs import RunError
from idaa_lib.train import train_ssl, train_vae
from idaa_lib.train.__main__ import main
from idaa_lib.views import keyed_generator


def posteriors(n, m, spread=1.0, seed=0):
    generator = keyed_generator(seed)
    mu = spread * torch.randn(n, m, generator=generator)
    return mu, torch.randn(n, m, generator=generator) - 1


# --- information in the latent ------------------------------------------------------------------


def test_log_densities_are_those_of_the_normal_distribution():
    mu, logvar = posteriors(7, 5)
    z = torch.randn(3, 5)
    densities = theory.log_densities(z, mu, logvar)
    for i, j in itertools.product(range(3), range(7)):
        std = (0.5 * logvar[j].double()).exp()
        normal = torch.distributions.Normal(mu[j].double(), std)
        assert densities[i, j].item() == pytest.approx(normal.log_prob(z[i].double()).sum().item())


def test_identical_posteriors_say_nothing_and_distant_ones_everything():
    equal_rows = torch.randn(1, 6).expand(40, 6)
    assert theory.information(equal_rows, equal_rows)[0] == pytest.approx(0, abs=1e-9)
    far_rows = 1000 * torch.eye(40)
    nats, error = theory.information(far_rows, torch.zeros(40, 40))
    assert nats == pytest.approx(math.log(40))
    assert error == pytest.approx(0, abs=1e-9)


def test_two_gaussians_on_a_line_against_quadrature():
    mu, std = (-0.7, 0.9), (0.5, 1.2)

    def integrand(z):
        q = [stats.norm.pdf(z, m, s) for m, s in zip(mu, std, strict=True)]
        return sum(0.5 * p * math.log(p / (0.5 * sum(q))) for p in q if p > 0)

    integral, _ = integrate.quad(integrand, -12, 12, limit=200)
    # Of each posterior 1,000 copies: the same mixture, and as many samples of each.
    parts = (
        part[:, None].repeat(1000, 1) for part in (torch.tensor(mu), 2 * torch.tensor(std).log())
    )
    nats, error = theory.information(*parts, keyed_generator(1))
    assert error < 0.013
    assert nats == pytest.approx(integral, abs=4 * error)


def test_information_is_the_naive_loop():
    mu, logvar = (part.double() for part in posteriors(11, 3))
    z = theory.sample(mu, logvar, keyed_generator(5))
    values = []
    for i in range(11):
        q = [math.prod(stats.norm.pdf(z[i], mu[j], (0.5 * logvar[j]).exp())) for j in range(11)]
        p = [density / sum(q) for density in q]
        values.append(sum(share * math.log(11 * share) for share in p if share > 0))
    nats, error = theory.information(mu, logvar, keyed_generator(5))
    assert nats == pytest.approx(statistics.mean(values))
    assert error == pytest.approx(statistics.pstdev(values) / math.sqrt(11))


@pytest.mark.parametrize("spread", [0.01, 0.3, 1.0, 30.0])
def test_information_lies_between_its_bounds(spread):
    mu, logvar = posteriors(64, 4, spread)
    copies = mu.repeat(10, 1), logvar.repeat(10, 1)  # 10 samples of each
    nats, error = theory.information(*copies, keyed_generator(0))
    assert 0 <= nats <= math.log(64) + 1e-9
    assert nats <= rate(mu, logvar).mean()
    for size in (2, 8, 64):
        bounds = [theory.batch_bounds(mu, logvar, size, keyed_generator(1, i)) for i in range(60)]
        lower, upper = (np.array(side) for side in zip(*bounds, strict=True))
        slack = lambda side: 4 * (side.std() / math.sqrt(60) + error) + 1e-9  # noqa: E731
        assert lower.max() <= math.log(size) + 1e-9
        assert lower.mean() <= nats + slack(lower)
        assert upper.mean() >= nats - slack(upper)
        if size == 64:  # all images in one batch: the aggregate itself
            assert lower.mean() == pytest.approx(nats, abs=slack(lower))


def test_batch_bounds_are_the_naive_loop():
    mu, logvar = (part.double() for part in posteriors(9, 2))
    lower_mean, upper_mean = theory.batch_bounds(mu, logvar, 3, keyed_generator(2))
    generator = keyed_generator(2)
    z = theory.sample(mu, logvar, generator)
    order = torch.randperm(9, generator=generator).tolist()
    lower, upper = [], []
    for start in (0, 3, 6):
        batch = order[start : start + 3]
        for i in batch:
            q = {
                j: math.prod(stats.norm.pdf(z[i], mu[j], (0.5 * logvar[j]).exp()).tolist())
                for j in batch
            }
            lower.append(math.log(q[i] / (sum(q.values()) / 3)))
            upper.append(math.log(q[i] / ((sum(q.values()) - q[i]) / 2)))
    assert lower_mean == pytest.approx(statistics.mean(lower))
    assert upper_mean == pytest.approx(statistics.mean(upper))


# --- Theorem 3.5 --------------------------------------------------------------------------------


def test_distortion_is_the_gaussian_s_own():
    x, G = torch.rand(1, 3, 4, 4).double(), torch.rand(1, 3, 4, 4).double()
    mse = (x - G).square().mean().item()
    expected = -torch.distributions.Normal(G, mse**0.5).log_prob(x).sum().item()
    assert theory.distortion(mse, 4) == pytest.approx(expected)


@pytest.mark.parametrize("std", [0.3, 2.0, 100.0])
def test_of_discrete_pixels_it_is_at_least_their_code_length(std):
    """−log of the probability of a pixel's cell, pixels on a grid: at most the distortion."""
    generator = np.random.default_rng(0)
    step, G = np.array([1.0, 0.5, 2.0])[:, None, None], generator.uniform(-3, 3, (3, 4, 4))
    x = np.round(generator.normal(G, std) / step) * step
    mse = ((x - G) ** 2).mean()
    cells = stats.norm.cdf(x + step / 2, G, mse**0.5) - stats.norm.cdf(x - step / 2, G, mse**0.5)
    nats = theory.distortion(mse, 4, (1.0, 0.5, 2.0))
    assert 0 <= -np.log(cells).sum() <= nats
    if std == 100:  # cells are small: the density is all
        assert nats == pytest.approx(-np.log(cells).sum(), rel=1e-3)


def test_the_bound_is_the_theorem_s_arithmetic():
    nats, limit = bound(n=100, distortion=3.0, rate=1.5, information=1.2, beta=2.0)
    loss = 3.0 + 2.0 * 1.5
    assert nats == pytest.approx(math.log(100) - (loss + 1.2) / 2.0)
    assert limit == pytest.approx(bound(100, 3.0, 1.5, 1.2, 1e12)[0])


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_a_vacuous_bound_is_below_zero_whatever_the_weight(beta):
    nats, limit = bound(n=100, distortion=3.0, rate=80.0, information=4.6, beta=beta)
    assert limit == pytest.approx(math.log(100) - 80)
    assert nats < limit < 0
    assert (nats == -math.inf) == (beta == 0)


def test_a_bound_of_continuous_pixels_is_refused():
    with pytest.raises(ValueError, match="discrete pixels cannot be -5 nats"):
        bound(n=100, distortion=-5.0, rate=1.0, information=1.0, beta=1.0)


# --- identity that an observer can use ----------------------------------------------------------


def test_an_observer_that_sees_all_and_one_that_sees_nothing():
    sees = theory.retention(torch.eye(32), torch.eye(32)).row()
    assert (sees["retrieved"], sees["mrr"], sees["rank"]) == (100, 1, 1)
    assert sees["infonce"] == pytest.approx(math.log(32), abs=1e-6)
    assert sees["fano"] == pytest.approx(math.log(32))
    blind = theory.retention(torch.ones(32, 4), torch.ones(32, 4)).row()
    assert (blind["retrieved"], blind["fano"], blind["rank"]) == (0, 0, 32)
    assert blind["infonce"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("right", [0, 1, 9, 12])
def test_few_hits_or_misses_have_an_interval_that_reaches_beyond_them(right):
    n, critical = 12, stats.norm.ppf(0.975)
    ranks = torch.tensor([1] * right + [2] * (n - right))
    row = theory.Retention(ranks, *[torch.zeros(n)] * 3, n=20).row()
    # The shares p whose score test does not refuse what was seen: |p̂ − p| = z √(p (1 − p) / n).
    share, z = right / n, critical**2 / n
    ends = np.roots([1 + z, -(2 * share + z), share**2]).real
    assert (row["low"], row["high"]) == pytest.approx(tuple(100 * np.sort(ends)), abs=1e-6)
    assert row["high"] - row["low"] > 20


def test_a_few_pairs_on_one_side_do_not_tell(plan):
    """4 of 20 images are found in one alone: by chance 1 time in 8 (McNemar's exact test)."""
    one, other = (
        theory.Retention(torch.tensor([1] * hits + [2] * (20 - hits)), *[torch.zeros(20)] * 3, n=20)
        for hits in (4, 0)
    )
    plan = dataclasses.replace(plan)  # with no claim yet
    plan.compare("a > b", one, other)
    hits, _ = plan.claims
    assert (hits["value"], hits["verdict"]) == (20, "cannot be told")
    assert hits["low"] < 0 < hits["high"]


def test_retention_is_the_naive_loop():
    queries, candidates = torch.randn(9, 3), torch.randn(14, 3)
    retention = theory.retention(queries, candidates)
    a, b = F.normalize(queries.double(), dim=1), F.normalize(candidates.double(), dim=1)
    cosine = [[(p @ q).item() for q in b] for p in a]
    ranks = [1 + sum(c > row[i] for c in row) for i, row in enumerate(cosine)]
    assert retention.ranks.tolist() == ranks
    assert retention.own.tolist() == pytest.approx([row[i] for i, row in enumerate(cosine)])
    neighbours = [max(c for j, c in enumerate(row) if j != i) for i, row in enumerate(cosine)]
    assert retention.nearest.tolist() == pytest.approx(neighbours)
    row = retention.row()
    assert row["retrieved"] == pytest.approx(100 * ranks.count(1) / 9)
    assert row["mrr"] == pytest.approx(statistics.mean(1 / r for r in ranks))

    def gain(i, tau):
        row = [math.exp(c / tau) for c in cosine[i]]
        return math.log(14) + math.log(row[i] / sum(row))

    halves, expected = (range(0, 9, 2), range(1, 9, 2)), {}
    for mine, other in (halves, halves[::-1]):
        taus = theory.TEMPERATURES
        best_tau = max(taus, key=lambda tau: statistics.mean(gain(i, tau) for i in other))
        expected |= {i: gain(i, best_tau) for i in mine}
    assert retention.gains.tolist() == pytest.approx([expected[i] for i in range(9)])
    assert row["infonce"] <= math.log(14)


def test_order_and_length_of_features_do_not_matter():
    draw = keyed_generator(20)
    queries, candidates = (torch.randn(20, 6, generator=draw) for _ in range(2))
    retention = theory.retention(queries, candidates)
    order = torch.randperm(20)
    permuted_retention = theory.retention(queries[order], 7 * candidates[order])
    assert torch.equal(permuted_retention.ranks, retention.ranks[order])
    for key in ("retrieved", "mrr", "own", "nearest"):
        assert permuted_retention.row()[key] == pytest.approx(retention.row()[key], abs=1e-6)


def test_among_fewer_candidates_is_what_all_subsets_give():
    retention = theory.retention(torch.randn(6, 3), torch.randn(6, 3))
    for k in (1, 2, 4, 6):
        hits = []
        for rank in retention.ranks.tolist():
            rivals = set(range(rank - 1))
            for others in itertools.combinations(range(5), k - 1):
                hits.append(not rivals & set(others))
        assert retention.among(k) == pytest.approx(100 * statistics.mean(hits))
    assert retention.among(6) == pytest.approx(retention.row()["retrieved"])


def test_fano():
    assert theory.fano(0, 50) == pytest.approx(math.log(50))
    assert theory.fano(1, 50) == 0
    assert theory.fano(0.98, 50) == 0  # chance
    h = -0.3 * math.log(0.3) - 0.7 * math.log(0.7)
    assert theory.fano(0.3, 50) == pytest.approx(0.7 * math.log(50) - h)


def test_hardness():
    x, z = torch.randn(5, 3, 4, 4), torch.randn(5, 8)
    loss = lambda a, b: (a - b).abs().sum()  # noqa: E731
    values_at_x = theory.hardness(x, x, z, z, loss)
    assert values_at_x == pytest.approx({"rise": 0, "cosine": 1, "l2": 0, "linf": 0}, abs=1e-6)
    values = theory.hardness(x, x + 0.5, z, -z, loss)
    rise = 2 * z.abs().sum().item()
    expected = {"rise": rise, "cosine": -1, "l2": 0.5 * 48**0.5, "linf": 0.5}
    assert values == pytest.approx(expected, rel=1e-5)


# --- the study ----------------------------------------------------------------------------------

SMALL = dict(limit=200, width=4, batch_size=32, device="cpu", epochs=1)
CONFIG = TheoryConfig(images=20, limit=60, epsilons=(0.3, 1.0), device="cpu")
FIGURES = ("information", "parts", "exchange", "curves", "equal_hardness", "candidates", "vaes")


@pytest.fixture(scope="module")
def outputs(module_outputs):
    for dim in (4, 8):
        train_vae(VAEConfig(**SMALL, dim=dim, beta=1.0))
    train_vae(VAEConfig(**SMALL, dim=8, beta=4.0))
    train_vae(VAEConfig(**SMALL | {"epochs": 2}, dim=8, beta=16.0))  # another training
    train_ssl(SSLConfig(**SMALL))
    train_ssl(SSLConfig(**SMALL, adversary="clae"))  # no fair witness
    train_ssl(SSLConfig(**SMALL, seed=1))
    return module_outputs


@pytest.fixture(scope="module")
def middle(outputs):
    (run,) = runs.find("vae", dim=8, beta=1.0)
    return run


@pytest.fixture(scope="module")
def made(middle):
    return study(CONFIG.model_copy(update={"vae": middle.id}))


@pytest.fixture(scope="module")
def plan(made):
    return stage.plan_study(made.config)


def test_the_study_is_a_run_that_is_shown_again(made, monkeypatch, capsys):
    assert made.finished
    config = made.config
    newest_run, _, oldest_run = runs.find("ssl")
    assert (config.run, config.witness) == (newest_run.id, oldest_run.id)
    monkeypatch.setattr(stage, "_measure", lambda plan: pytest.fail("measured again"))
    words = shlex.split(runs.command(made))
    assert main(words[words.index("theory") :]) == 0
    assert f"{made.id} is finished: showing its result" in capsys.readouterr().out
    json.loads((made.path / "summary.json").read_text(), parse_constant=pytest.fail)
    vae = runs.get("vae", config.vae)
    assert made in oldest_run.users() and made in vae.users()
    assert row_of(made).state == "finished"
    assert results.name_of(made) == "identity of 20 images"


def test_its_figures_are_the_theory_s_of_these_networks(made, plan):
    """Retrieval of x, G, R and the latent's information, from the networks by another way."""
    witness, summary = plan.witness, made.summary
    x, vae = plan.scene.x, plan.scene.vae
    G, R = vae.decompose(x)
    for part, images in (("x", x), ("G", G), ("R", R)):
        z = F.normalize(witness.embed(images), dim=1)
        cosine = z @ F.normalize(witness.candidates, dim=1).T
        percent = 100 * (cosine.argmax(1) == torch.arange(20)).float().mean().item()
        assert summary["parts"][part]["retrieved"] == pytest.approx(percent)
    latent = summary["latent"]
    assert latent["information"] <= min(math.log(20), latent["rate"]) + 1e-9
    # The decoder's s², of both terms of L_VAE, with the noise of a pixel's cell (Δ²/12).
    steps = [1 / (255 * std) for std in plan.scene.std]
    s2 = latent["mse"] + statistics.mean(step**2 / 12 for step in steps)
    area, config = x[0, 0].numel(), plan.scene.run.config
    nats = 3 * stats.norm.entropy(scale=s2**0.5) - sum(map(math.log, steps))
    assert latent["distortion"] == pytest.approx(area * nats)
    assert latent["beta"] == pytest.approx(config.kappa * area / (2 * s2 * config.dim))  # spec §1
    loss = latent["distortion"] + latent["beta"] * latent["rate"]
    expected = math.log(20) - (loss + latent["information"]) / latent["beta"]
    assert latent["bound"] == pytest.approx(expected)
    assert [k for k, *_ in latent["batches"]] == [2, 4, 8, 16, 20]


def test_an_exchange_is_the_naive_loop(made, plan):
    witness, x = plan.witness, plan.scene.x
    G, R = plan.scene.vae.decompose(x)
    pairs = []
    for a in range(20):
        b = (a + 1) % 20
        z = witness.embed((G[a] + R[b])[None])
        like_a, like_b = (F.cosine_similarity(z, witness.embed(x[[i]])).item() for i in (a, b))
        pairs.append((like_a, like_b))
    to_a, to_b = np.array(pairs).T
    exchange = made.summary["exchange"]
    assert exchange["cosines"]["R: a → b, G of a"][-1] == pytest.approx([to_a.mean(), to_b.mean()])
    (claim,) = (row for row in made.summary["claims"] if row["section"] == "exchange")
    assert claim["value"] == pytest.approx(100 * (to_b > to_a).mean())
    assert claim["verdict"] == stage.verdict((claim["value"], claim["low"], claim["high"]), 50)
    assert exchange["cosines"]["G: a → b, R of a"][0][0] == pytest.approx(1, abs=1e-5)


def test_attacks_are_the_scene_s_and_equally_hard_ones_are(made, plan):
    summary, scene = made.summary, plan.scene
    for name, curve in summary["curves"].items():
        assert [row["epsilon"] for row in curve] == sorted(row["epsilon"] for row in curve)
        row = curve[-1]
        x_adv = scene.attack(name, row["epsilon"])
        assert row["loss_after"] == pytest.approx(scene.loss(x_adv).item(), rel=1e-4)
        distance = (x_adv - scene.x).flatten(1).norm(dim=1).mean().item()
        assert row["l2"] == pytest.approx(distance, rel=1e-4)
        assert 0 <= row["consistency"] <= 100
    curves = summary["curves"]
    pairs = [row for row in summary["claims"] if row.get("at") == "hardness" and row["value"]]
    assert pairs
    for row in pairs:
        a, b = map(float, re.findall(r"ε = ([\d.]+)", row["claim"]))
        mine, other = (
            next(r for r in curves[name] if r["epsilon"] == pytest.approx(epsilon, rel=1e-2))
            for name, epsilon in (("idaa", a), (row["adversary"], b))
        )
        rise = mine["loss_after"] - summary["loss_before"]
        assert other["loss_after"] == pytest.approx(mine["loss_after"], abs=0.01 * rise)
        key = {"hits": "retrieved", "gains": "infonce"}[row["by"]]
        assert row["value"] == pytest.approx(mine[key] - other[key])
        assert row["low"] <= row["value"] <= row["high"]


def test_attacks_in_batches_are_averaged_over_all_images(made, plan, monkeypatch):
    monkeypatch.setattr(scene, "BATCH", 8)
    again = dataclasses.replace(plan.scene)
    assert [len(x) for x, _ in again.batches] == [7, 7, 6]
    x_adv, parts = [], []
    for x, z in again.batches:
        part = dataclasses.replace(again, x=x)
        x_adv.append(part.attack("clae", 0.3))
        parts.append(len(x) / 20 * scene.loss(z, again.embed(x_adv[-1])).item())
    assert torch.allclose(again.attack("clae", 0.3), torch.cat(x_adv), atol=1e-6)
    read = scene.read(again, plan.witness, "clae", 0.3)
    assert read.row["loss_after"] == pytest.approx(sum(parts), rel=1e-5)


def test_vaes_that_differ_in_one_thing_alone_are_siblings(middle):
    siblings = networks.siblings(middle)
    assert [run.config.beta for run in siblings["beta"]] == [1.0, 4.0]
    assert [run.config.dim for run in siblings["dim"]] == [4, 8]
    (other,) = runs.find("vae", beta=16.0)
    assert networks.siblings(other) == {"beta": [other], "dim": [other]}


def test_every_axis_of_a_figure_has_a_label(made):
    summary = made.summary
    others = pictures.identity_curves(summary["curves"]), pictures.likeness(**summary["exchange"])
    names = [name for name in FIGURES if name not in ("curves", "exchange")]
    for figure in (*(getattr(pictures, name)(summary) for name in names), *others):
        # What is shared between panels is said at the first.
        assert figure.axes[0].get_ylabel()
        assert all(axis.get_xlabel() for axis in figure.axes)
    table = verdict.hardness_table(summary)
    assert set(table[""]) == {"IDAA", "CLAE", "random sign"}
    assert pictures.vaes(summary | {"vaes": {"epsilon": 0.3}}) is None
    curves = {n: [{**row} for row in curve] for n, curve in summary["curves"].items()}
    for row in itertools.chain(*curves.values()):
        del row["consistency"]
    assert len(pictures.equal_hardness(summary | {"curves": curves}).axes) == 2


def test_attacked_and_witness_may_both_be_untrained(middle):
    config = CONFIG.model_copy(
        update={"vae": middle.id, "run": UNTRAINED, "witness": UNTRAINED, "images": 10}
    )
    plan = stage.plan_study(config)
    with torch.no_grad():
        features, witness_features = (
            plan.scene.embed(plan.scene.x),
            plan.witness.embed(plan.scene.x),
        )
    assert not torch.allclose(features[:, :8], witness_features[:, :8])
    assert plan.run != stage.plan_study(CONFIG).run
    (caveat,) = plan.caveats
    assert "untrained" in caveat


@pytest.mark.parametrize(
    ("interval", "than", "verdict"),
    [
        ((5.0, 1.0, 9.0), 0, "more"), ((-5.0, -9.0, -1.0), 0, "less"),
        ((1.0, -3.0, 5.0), 0, "cannot be told"), ((55.0, 51.0, 60.0), 50, "more"),
        ((45.0, 40.0, 51.0), 50, "cannot be told"), (None, 0, "left out"),
    ],
)  # fmt: skip
def test_a_verdict_follows_the_interval(interval, than, verdict):
    assert stage.verdict(interval, than) == verdict


def test_claims_are_the_differences_of_the_readings(made):
    summary, claims = made.summary, made.summary["claims"]
    parts = summary["parts"]
    kinds = {"hits": "retrieved", "gains": "infonce"}
    for by, key in kinds.items():
        (row,) = (r for r in claims if r["section"] == "parts" and r.get("by") == by)
        assert row["value"] == pytest.approx(parts["R"][key] - parts["G"][key])
    probes = [row for row in claims if row.get("by") == "probe"]
    assert [row["n"] for row in probes] == [20, 20]
    for row, kind in zip(probes, ("instance", "class"), strict=True):
        probe = summary["probes"][kind]
        assert row["claim"].endswith(f"which {kind}")
        assert row["value"] == pytest.approx(probe["R"][0] - probe["G"][0])
    attacks = [row for row in claims if row["section"] == "attacks"]
    equal_rows = [row for row in attacks if "at" not in row]
    assert len(equal_rows) == 2 * 2 * 2  # adversaries, radii, measures
    for row in equal_rows:
        mine, other = (
            next(r for r in summary["curves"][name] if r["epsilon"] == row["epsilon"])
            for name in ("idaa", row["adversary"])
        )
        key = kinds[row["by"]]
        assert row["value"] == pytest.approx(mine[key] - other[key])
        assert row["note"] == f"loss {mine['loss_after']:.2f}, {other['loss_after']:.2f}"
    latent, theorem = claims[:2]
    spread = 1.96 * summary["latent"]["error"]
    assert latent["value"] - latent["low"] == pytest.approx(spread)
    assert theorem["value"] == summary["latent"]["bound"]
    is_vacuous = theorem["value"] <= 0
    assert ("vacuous" in theorem["note"], theorem["verdict"] == "less") == (is_vacuous, is_vacuous)
    table = verdict.verdict_table(summary)
    assert len(table) == len(claims)
    left_out = [row["verdict"] == "left out" for row in claims]
    assert ((table["value"] == "") == left_out).all()
    assert ((table["95 % interval"] == "") == left_out).all()
    assert len(verdict.verdict_table(summary, "attacks")) == len(attacks)
    short_table = verdict.attack_table(summary)  # all of these claims, few of its rows
    assert len(short_table) == 8 and short_table.notna().all(axis=None)
    texts = " ".join(short_table.stack())
    for row in attacks:
        if row["value"] is not None:
            digits = ".1f" if row["by"] == "hits" else ".2g"
            assert f"{row['value']:+z{digits}} [{row['low']:+z{digits}}" in texts


def test_a_difference_that_rounds_to_zero_has_no_sign():
    row = {"section": "attacks", "adversary": "clae", "epsilon": 0.1, "by": "hits", "at": "loss"}
    row |= {"value": -0.04, "low": -0.06, "high": 0.0, "verdict": "cannot be told"}
    ((text,),) = verdict.attack_table({"claims": [row]}).to_numpy()
    assert text == "+0.0 [-0.1, +0.0] cannot be told"


@pytest.mark.parametrize("scale", [1e-3, 1e-2, 1.0])
def test_a_clear_difference_in_nats_is_not_rounded_to_zero(scale):
    row = {"section": "attacks", "adversary": "clae", "epsilon": 0.1, "by": "gains", "at": "loss"}
    row |= {"value": -3 * scale, "low": -4 * scale, "high": -2 * scale, "verdict": "less"}
    ((text,),) = verdict.attack_table({"claims": [row]}).to_numpy()
    numbers = [float(number) for number in re.findall(r"[-+][\d.e-]*\d", text)]
    assert numbers == pytest.approx([-3 * scale, -4 * scale, -2 * scale])


def test_nats_of_any_size_are_plain_numbers():
    row = {"section": "a", "claim": "c", "unit": "nats", "n": 1, "verdict": "less", "note": ""}
    claims = [row | {"value": x, "low": x, "high": x} for x in (-12345.6, 0.00123, None)]
    values = verdict.verdict_table({"claims": claims})["value"]
    assert [*values] == ["-12,345.60", "0.00123", ""]


@pytest.mark.parametrize(
    ("rise", "why"),
    [(1.0, "no ε of random sign up to 1 is as hard as IDAA"), (-1.0, "does not make x harder")],
)
def test_a_radius_that_is_left_out_says_why(plan, monkeypatch, rise, why):
    def read(*arguments):
        reading = scene.read(*arguments)
        reading.row["loss_after"] = reading.row["loss_before"] + rise
        return reading

    monkeypatch.setattr(stage, "read", read)
    monkeypatch.setattr(stage, "equal_hardness", lambda *arguments: None)
    again = dataclasses.replace(plan)
    with torch.no_grad():
        stage._attacks(again)
    rows = [row for row in again.claims if row["verdict"] == "left out"]
    assert len(rows) == 2 * 2 and all(row["value"] is None for row in rows)
    assert why in rows[-1]["note"]


def test_a_claim_by_an_unfair_witness_says_so(middle):
    config = CONFIG.model_copy(
        update={"vae": middle.id, "run": UNTRAINED, "witness": UNTRAINED, "images": 10}
    )
    plan = stage.plan_study(config)
    retention = plan.witness.retention(plan.scene.x)
    plan.compare("x keeps more than x", retention, retention, note=["a note"])
    assert len(plan.claims) == 2
    for row in plan.claims:
        assert (row["value"], row["verdict"], row["n"]) == (0, "cannot be told", 10)
        assert row["note"].startswith("a note; the witness is untrained")


@pytest.mark.parametrize("bend", [lambda e: e**3, lambda e: e**0.3, lambda e: math.exp(5 * e) - 1])
def test_an_equal_loss_is_found_on_bent_curves(bend):
    curve = [(e, 2.0 + bend(e)) for e in (0.03, 0.1, 0.3, 1.0, 3.0)]
    for point in (0.01, 0.05, 0.2, 0.7, 2.9):
        loss = 2.0 + bend(point)
        epsilon = stage.equal_hardness(lambda e: 2.0 + bend(e), curve, loss, 2.0)
        assert bend(epsilon) == pytest.approx(bend(point), rel=0.01)


def test_an_equal_loss_that_is_jumped_over_is_not_made_up():
    jump = lambda e: 2.0 if e < 0.2 else 4.0  # noqa: E731
    curve = [(e, jump(e)) for e in (0.1, 1.0)]
    assert stage.equal_hardness(jump, curve, 3.0, 2.0) is None
    assert stage.equal_hardness(jump, curve, 2.0, 2.0) is None  # no harder than x
    assert stage.equal_hardness(jump, curve, 5.0, 2.0) is None  # harder than all


def test_a_witness_of_another_seed_comes_first_and_one_of_the_same_is_told(made, plan):
    fair_run, clae, same_run = runs.find("ssl")  # seeds 1, 0 (CLAE's), 0
    vae = plan.scene.run
    assert networks.choose_witness(vae, clae.reference) == fair_run.reference
    assert networks.choose_witness(vae, fair_run.reference) == same_run.reference
    assert made.summary["caveats"] == []

    def list_caveats(run, witness):
        update = {"run": run.reference, "witness": witness.reference}
        return dataclasses.replace(plan, config=made.config.model_copy(update=update)).caveats

    assert list_caveats(clae, fair_run) == []
    assert ["same seed" in caveat for caveat in list_caveats(clae, same_run)] == [True]
    first_caveat, second_caveat = list_caveats(same_run, clae)
    assert "trained with clae" in first_caveat and "same seed" in second_caveat


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (dict(images=1000), "images=1000 is more than the 500"),
        (dict(vae="nobody"), "no vae run 'nobody'"),
        (dict(witness="nobody"), "no ssl run 'nobody'"),
        (dict(dataset="/no/such/folder"), "/no/such/folder"),
    ],
)
def test_what_is_not_there_is_one_sentence(outputs, values, sentence):
    with pytest.raises((ConfigError, RunError), match=sentence):
        study(CONFIG.model_copy(update=values))


def test_the_attacked_encoder_is_no_witness(made):
    config = made.config.model_copy(update={"witness": made.config.run})
    with pytest.raises(ConfigError, match="is the encoder that is attacked: name another"):
        study(config)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (dict(images=5), "images must be"),
        (dict(epsilons="0, 1"), "epsilons must be"),
        (dict(epsilons=()), "epsilons must"),
        (dict(split="train"), "split must be"),
        (dict(augmentation="none"), "augmentation must be"),
    ],
)
def test_a_study_that_cannot_be_made_is_refused(values, sentence):
    with pytest.raises(ConfigError, match=sentence):
        TheoryConfig(**values)


def test_the_notebook_shows_the_finished_study(made, tmp_path):
    parameters = {"vae": made.config.vae, "images": 20, "limit": 60, "epsilons": "0.3, 1"}
    sweeps.execute("08_identity_theory", parameters | {"device": "cpu"}, tmp_path / "out.ipynb")
    names = {path.stem for path in (made.path / "figures").glob("*.png")}
    assert names == set(FIGURES)
    assert len(runs.find("theory")) == 1

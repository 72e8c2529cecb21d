"""Classes of the user's own: examples/own_method.py against oracles, and what registering means."""

import contextlib
import importlib
import linecache
import math
import subprocess
import sys
from pathlib import Path

import pydantic
import pytest
import torch
from conftest import fit_of

import idaa_lib
from idaa_lib import SSLConfig, evaluate, load_encoder, registry, runs, train_ssl, train_vae
from idaa_lib.adversaries import IDAA, build_adversary
from idaa_lib.configs import ConfigError, EvalConfig, VAEConfig
from idaa_lib.lab import live, process
from idaa_lib.methods import About
from idaa_lib.methods.simclr import SimCLR
from idaa_lib.nets import build_backbone
from idaa_lib.nets.vae import VAE
from idaa_lib.train import locate
from idaa_lib.views import recipe

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TINY = {"limit": 96, "batch_size": 16, "epochs": 1, "width": 4, "log_every": 1, "device": "cpu"}


@pytest.fixture(autouse=True)
def registries():
    """What a test registers is forgotten after it."""
    before = {choice: dict(kinds) for choice, kinds in registry.CHOICES.items()}
    yield
    for choice, kinds in registry.CHOICES.items():
        kinds.clear()
        kinds |= before[choice]


@pytest.fixture
def own(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    sys.modules.pop("own_method", None)
    return importlib.import_module("own_method")


@pytest.fixture
def vae():
    torch.manual_seed(0)
    vae = VAE(8, width=4).double().eval().requires_grad_(False)
    vae.fc12.bias += torch.linspace(-4, 1, 8)  # coordinates of which it is more and less sure
    return vae


@pytest.fixture
def x():
    return torch.randn(5, 3, 32, 32, dtype=torch.double, generator=torch.Generator().manual_seed(1))


def of_samples(x):
    weights = torch.linspace(-1, 2, x[0].numel(), dtype=x.dtype).view_as(x[0]).sin()
    return (x * weights).sum() + (x**2).mean()


# --- the example ------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [0.0, 1.0, 2.5])
def test_alignment_and_uniformity_is_the_papers_loss(own, spread):
    z1, z2 = (torch.nn.functional.normalize(torch.randn(6, 4), dim=1) for _ in range(2))
    pairs = zip(z1, z2, strict=True)
    align = sum(sum((a - b) ** 2 for a, b in zip(*pair, strict=True)) for pair in pairs) / 6
    logs = []
    for z in (z1, z2):
        kernel = [
            math.exp(-2 * sum((a - b) ** 2 for a, b in zip(z[i], z[j], strict=True)))
            for i in range(6)
            for j in range(i)
        ]
        logs.append(math.log(sum(kernel) / len(kernel)))
    method = object.__new__(own.AlignUniform)
    method.__dict__["options"] = own.AlignUniform.Options(spread=spread)
    torch.testing.assert_close(method.contrast(z1, z2), align + spread * sum(logs) / 2)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_no_coordinate_moves_further_than_its_uncertainty(own, vae, x, power):
    attack = own.PosteriorIDAA(vae, epsilon=0.7, power=power)(x, of_samples)
    mu, logvar = vae.encode(x)
    bound = 0.7 * (logvar / 2).exp() ** power
    torch.testing.assert_close(attack.delta.abs(), bound)
    G = vae.decode(mu)
    torch.testing.assert_close(attack.images, x - G + vae.decode(mu + attack.delta))
    torch.testing.assert_close(attack.z, mu + attack.delta)
    assert of_samples(attack.images) > of_samples(x)
    assert not any(part.requires_grad for part in (attack.images, attack.delta, attack.z))


def test_with_power_0_it_is_idaa(own, vae, x):
    mine = own.PosteriorIDAA(vae, epsilon=0.3, power=0.0)(x, of_samples)
    theirs = IDAA(vae, epsilon=0.3)(x, of_samples)
    torch.testing.assert_close(mine.images, theirs.images)
    torch.testing.assert_close(mine.delta, theirs.delta)
    still_attack = own.PosteriorIDAA(vae, epsilon=0.0)(x, of_samples)
    torch.testing.assert_close(still_attack.images, x)


def test_it_meets_images_in_other_units_than_its_vae(own, vae, x):
    vae.mean, vae.std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    units = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25)}
    columns = {k: x.new_tensor(v).view(3, 1, 1) for k, v in units.items()}

    def convert(x):
        return ((x * columns["std"] + columns["mean"]) - 0.5) / 0.25

    mine = own.PosteriorIDAA(vae, **units)(x, lambda x: of_samples(convert(x)))
    expected = own.PosteriorIDAA(vae)(convert(x), of_samples)
    torch.testing.assert_close(convert(mine.images), expected.images)


def test_it_trains_and_its_knobs_are_in_the_run_s_id(own, outputs):
    train_vae(VAEConfig(**TINY, dim=8))
    knobs = {"spread": 2.0, "power": 0.5}
    config = SSLConfig(**TINY, method="align_uniform", adversary="idaa_posterior", **knobs)
    run = train_ssl(config)
    assert run.finished and "-spread=2-power=0.5-" in run.id
    assert load_encoder(run, "projector").module(torch.zeros(2, 3, 32, 32)).shape == (2, 64)
    assert {"clean_loss", "adversarial_loss", "moved"} <= run.metrics()[0].keys()
    assert train_ssl(config.replace(adversary="none")).finished
    content = (run.path / "config.json").read_bytes()
    for kinds, name in (("method", "align_uniform"), ("adversary", "idaa_posterior")):
        del registry.CHOICES[kinds][name]  # as in another kernel
    judge = evaluate(EvalConfig(run=run.id, limit=64, device="cpu"))  # its backbone needs no file
    assert judge.summary.keys() >= {"knn_top1", "random_knn_top1"}
    for name in ("summary.json", "state.json"):
        (run.path / name).unlink()
    with pytest.raises(ConfigError, match="import the module that registers it first"):
        process.launch(run, run.config)  # which knows no knobs of theirs
    assert (run.path / "config.json").read_bytes() == content


def test_a_shell_and_a_recipe_know_it_too(outputs, tmp_path):
    text = '[ssl]\nmethod = "align_uniform"\n[ssl.where.method.align_uniform]\nspread = 0.5\n'
    (tmp_path / "own.toml").write_text('extends = "demo"\n' + text)
    words = [f"{k}={v}" for k, v in TINY.items()] + [f"preset={tmp_path / 'own.toml'}"]
    command = [sys.executable, "-m", "idaa_lib.train", "ssl", *words]
    result = subprocess.run(
        [*command, str(EXAMPLES / "own_method.py")], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert '"spread": 0.5' in next((outputs / "ssl").glob("*/config.json")).read_text()
    result = subprocess.run([*command, "no.py"], capture_output=True, text=True)
    assert "ConfigError: There is no file no.py" in result.stderr


# --- registering ------------------------------------------------------------------------------


def test_a_backbone_of_one_s_own_is_one_decorator(outputs):
    @idaa_lib.register_backbone("flat")
    class Flat(torch.nn.Module):
        feature_dim = 12

        def __init__(self, width, stem, adversarial_norms):
            super().__init__()
            self.layer = torch.nn.LazyLinear(12)
            self.layer(torch.zeros(1, 3 * 32 * 32))

        def forward(self, images, adversarial=False):
            return self.layer(images.flatten(1))

    run = train_ssl(SSLConfig(**TINY, projection_dim=8, backbone="flat"))
    assert load_encoder(run).module.feature_dim == 12


OWN = """
import idaa_lib
from idaa_lib.methods.simclr import SimCLR

def scale(loss):
    return loss * {factor}

@idaa_lib.register_method("own")
class Own(SimCLR):
    def contrast(self, z1, z2):
        return scale(super().contrast(z1, z2))
"""
CONFIG = TINY | {"projection_dim": 8, "method": "own"}


def type_in(cell, number):
    """Run a notebook's cell as IPython does: its text is known by a name that is no file."""
    name = f"<ipython-input-{number}>"
    linecache.cache[name] = (len(cell), None, cell.splitlines(keepends=True), name)
    exec(compile(cell, name, "exec"), {"__name__": "__main__"})


def test_an_edited_method_is_another_run(outputs, tmp_path, monkeypatch):
    """Somebody at work on a method must never be shown the numbers of its last version: nor where
    another part of its file was edited, or a cell."""
    monkeypatch.syspath_prepend(tmp_path)
    runs_of = []
    for factor in (1, 2):
        (tmp_path / f"own{factor}.py").write_text(OWN.format(factor=factor))
        importlib.import_module(f"own{factor}")
        runs_of.append(locate(SSLConfig(**CONFIG)))
    for factor in (3, 4, 3):
        type_in(OWN.format(factor=factor), factor)
        runs_of.append(locate(SSLConfig(**CONFIG)))
    assert len(set(runs_of)) == 4 and runs_of[2] == runs_of[4]
    # Where the text lies does not matter.
    (tmp_path / "own3.py").write_text(OWN.format(factor=3))
    importlib.import_module("own3")
    assert locate(SSLConfig(**CONFIG)) == runs_of[4]
    del registry.CHOICES["method"]["own"]
    with pytest.raises(ConfigError, match="import the module that registers it first"):
        SSLConfig(**CONFIG)


def test_a_file_that_was_edited_must_be_imported_again(outputs, tmp_path, monkeypatch):
    """The class that is in memory would train under the id of the text on the disk."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "edited.py").write_text(OWN.format(factor=1))
    module = importlib.import_module("edited")
    first = locate(SSLConfig(**CONFIG))
    (tmp_path / "edited.py").write_text(OWN.format(factor=1000))
    with pytest.raises(ConfigError, match=r"edited\.py was edited since Own was imported from it"):
        locate(SSLConfig(**CONFIG))
    importlib.reload(module)
    assert locate(SSLConfig(**CONFIG)) != first


def test_attended_a_file_s_class_trains_in_a_process_and_a_cell_s_here(
    outputs, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(live, "is_attended", lambda: True)
    monkeypatch.setattr(live, "display", lambda ui: None)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "filed.py").write_text(OWN.format(factor=1))
    importlib.import_module("filed")
    run = live.train(SSLConfig(**CONFIG))
    assert run.finished and (run.path / "process.json").exists()
    live._panels[run.path].close()

    type_in(OWN.format(factor=2), 1)
    run = live.train(SSLConfig(**CONFIG))
    assert run.finished and not (run.path / "process.json").exists()
    assert "own: typed in this kernel, so training runs here" in capsys.readouterr().out


def test_a_class_that_cannot_be_is_refused_when_it_is_registered():
    with pytest.raises(ValueError, match="method='simclr' is the library's own"):
        idaa_lib.register_method("simclr")(type("Mine", (SimCLR,), {}))
    with pytest.raises(TypeError, match=r"method='a' must be a subclass of idaa_lib\.Method"):
        idaa_lib.register_method("a")(torch.nn.Linear)
    with pytest.raises(TypeError, match=r"its class Options.* one of idaa_lib\.Options"):
        idaa_lib.register_adversary("a")(type("A", (idaa_lib.Adversary,), {"Options": dict}))


@pytest.mark.parametrize(
    ("name", "owner"), [("width", "SSLConfig"), ("epsilon", "method='greedy'")]
)
def test_a_knob_has_one_owner(name, owner):
    class Greedy(SimCLR):
        Options = pydantic.create_model("Options", __base__=SimCLR.Options, **{name: (float, 0.1)})

    idaa_lib.register_method("greedy")(Greedy)
    with pytest.raises(ConfigError, match=f"a knob '{name}', which is a name of {owner} too"):
        SSLConfig(method="greedy", adversary="clae")


def test_an_adversary_with_a_vae_needs_its_knobs(outputs):
    @idaa_lib.register_adversary("bare")
    class Bare(idaa_lib.Adversary):
        needs_vae = True

    with pytest.raises(ConfigError, match=r"Options must be a subclass of idaa_lib\.VAEOptions"):
        train_ssl(SSLConfig(**TINY, adversary="bare"))
    assert not runs.find("ssl", finished=False)


def test_faults_of_a_class_are_one_sentence():
    """Each of them was met by someone who wrote a method for the first time."""

    class NoDefault(idaa_lib.Contrastive):
        class Options(idaa_lib.Contrastive.Options):
            weight: float

    with pytest.raises(TypeError, match="method='no_default' has a knob 'weight' without a def"):
        idaa_lib.register_method("no_default")(NoDefault)

    class Misspelt(idaa_lib.Contrastive):
        def contrats(self, z1, z2):
            return (z1 * z2).sum()

    class NoScalar(idaa_lib.Contrastive):
        def contrast(self, z1, z2):
            return (z1 * z2).sum(1)

    views = recipe("simclr", 16, (0.5,) * 3, (0.2,) * 3)
    about = About(views, torch.zeros(8, dtype=torch.long), batch_size=4)
    for kind, error, words in (
        (Misspelt, NotImplementedError, "Misspelt has no `contrast`"),
        (NoScalar, ConfigError, r"loss of NoScalar has the shape \(4,\): give a scalar"),
    ):
        images = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
        method = kind(
            kind.Options(),
            build_backbone("resnet18", width=4, stem="cifar", adversarial_norms=False),
            about,
        )
        config = SSLConfig(size=16, width=4, batch_size=4)
        fit = fit_of(method, config)
        fit.accelerator.autocast = contextlib.nullcontext
        numbers = fit._numbers(0, {"images": 4})
        with pytest.raises(error, match=words):
            fit._work({"images": images}, {"images": torch.arange(4)}, numbers)

    class WithoutVAE(idaa_lib.Adversary):
        def __call__(self, x, attack_loss, generator=None, numbers=None):
            return self.encode(x)

    with pytest.raises(ValueError, match="WithoutVAE has no VAE: its class needs needs_vae = True"):
        WithoutVAE()(torch.zeros(1, 3, 16, 16), None)


def test_an_adversary_knows_the_units_of_its_images():
    config = SSLConfig(adversary="clae")
    units = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.1)}
    adversary = build_adversary(config, None, **units)
    assert (adversary.mean, adversary.std) == tuple(units.values())


def test_without_a_cell_of_parameters_every_knob_counts(own):
    names = {"method": "align_uniform", "spread": 0.02, "limit": 7}
    for values in (names, names | {"In": ["", "method = 1"]}):
        config = SSLConfig.from_notebook(values)
        assert (config.spread, config.limit) == (0.02, 7)
    cell = "# Parameters\nmethod = 'align_uniform'\n"
    assert SSLConfig.from_notebook(names | {"In": [cell]}).spread == 1.0  # of a later cell

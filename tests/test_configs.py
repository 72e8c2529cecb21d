"""Configurations: what is read, what is refused, and in which words."""

import itertools
import json
import math
import re

import pytest
import torch
import yaml
from papermill.cli import _resolve_type
from papermill.iorw import NoDatesSafeLoader
from papermill.translators import translate_parameters

from idaa_lib.configs import (
    CompareConfig,
    ConfigError,
    DecomposeConfig,
    EvalConfig,
    SemiConfig,
    SSLConfig,
    SweepConfig,
    TheoryConfig,
    TransferConfig,
    VAEConfig,
)
from idaa_lib.data.__main__ import main as data_command
from idaa_lib.runs import CONFIGS
from idaa_lib.train.__main__ import read_words

ALL = (VAEConfig, SSLConfig, EvalConfig, DecomposeConfig, SweepConfig)
PRESETS = sorted(path.stem for path in SSLConfig.recipes.glob("*.toml"))


def data_of(preset):
    """The data that a recipe of 224 px leaves to the user."""
    return {"dataset": "imagenet"} if "imagenet" in preset else {}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("config", ALL)
def test_every_preset_resolves_every_field_and_survives_json(config, preset):
    values = data_of(preset) if config in (VAEConfig, SSLConfig) else {}
    instance = config(preset=preset, **values)
    for name in ("dataset", "size", "epochs", "batch_size", "learning_rate", "dim", "kappa"):
        option = config in (EvalConfig, DecomposeConfig) and name == "dataset"
        assert option or getattr(instance, name, 1) is not None, name
    repeat = config(**json.loads(json.dumps(instance.model_dump(mode="json"))))
    assert repeat == instance
    assert not instance.list_changes()


@pytest.mark.parametrize(
    ("config", "values", "words"),
    [
        (SSLConfig, {"epsilon": -1.0, "adversary": "idaa"}, ("epsilon", "-1", "0")),
        (SSLConfig, {"epsilon": "large", "adversary": "idaa"}, ("epsilon", "'large'", "number")),
        (SSLConfig, {"epsilon": 0.1}, ("epsilon", "adversary='clae' or 'idaa'", "'none'")),
        (SSLConfig, {"method": "byol", "temperature": 0.1}, ("temperature", "'moco'", "'byol'")),
        (SSLConfig, {"adversary": "clae", "vae": "x"}, ("vae", "'idaa'", "'clae'")),
        (SSLConfig, {"method": "fixmatch"}, ("method", "simclr", "'fixmatch'")),
        (SemiConfig, {"method": "simclr"}, ("method", "fixmatch", "'simclr'")),
        (SSLConfig, {"epsilom": 0.1}, ("epsilom", "did you mean 'epsilon'")),
        (SSLConfig, {"adversary": "ida"}, ("adversary", "'ida'", "idaa")),
        (SSLConfig, {"epochs": 2.5}, ("epochs", "2.5", "whole number")),
        (SSLConfig, {"epochs": True}, ("epochs", "True", "whole number")),
        (SSLConfig, {"learning_rate": float("nan")}, ("learning_rate", "nan", "finite")),
        (SSLConfig, {"batch_size": 1}, ("batch_size", "1")),
        *((c, {"preset": "huge"}, ("preset", "'huge'", "cifar10, demo", "paper")) for c in ALL),
        (SSLConfig, {"dim": 0, "adversary": "idaa"}, ("dim", "0")),
        (VAEConfig, {"size": 224, "width": 4}, ("width", "4", "8")),
        (SweepConfig, {"ssl": {"vae": "x"}}, ("ssl", "'vae'", "study")),
        (VAEConfig, {"dim": 0}, ("dim", "0")),
        (VAEConfig, {"size": 65}, ("size", "65", "64 or 68")),
        (VAEConfig, {"kappa": 0.1, "beta": 0.1}, ("kappa=0.1", "beta=0.4", "give one of the two")),
        (SweepConfig, {"dims": "32, many"}, ("dims", "'many'")),
        (SweepConfig, {"figure": 7}, ("figure", "6 or 5", "7")),
        (SweepConfig, {"seeds": ()}, ("seeds",)),
    ],
)
def test_what_cannot_be_is_one_sentence(config, values, words):
    with pytest.raises(ConfigError) as error:
        config(**values)
    sentence = str(error.value)
    assert all(word in sentence for word in words), sentence
    assert "\n" not in sentence
    assert error.value._render_traceback_() == [f"ConfigError: {sentence}"]


@pytest.mark.parametrize(
    ("text", "value"), [("8/255", 8 / 255), ("1e-3", 1e-3), (" 0.1 ", 0.1), (1, 1.0)]
)
def test_numbers_arrive_as_papermill_sends_them(text, value):
    assert SSLConfig(adversary="idaa", epsilon=text).epsilon == value


def by_hand(name, text):
    return read_words([f"{name}={text}"])


def by_papermill(name, text):
    return inject({name: _resolve_type(text)})


def by_yaml(name, text):
    return inject(yaml.load(f"{name}: {text}", Loader=NoDatesSafeLoader))


def inject(values):
    """What a kernel has of parameters that papermill sends it."""
    names: dict = {}
    exec(translate_parameters("python3", "python", values, "Parameters"), names)
    return {name: names[name] for name in values}


NOTHING = ("None", "null", "NULL", "none", "")


@pytest.mark.parametrize("way", [by_hand, by_papermill, by_yaml])
@pytest.mark.parametrize(
    ("config", "name", "spellings", "value"),
    [
        (SSLConfig, "epochs", ("100", "1e2", "1.0e2", "100.0", "1_00", "+100", "200/2"), 100),
        (SSLConfig, "epochs", NOTHING, SSLConfig().epochs),
        (SSLConfig, "limit", ("7", "7e0", "7."), 7),
        (SSLConfig, "knn_every", NOTHING, 1),
        (SSLConfig, "learning_rate", ("1e-3", "0.001", ".001", "1/1000"), 0.001),
        (SSLConfig, "learning_rate", ("1", "1e0", "1.0"), 1.0),
        (SSLConfig, "compile", ("true", "True", "TRUE", "yes", "on"), True),
        (EvalConfig, "references", ("false", "False", "no", "off"), False),
        (EvalConfig, "run", NOTHING, None),
        (EvalConfig, "run", ("ssl-a",), "ssl-a"),
        (EvalConfig, "classes", NOTHING[:-1], None),
        (SSLConfig, "adversary", ("none", "None", "null"), "none"),
        (SSLConfig, "dataset", ("2024",), "2024"),
        (SSLConfig, "dataset", ("None", "null"), "photos"),
        (SSLConfig, "mean", ("0.5, 0.4, 1", "[0.5, 0.4, 1e0]", "(0.5 0.4 1)"), (0.5, 0.4, 1.0)),
        (SSLConfig, "mean", NOTHING, None),
        (SweepConfig, "dims", ("32, 64", "[32, 64]", "32 64", "[3.2e1, '64']"), (32, 64)),
        (SweepConfig, "epsilons", ("0.1, 8/255", "[0.1, 8/255]", "[1e-1, 8/255]"), (0.1, 8 / 255)),
        (SweepConfig, "epsilons", ("0, 5", "[0,5]", "0 5", "0.,5", "0/1,5"), (0.0, 5.0)),
        (SweepConfig, "epsilons", ("0.03,0.1", ".03,.1", "3e-2,1e-1", "3/100,1/10"), (0.03, 0.1)),
        (SweepConfig, "dims", ("1,2", "1, 2", "[1,2]"), (1, 2)),
        (SweepConfig, "seeds", ("10", "1e1", "[10]", "1_0"), (10,)),
        (SweepConfig, "ssl", ('{"epochs": 3}', "{'epochs': 3}", "epochs=3"), {"epochs": 3}),
        (SweepConfig, "ssl", ("None", "null"), {}),
        (CompareConfig, "methods", ("moco, uel", "moco uel", "['moco', 'uel']"), ("moco", "uel")),
        (TransferConfig, "datasets", ("cifar10, 2024", "[cifar10, 2024]"), ("cifar10", "2024")),
        (TransferConfig, "datasets", ("None", "null"), ()),
        (VAEConfig, "seed", ("18446744073709551615",), 2**64 - 1),
    ],
)  # fmt: skip
def test_a_spelling_means_the_same_by_hand_and_by_papermill(config, name, spellings, value, way):
    for text in spellings:
        result = getattr(config(**way(name, text)), name)
        assert (result, type(result)) == (value, type(value)), text


@pytest.mark.parametrize("way", [by_hand, by_papermill, by_yaml])
@pytest.mark.parametrize(
    ("config", "name", "text", "words"),
    [
        (SSLConfig, "epochs", "2.5", "epochs must be a whole number, and is 2.5"),
        (SSLConfig, "epochs", "nan", "epochs must be a whole number, and is nan"),
        (SSLConfig, "epochs", "1e400", "epochs must be a whole number, and is inf"),
        (SSLConfig, "epochs", "many", "epochs must be a whole number, and is 'many'"),
        (SSLConfig, "epochs", "true", "epochs must be a whole number, and is True"),
        (SSLConfig, "compile", "2", "compile must be True or False, and is 2"),
        (SweepConfig, "dims", "[32, many]", "dims must be a whole number, and is 'many'"),
        (SweepConfig, "ssl", "epochs", "ssl must be pairs of name and value"),
        *(
            (config, name, text, f"{name} must be a list of numbers, and of {text!r} it is unclear")
            for config, name in (
                (SweepConfig, "epsilons"), (SweepConfig, "betas"), (TheoryConfig, "epsilons"),
                (TransferConfig, "fractions"), (SSLConfig, "mean"),
            )
            for text in ("0,05", "1,2", "0,05 0,1", "0,1,2", "-0,5", "0,5e1")
        ),
        (SSLConfig, "mean", "0.5, 0.5", "mean must be given in full, and is (0.5, 0.5)"),
        (SSLConfig, "std", "1 1 1 1", "std must be a list of fewer values, and is (1.0, 1.0, 1.0"),
    ],
)  # fmt: skip
def test_a_spelling_is_refused_alike_by_hand_and_by_papermill(config, name, text, words, way):
    with pytest.raises(ConfigError, match=re.escape(words)):
        config(**way(name, text))


@pytest.mark.parametrize("config", [c for c in CONFIGS.values() if "seed" in c.model_fields])
def test_a_seed_beyond_64_bits_is_refused(config):
    with pytest.raises(ConfigError, match=r"^seed must be less than 18446744073709551616, and is "):
        config(seed=2**64)
    assert config(seed=2**64 - 1).seed == torch.Generator().manual_seed(2**64 - 1).initial_seed()


@pytest.mark.parametrize("value", [2024.1, True, 12345e67, -1e31, math.inf])
def test_what_is_no_text_is_no_name(value):
    """papermill makes 2024.10 and 12345e67 numbers: the name cannot be had back."""
    with pytest.raises(
        ConfigError, match=f"dataset must be text .*-r.*, and is {re.escape(str(value))}"
    ):
        SSLConfig(dataset=value)


def test_text_is_read_by_the_type_of_its_field():
    config = SSLConfig(
        adversary="idaa", random_start="true", epochs="3", vae=2024, step_size="none"
    )
    assert (config.random_start, config.epochs, config.vae, config.step_size) == (
        True, 3, "2024", None,
    )  # fmt: skip
    assert SSLConfig(adversary="none").adversary == "none"  # a word here, not the absence of one
    sweep = SweepConfig(epsilons="0.03, 8/255", dims="[32 64]", seeds=1, ssl='{"epochs": 3}')
    assert sweep.epsilons == (0.03, 8 / 255)
    assert (sweep.dims, sweep.seeds, sweep.ssl) == ((32, 64), (1,), {"epochs": 3})


def test_a_whole_number_as_text_keeps_all_its_digits():
    assert VAEConfig(seed="9007199254740993").seed == 9007199254740993  # 2**53 + 1
    assert VAEConfig(epochs="1e3").epochs == 1000


def test_kappa_and_beta_say_the_same():
    """β_eff = κ·H·W / (2·m) (spec §1): .1 for 32²/m=512, .4 for 32²/m=128 at κ=.1."""
    assert VAEConfig(dim=512).beta == pytest.approx(0.1)
    assert VAEConfig(dim=128).beta == pytest.approx(0.4)
    assert VAEConfig(dim=128, beta=0.8).kappa == pytest.approx(0.2)
    assert VAEConfig(size=224, dim=3072, kappa=0.1).beta == pytest.approx(0.8167, abs=1e-4)


def test_a_vae_s_weights_follow_a_change_of_its_dimension():
    vae = VAEConfig(dim=128, beta=0.8)
    assert vae.replace(seed=1).beta == 0.8
    assert vae.replace(dim=64).kappa == vae.kappa and vae.replace(dim=64).beta == pytest.approx(1.6)
    assert vae.replace(dim=64, beta=0.8).kappa == pytest.approx(vae.kappa / 2)
    assert vae.replace(kappa=0.1).beta == pytest.approx(0.4)


def test_the_paper_s_vae_at_224_pixels_is_the_imagenet_one():
    large, small = (VAEConfig(preset="paper", size=size, dataset="imagenet") for size in (224, 32))
    assert (large.dim, large.augmentation) == (3072, "simsiam")
    assert (small.dim, small.augmentation) == (512, "simclr")
    assert VAEConfig(preset="paper", size=224, dim=64, dataset="imagenet").dim == 64
    assert VAEConfig(preset="cifar10", size=224, dataset="imagenet").dim == 512
    for kind in (VAEConfig, SSLConfig):
        with pytest.raises(
            ConfigError, match=r"dataset must be given at size=224: that of preset="
        ):
            kind(preset="paper", size=224)
        assert kind(size=224).dataset == "photos"
    simsiam = dict(preset="paper", method="simsiam", pairing="imagenet")
    with pytest.raises(ConfigError, match="dataset must be given at size=224"):
        SSLConfig(**simsiam)
    large = SSLConfig(**simsiam, dataset="imagenet")
    assert large.mean == (0.485, 0.456, 0.406) and large.std == (0.229, 0.224, 0.225)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_figure_has_its_axes_of_the_preset_and_what_is_given_besides(preset):
    fields = {"preset": preset} | data_of(preset)
    sweep_6, sweep_5 = SweepConfig(**fields), SweepConfig(**fields, figure="5")
    assert min(len(values) for values in (sweep_6.epsilons, sweep_6.betas, sweep_6.dims)) > 2
    assert sweep_6.axes == {} and (sweep_5.epsilons, sweep_5.betas, sweep_5.dims) == ((), (), ())
    assert [*sweep_5.axes] == ["batch_size", "backbone", "epochs"]
    centre = SSLConfig(**fields)
    assert all(getattr(centre, name) in axis for name, axis in sweep_5.axes.items())
    both = SweepConfig(preset=preset, figure=5, epsilons="0.1", axes='{"width": [4]}')
    assert (both.epsilons, both.dims, both.axes) == ((0.1,), (), {"width": [4]})
    assert SweepConfig(preset=preset, axes={"width": [4]}).epsilons == sweep_6.epsilons


def test_knobs_are_flat_names_with_the_defaults_of_their_choice():
    assert SSLConfig(adversary="clae").epsilon == 0.03
    assert SSLConfig(adversary="idaa").epsilon == 0.1
    assert SemiConfig(adversary="idaa").epsilon == 0.5
    assert dict(SSLConfig(method="moco"))["queue"] == 1024  # of the demo's recipe
    assert not hasattr(SSLConfig(), "epsilon")
    config = SSLConfig(adversary="idaa", epsilon=0.3).replace(adversary="clae")
    assert config.epsilon == 0.03  # the knobs of the old choice are dropped
    assert SSLConfig(epsilon=None) == SSLConfig()  # None is the recipe's value, whosever it is
    rows = {(row["name"], row["of"]) for row in SSLConfig.fields()}
    assert ("epsilon", "adversary = idaa") in rows and ("queue", "method = moco") in rows
    assert not any("fixmatch" in choice for _, choice in rows)


RSA_IMAGENET = dict(preset="rsa-imagenet", dataset="imagenet")


@pytest.mark.parametrize(
    "values",
    [
        dict(warmup=3, epochs=3),
        dict(warmup=1, epochs=1, preset="rsa-cifar10"),
        RSA_IMAGENET | dict(warmup=11, epochs=11),
        RSA_IMAGENET | dict(warmup=10, epochs=10),  # also where the recipe's is as long
    ],
)
def test_a_warm_up_as_long_as_the_training_is_refused(values):
    with pytest.raises(ConfigError, match=rf"warmup={values['warmup']} must be less than epochs="):
        SSLConfig(**values)


def test_a_warm_up_is_what_the_user_says_and_a_recipe_s_shrinks_with_the_training():
    assert SSLConfig(warmup=2, epochs=3).warmup == 2
    assert SSLConfig(warmup=50, epochs=60).warmup == 50
    with pytest.raises(ConfigError, match="warmup=2 must be less than epochs=2"):
        SSLConfig(warmup=2, epochs=3).replace(epochs=2)
    config = SSLConfig(**RSA_IMAGENET)
    for epochs, warmup in ((1, 0), (60, 6), (200, 10)):
        short = SSLConfig(**RSA_IMAGENET, epochs=epochs)
        assert short.warmup == warmup and short == config.replace(epochs=epochs)
        assert short.replace(seed=1).warmup == warmup
        assert short.replace(epochs=config.epochs) == config
    assert config.replace(warmup=3, epochs=60).replace(epochs=50).warmup == 3


@pytest.mark.parametrize("path", [*SSLConfig.recipes.glob("*.toml")], ids=lambda path: path.stem)
def test_a_recipe_s_vae_reads_the_images_of_its_encoder(path):
    stages = [kind(preset=path.stem, dataset="/data/images") for kind in (VAEConfig, SSLConfig)]
    for field in ("size", "source_size", "classes", "streamed"):
        vae, encoder = (getattr(config, field) for config in stages)
        assert vae == encoder, field


def test_a_recipe_of_one_s_own_extends_another(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(  # with a byte order mark, as editors of Windows write it
        '\ufeffextends = "paper"\n[ssl]\nepochs = 7\nbatch_size = 512\n'
        "[ssl.where.method.simsiam]\nbase_rate = 0.1\n[ssl.where.adversary.idaa]\nepsilon = 0.3\n"
        "[ssl.where.epochs.9]\nwidth = 32\n"
    )
    config = SSLConfig(preset=str(path), method="simsiam", adversary="idaa")
    assert (config.epochs, config.epsilon, config.optimizer, config.width) == (7, 0.3, "sgd", 64)
    assert config.learning_rate == pytest.approx(0.2)  # .1 for 256 images
    assert SSLConfig(preset=str(path), epochs=9).width == 32  # a condition is of the final value
    assert SSLConfig(preset=str(path), learning_rate=1.0).learning_rate == 1.0
    path.write_text("[ssl]\nepoch = 7\n")
    with pytest.raises(ConfigError, match=r"mine\.toml has 'epoch', which no ssl run knows"):
        SSLConfig(preset=str(path))
    path.write_text("[ssl\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        SSLConfig(preset=str(path))


def test_a_recipe_extends_one_that_lies_beside_it_wherever_the_process_is(tmp_path, monkeypatch):
    (tmp_path / "own/more").mkdir(parents=True)
    (tmp_path / "base.toml").write_text('extends = "demo"\n[ssl]\nepochs = 7\n')
    (tmp_path / "own/mine.toml").write_text('extends = "../base.toml"\n[ssl]\nbatch_size = 32\n')
    for folder, path in ((tmp_path, "own/mine.toml"), (tmp_path / "own/more", "../mine.toml")):
        monkeypatch.chdir(folder)
        config = SSLConfig(preset=path)
        assert (config.epochs, config.batch_size) == (7, 32)


def test_a_home_folder_is_meant_by_every_word_of_the_command_line(tmp_path, monkeypatch):
    """A shell makes no path of the ~ behind @ or in quotes."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.json").write_text('{"epochs": 7}')
    (tmp_path / "my_file_at_home.py").write_text("")
    assert read_words(["~/my_file_at_home.py", "@~/mine.json"]) == {"epochs": 7}
    assert data_command(["shard", "starter", "~/shards"]) == 0
    assert [*(tmp_path / "shards").glob("*.tar")]


def test_conditions_of_a_recipe_hold_settle_and_are_known(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('extends = "demo"\n[ssl.where.compile.true]\nepochs = 7\n')
    assert SSLConfig(preset=str(path), compile=True).epochs == 7
    assert SSLConfig(preset=str(path)).epochs == SSLConfig().epochs
    path.write_text('extends = "demo"\n[ssl.where.batch_size.128]\nbatch_size = 256\n')
    with pytest.raises(ConfigError, match=r"mine\.toml' never settles"):
        SSLConfig(preset=str(path))
    path.write_text("[ssl.where.methd.simclr]\nepochs = 7\n")
    with pytest.raises(ConfigError, match=r"has where\.methd, which no ssl run knows"):
        SSLConfig(preset=str(path))


def test_replaced_values_may_come_in_any_order():
    values = {"epsilon": 0.2, "adversary": "idaa", "method": "moco", "queue": 512}
    orders = [{k: values[k] for k in order} for order in itertools.permutations(values)]
    (first, *others) = [SSLConfig().replace(**order) for order in orders]
    assert all(other == first for other in others) and values.items() <= dict(first).items()
    with pytest.raises(ConfigError, match="has no field 'epsilom'; did you mean 'epsilon'"):
        SSLConfig().replace(epsilom=0.1)


def test_a_field_that_is_added_later_changes_no_identity():
    class Later(SSLConfig):
        novelty: float = 0.0

    assert Later().identity() == SSLConfig().identity()
    assert "novelty" in Later(novelty=1.0).identity()


def test_configurations_are_frozen():
    with pytest.raises(Exception, match="frozen"):
        SSLConfig().epsilon = 1.0


PARAMETERS = "# Parameters: as the notebook has them\nadversary = 'idaa'\nepsilon = None\n"
INJECTED = "# Parameters\nepsilon = 0.3\n"


def kernel(*cells):
    """The names of a kernel after these cells, as IPython keeps them."""
    names = {"In": ["", *cells]}
    for cell in cells:
        exec(cell, names)
    return names


def test_a_notebook_gives_its_parameters():
    assert SSLConfig.from_notebook(kernel(PARAMETERS, INJECTED)).epsilon == 0.3
    assert SSLConfig.from_notebook(kernel(PARAMETERS)).epsilon == 0.1


def test_a_name_that_papermill_injected_and_nobody_knows_is_refused():
    with pytest.raises(ConfigError, match=r"no parameter 'epsilom'; did you mean 'epsilon'"):
        SSLConfig.from_notebook(kernel(PARAMETERS, "# Parameters\nepsilom = 0.3\n"))


def test_a_field_that_is_not_in_the_cell_is_a_parameter_too():
    cell = "# Parameters\nmean = [0.5, 0.5, 0.5]\nlog_every = 1e1\n"
    config = SSLConfig.from_notebook(kernel(PARAMETERS, cell))
    assert (config.mean, config.log_every) == ((0.5, 0.5, 0.5), 10)


def test_the_configuration_cell_runs_again():
    """Names of later cells are no parameters, and a corrected cell replaces the one before."""
    namespace = kernel(PARAMETERS, INJECTED, "figure = 1\nsize = 7\nmean = rows = []\n")
    config = SSLConfig.from_notebook(namespace)
    assert (config.epsilon, config.size, config.mean) == (0.3, 32, None)
    typo = PARAMETERS.replace("epsilon", "epsilom")
    with pytest.raises(ConfigError):
        SSLConfig.from_notebook(kernel(typo))
    assert SSLConfig.from_notebook(kernel(typo, PARAMETERS)).adversary == "idaa"


def test_a_knob_that_papermill_injects_is_a_parameter():
    cell = "# Parameters\ntemperature = 0.2\n"
    assert SSLConfig.from_notebook(kernel(PARAMETERS, cell)).temperature == 0.2
    with pytest.raises(ConfigError, match="queue is a knob of method='moco'"):
        SSLConfig.from_notebook(kernel(PARAMETERS, "# Parameters\nqueue = 7\n"))

"""docs/official.md: each command of the official README, as written there, gives what the official
command's flags say; and the names of the official flags are answered with ours."""

import re
import shlex
from pathlib import Path

import pytest

from idaa_lib.configs import (
    OFFICIAL,
    ConfigError,
    EvalConfig,
    SemiConfig,
    SSLConfig,
    VAEConfig,
)
from idaa_lib.train.__main__ import main, read_words

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "official.md").read_text("utf-8")
# Their flag → our field and how their value is written here; what has no part in the result: None.
FLAGS = {
    "dim": ("dim", int), "kl": ("kappa", float), "mode": ("augmentation", str),
    "dataset": ("dataset", str), "seed": ("seed", int), "resnet": ("backbone", str),
    "adv": ("adversary", lambda _: "idaa"), "eps": ("epsilon", float),
    "save_dir": None, "gpu": None, "vae_path": None,
}  # fmt: skip
STAGES = {"vae": VAEConfig, "ssl": SSLConfig, "eval": EvalConfig}


def lines():
    """Pairs of commands: theirs and ours, in words."""
    table = PAGE.partition("| official README |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| `(python .*?)` \| `(python .*?)` \|$", table, re.M)
    return [tuple(shlex.split(re.sub(r"<.*?>", "x", command)) for command in row) for row in rows]


def test_the_page_has_the_lines_of_the_official_readme():
    """README.md of kai-wen-yang/IDAA: a VAE, SimCLR and SimCLR + IDAA, each with its evaluation."""
    assert [theirs[1] for theirs, _ in lines()] == [
        "train_vae.py", "main.py", "eval_lr.py", "main.py", "eval_lr.py",
    ]  # fmt: skip
    assert ["--adv" in theirs for theirs, _ in lines()] == [False, False, False, True, True]


@pytest.mark.parametrize(("theirs", "ours"), lines())
def test_a_line_of_the_official_readme_is_its_line_here(theirs, ours):
    assert ours[:3] == ["python", "-m", "idaa_lib.train"]
    config = STAGES[ours[3]](**read_words(ours[4:]))
    text = " ".join(theirs[2:])
    flags = dict(re.findall(r"--(\w+)(?: ([^-]\S*))?", text))
    if ours[3] == "eval":  # the run says the rest
        assert config.protocol == "official"
        return
    for flag, value in flags.items():
        # An encoder has the dim of its VAE.
        if FLAGS[flag] and (flag, ours[3]) != ("dim", "ssl"):
            field, read = FLAGS[flag]
            assert getattr(config, field) == read(value), flag
    # Defaults of the official code (docs/spec/idaa.md §1, §4).
    default = dict(epochs=300, split="trainval", dataset="cifar10", size=32, width=64)
    default |= dict(batch_size=128, seed=666) if ours[3] == "vae" else dict(batch_size=256, seed=1)
    assert default.items() <= dict(config).items()
    assert config.adversary == ("idaa" if "adv" in flags else "none") if ours[3] == "ssl" else True


@pytest.mark.parametrize("flag", OFFICIAL)
def test_a_name_of_the_official_code_is_answered_with_ours(flag, capsys):
    ours = OFFICIAL[flag]
    stage = VAEConfig if flag == "kl" else SSLConfig
    values = {"adversary": "idaa"} if flag == "eps" else {}
    sentence = f"SSLConfig has no field {flag!r}; the published code's {flag} is {ours} here."
    with pytest.raises(ConfigError) as refusal:
        stage(**{flag: 0.1}, **values)
    assert str(refusal.value) == sentence.replace("SSLConfig", stage.__name__)
    cells = {"In": [f"# Parameters\n{flag} = 0.1"], flag: 0.1}
    with pytest.raises(ConfigError, match=f"no parameter '{flag}'; the published code's {flag} is"):
        stage.from_notebook(cells)
    dashes = f"--{flag.replace('_', '-')}"
    for words in ([f"--{flag}", "0.1"], [dashes], [f"{dashes}=0.1"], [f"{flag}=0.1"]):
        assert main([stage.stage, *words]) == 2
        error = capsys.readouterr().err
        assert f"the published code's {flag} is {ours} here." in error and error.count("\n") == 1


def test_a_stage_without_the_field_is_not_told_of_it():
    with pytest.raises(ConfigError, match=r"^EvalConfig has no field 'mode'\.$"):
        EvalConfig(mode="simclr")
    with pytest.raises(ConfigError, match="'kl'; the published code's kl is kappa here"):
        VAEConfig(kl=0.1)
    with pytest.raises(ConfigError, match="resnet is backbone here"):
        SemiConfig(resnet="wrn28")


def test_a_flag_is_answered_with_the_dash_that_it_has():
    for name, ours in (("low-dim", "projection_dim"), ("batch-t", "temperature")):
        with pytest.raises(ConfigError, match=f"published code's {name} is {ours} here"):
            SSLConfig(**{name: 8})


def test_the_page_has_every_flag_that_is_answered_and_each_is_answered():
    table = PAGE.partition("## Their flags")[2].partition("\n\n`")[0]
    rows = re.findall(r"^\| (`--.*?) \| (.*?) \|$", table, re.M)
    flags = {
        flag.replace("-", "_"): ours.replace("`", "")
        for theirs, ours in rows
        for flag in re.findall(r"--([\w-]+)", theirs)
    }
    same = {flag for flag, ours in flags.items() if ours == "the same names"} | {"dim"}
    assert OFFICIAL.keys() == flags.keys() - same
    for flag, ours in OFFICIAL.items():
        assert ours.partition("<")[0].rstrip("=") in table.replace("`", ""), flag

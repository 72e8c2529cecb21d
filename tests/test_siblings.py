"""docs/siblings.md: each command of the siblings' READMEs, as written there, gives the
configuration that the specification has (docs/spec/siblings.md §1.4–1.6, §2.5, §3.3)."""

import re
import shlex
from pathlib import Path

import pytest

from idaa_lib.configs import EvalConfig, SSLConfig, TransferConfig

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "siblings.md").read_text("utf-8")
README_KEYS = ("blur", "color", "color_diff", "crop", "grayscale")
MOCO = dict(
    method="moco", temperature=0.2, queue=65536, momentum=0.999, projection_dim=128, batch_size=256,
    optimizer="sgd", schedule="cosine", warmup=0, heads="augself", augmentation="cassle",
    stem="imagenet", learning_rate=0.03,
)  # fmt: skip
IN100 = dict(
    classes="imagenet100.txt", size=224, backbone="resnet50", epochs=500, weight_decay=1e-4
)
STL = dict(
    dataset="stl10-all", size=96, source_size=96, backbone="resnet18", epochs=200,
    weight_decay=5e-4, mean=(0.43, 0.42, 0.39), std=(0.27, 0.26, 0.27),
)  # fmt: skip
CASSLE = dict(condition=README_KEYS, injection="concatenate", gamma="mlp", augself={})
CASSLE |= dict(gamma_depth=6, gamma_width=64)
IRM = dict(
    method="ipirm", backbone="resnet50", stem="cifar", size=32, batch_size=256, epochs=400,
    optimizer="adam", learning_rate=1e-3, weight_decay=1e-6, schedule="constant",
    temperature=0.5, irm_temp=0.5, penalty_weight=0.2, irm_weight_maxim=0.5, maximize_iter=50,
    constrain="relaxed", random_init=True, offline=True, keep_cont=True, retain_group="all",
    mixup=False, baseline=False,
)  # fmt: skip
IRM_STL = IRM | dict(dataset="stl10-all", source_size=96)
IRM_CIFAR = IRM | dict(dataset="cifar100", irm_weight_maxim=0.2)
RSA = dict(
    method="rsa", rsa_views="four", backbone="resnet18", stem="cifar", size=32, batch_size=256,
    epochs=200, optimizer="sgd", learning_rate=0.1, weight_decay=5e-4, schedule="cosine",
    beta0=0.4, momentum=0.99, augmentation="rsa", projection_dim=128,
)  # fmt: skip
RSA_PHOTOGRAPHS = RSA | dict(
    backbone="resnet50", stem="imagenet", size=224, projection_dim=256, schedule="cosine_by_step"
)
IMAGENET = "dataset=<ImageNet>"
LINES = {
    f"preset=cassle-imagenet100 {IMAGENET} method=moco "
    'condition="crop, color, color_diff, blur, grayscale" seed=1': MOCO | IN100 | CASSLE,
    f'preset=cassle-imagenet100 {IMAGENET} condition="" heads=augself': MOCO
    | IN100
    | dict(condition=(), augself={}),
    "preset=cassle-stl10": MOCO | STL | CASSLE,
    f'preset=augself-imagenet100 {IMAGENET} augself="crop=0.5, color=0.5"': MOCO
    | IN100
    | dict(condition=(), augself={"crop": 0.5, "color": 0.5}),
    f"preset=augself-imagenet100 {IMAGENET} method=simsiam": IN100
    | dict(method="simsiam", learning_rate=0.05, projection_dim=2048, pairing="imagenet"),
    "preset=augself-stl10": MOCO | STL | dict(condition=(), augself={"crop": 1, "color": 1}),
    "preset=cassle-stl10 method=simclr": STL
    | CASSLE
    | dict(method="simclr", learning_rate=0.03, temperature=0.2, projection_dim=128),
    "preset=cassle-stl10 method=byol": STL
    | CASSLE
    | dict(method="byol", learning_rate=0.03, projection_dim=256, momentum=0.996),
    "preset=cassle-stl10 method=barlow": STL
    | CASSLE
    | dict(method="barlow", learning_rate=0.03, projection_dim=8192, warmup=10),
    "preset=ipirm-stl10": IRM_STL,
    "preset=ipirm-cifar100": IRM_CIFAR,
    "preset=ipirm-stl10 mixup=true temperature=0.2": IRM_STL | dict(mixup=True, temperature=0.2),
    "preset=ipirm-cifar100 mixup=true temperature=0.2 mixup_max=true offline=false": IRM_CIFAR
    | dict(mixup=True, temperature=0.2, mixup_max=True, offline=False),
    "preset=ipirm-stl10 retain_group=5": IRM_STL | dict(retain_group=5),
    "preset=ipirm-stl10 epochs=1000": IRM_STL | dict(epochs=1000),
    "preset=ipirm-stl10 baseline=true": IRM_STL | dict(baseline=True, debiased=0),
    "preset=ipirm-stl10 baseline=true debiased=0.1": IRM_STL | dict(baseline=True, debiased=0.1),
    "preset=rsa-cifar100": RSA | dict(dataset="cifar100", beta0=0.3),
    "preset=rsa-cifar10": RSA | dict(dataset="cifar10"),
    "preset=rsa-stl10": RSA | dict(dataset="stl10-all", size=64, source_size=96),
    "preset=rsa-imagenet100 dataset=<ImageNet>": RSA_PHOTOGRAPHS
    | dict(learning_rate=0.2, weight_decay=1e-4, classes="imagenet100.txt"),
    "preset=rsa-imagenet dataset=<ImageNet>": RSA_PHOTOGRAPHS
    | dict(learning_rate=4.8, weight_decay=1e-6, batch_size=2048, optimizer="lars", warmup=10),
}


def read_commands(start, end):
    """Commands in backticks in the second column of the tables between two texts of the page."""
    part = PAGE[PAGE.index(start) : PAGE.index(end)]
    cells = [line.split(" | ", 1)[1] for line in part.splitlines() if line.startswith("| ")]
    return [text for cell in cells for text in re.findall(r"`([^`]+)`", cell)]


def test_the_page_has_the_lines_that_are_checked_and_no_others():
    commands = read_commands("## What their READMEs say", "Evaluations:")
    assert {c for c in commands if c.startswith("preset=")} == LINES.keys()


@pytest.mark.parametrize("line", LINES)
def test_a_line_of_a_readme_is_the_published_training(line):
    words = dict(word.split("=", 1) for word in shlex.split(line.replace("<ImageNet>", "/data/in")))
    config = SSLConfig(**words)
    expected = LINES[line]
    assert {name: getattr(config, name) for name in expected} == expected
    if "<ImageNet>" in line:
        assert config.dataset == "/data/in" and config.source_size == 256


def test_the_lines_of_evaluations_are_configurations():
    lines = read_commands("Evaluations:", "## CASSLE and AugSelf")
    kinds = {"transfer": TransferConfig, "eval": EvalConfig}
    configs = []
    for line in lines:
        kind, *words = line.replace("<id>", "some-run").split()
        configs.append(kinds[kind](**dict(word.split("=", 1) for word in words)))
    transfer, *evaluations = configs
    assert (transfer.iterations, transfer.tolerance, transfer.penalize_bias) == (5000, 1e-10, True)
    assert [config.protocol for config in evaluations] == ["official", "official"]

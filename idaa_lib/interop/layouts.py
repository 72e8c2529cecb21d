"""What a published file calls which part of which network (docs/spec/idaa.md §1, §4; siblings.md
§1.10, §2.9, §3.7)."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from idaa_lib.configs import ConfigError
from idaa_lib.data.pool import CIFAR_UNITS
from idaa_lib.methods.augself import augself_head
from idaa_lib.methods.cassle import Conditioned, neutral_condition
from idaa_lib.nets import build_backbone
from idaa_lib.nets.heads import ConditionedProjector, mlp
from idaa_lib.nets.resnet import SHAPES, ResNet
from idaa_lib.nets.vae import VAE

Channels = tuple[float, ...]
Units = tuple[int, Channels, Channels]  # size, mean, std
Keys = str | Sequence[str] | None  # of a condition
Names = dict[str, str]  # parts of our names → of a file's, replaced one after another


class State(dict[str, Tensor]):
    """Tensors by name."""

    def __missing__(self, key: str) -> Tensor:
        raise ConfigError(f"it lacks {key}.")


class Layout(NamedTuple):
    """A kind of file.

    Fields:
        kind: `vae`, or the method.
        stems: kernel size of the first convolution → stem. Empty: the stem follows from the names
            of the shortcut layers.
        project: whose files these are, where others would not do.
    """

    kind: str
    names: Names
    stems: Mapping[int, str] = {}
    project: str = ""


SIMSIAM_IMAGENET, CASSLE, IPIRM, RSA = "encoder.fc.", "backbone.", "g.", "encoder_q_head."
# A key is a prefix of tensor names that only this kind of file has; the first match counts.
LAYOUTS = {
    "fc11.": Layout("vae", {"vae.": ""}),
    SIMSIAM_IMAGENET: Layout("simsiam", {"backbone.": "encoder.", "projector.": "encoder.fc."}),
    "projector.layer": Layout(
        "simsiam",
        {
            "projector.0.": "projector.layer1.0.",
            "projector.1.": "projector.layer1.1.",
            "projector.3.": "projector.layer3.0.",
            "projector.4.": "projector.layer3.1.",
            "predictor.0.": "predictor.layer1.0.",
            "predictor.1.": "predictor.layer1.1.",
            "predictor.3.": "predictor.layer2.",
        },
    ),
    CASSLE: Layout("moco", {}, {7: "imagenet"}, "CASSLE and AugSelf"),
    "projector.": Layout("simclr", {"backbone.": "encoder."}),
    "net.": Layout("plain", {"backbone.": "net.", "projector.": "net.fc."}),
    "linear.": Layout("plain", {"backbone.": "", "projector.": "linear."}),
    IPIRM: Layout(
        "ipirm",
        {"backbone.conv1.": "f.0.", "backbone.bn1.": "f.1.", "projector.": "g."}
        | {f"backbone.layer{i}.": f"f.{i + 2}." for i in (1, 2, 3, 4)},
        {3: "cifar"},
        "IP-IRM",
    ),
    RSA: Layout(
        "rsa",
        {
            "target.backbone.": "encoder_k.",
            "target.projector.": "encoder_k_head.",
            "backbone.": "encoder_q.",
            "projector.": "encoder_q_head.",
            "predictor.": "pred.",
        },
        {3: "cifar", 7: "imagenet"},
        "RSA",
    ),
}
SHORTCUTS: dict[str, Names] = {
    ".ds_conv1.": {"shortcut.0.": "ds_conv1.", "shortcut_bn": "ds_bn1"},
    ".downsample.": {"shortcut.0.": "downsample.0.", "shortcut_bn.": "downsample.1."},
}
# What the published networks have beside a tensor, whether they ever run it or not.
BESIDE = {".ds_bn1.": ".ds_bn1_adv.", "projector.layer1.": "projector.layer2."}
# What a condition of 13 values names, as in CASSLE's README; of 14 in its invariance script.
PUBLISHED_KEYS = {
    13: ("blur", "color", "color_diff", "crop", "grayscale"),
    14: ("blur", "color", "color_diff", "crop", "flip", "grayscale"),
}
# Parts of names that only files have which are not read.
OTHERS = {
    "cls_token": "a vision transformer (ViT)",
    "prototypes": "SwAV",
    "projector_hn.": "a projector that a hypernetwork emits",
    "momentum_encoder.": "MoCo-v3",
}

IMAGENET_UNITS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CASSLE_STL: Units = 96, (0.43, 0.42, 0.39), (0.27, 0.26, 0.27)
# Of RSA's files without max-pooling, by a part of their name (siblings.md §3.3).
RSA_UNITS: dict[str, Units] = {
    "stl10": (64, (0.4408, 0.4279, 0.3867), (0.2682, 0.2610, 0.2686)),
    "tiny": (64, (0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
    "": (32, *CIFAR_UNITS),
}


def read_layout(
    state: State, file: str, condition: Keys = None, injection: str | None = None
) -> tuple[str, dict[str, Any], Names, Units, dict[str, Any]]:
    """What the tensors of `file` are of: the kind, our parts without storage, the file's names for
    them, the published units, and what it says of the knobs of its method.

    condition, injection: as in `load_official`.

    Raises:
        ConfigError: it is of no kind that is read, or its tensors make no network of that kind.
    """
    for part, what in OTHERS.items():
        if any(part in key for key in state):
            _refuse(what)
    mark = next((mark for mark in LAYOUTS if any(key.startswith(mark) for key in state)), None)
    if mark is None:
        some = ", ".join(sorted(state)[:3]) or "no tensor at all"
        raise ConfigError(
            f"it is no VAE, SimCLR, Plain, UEL, SimSiam, CASSLE, AugSelf, IP-IRM or RSA of the "
            f"published projects (it has {some})."
        )
    kind, names, *_ = layout = LAYOUTS[mark]
    if mark != CASSLE and (condition or injection):
        raise ConfigError(f"condition and injection are of CASSLE's files, and it is of {kind!r}.")
    with torch.device("meta"):  # which draws none of the caller's random numbers either
        if kind == "vae":
            vae = _vae(state)
            mean, std = CIFAR_UNITS if vae.size in (32, 84) else IMAGENET_UNITS
            return kind, {"vae": vae}, names, (vae.size, mean, std), {}
        backbone, shortcuts = _backbone(state, layout)
        d = backbone.feature_dim
        if mark == CASSLE:
            kind, heads, others, knobs = _cassle_heads(state, d, condition, injection)
        else:
            heads, others, knobs = _heads(mark, state, d), {}, {}
        parts: dict[str, Any] = {"backbone": backbone, **heads}
        if mark == RSA:
            online = {"backbone": backbone, "projector": heads["projector"]}
            parts["target"] = copy.deepcopy(nn.ModuleDict(online))
    return kind, parts, names | shortcuts | others, _units(mark, backbone, file), knobs


def rename(name: str, names: Names) -> str:
    """What a file calls the tensor that is `name` here."""
    for part, other in names.items():
        name = name.replace(part, other)
    return name


def _refuse(what: str) -> None:
    raise ConfigError(
        f"it is of {what}, which is not read; of CASSLE and AugSelf ResNets by MoCo, SimCLR, "
        f"BYOL, SimSiam and Barlow Twins are."
    )


def _units(mark: str, backbone: ResNet, file: str) -> Units:
    if mark == CASSLE:
        small = backbone.shape == SHAPES["resnet18"]
        return CASSLE_STL if small else (224, *IMAGENET_UNITS)
    if mark == RSA and backbone.stem == "cifar":
        return next(units for part, units in RSA_UNITS.items() if part in file.lower())
    if backbone.stem == "cifar":
        return 32, *CIFAR_UNITS
    return 224 if mark in (SIMSIAM_IMAGENET, RSA) else 84, *IMAGENET_UNITS


def _vae(state: State) -> VAE:
    """The variant by its first residual block, after one convolution of 3 modules a halving."""
    residuals = [int(m[1]) for key in state if (m := re.match(r"encoder\.(\d+)\.convs\.", key))]
    first = min(residuals, default=6)
    d = state[f"encoder.{first}.convs.1.weight"].shape[0]
    dim, flat = state["fc11.weight"].shape
    times, side = first // 3, math.isqrt(flat // d)
    size = {(2, 8): 32, (3, 8): 64, (3, 10): 84, (5, 7): 224}.get((times, side))
    if size is None:
        raise ConfigError(f"no published VAE halves its images {times} times, to {side} × {side}.")
    return VAE(dim, size, d // 2)


def _backbone(state: State, layout: Layout) -> tuple[ResNet, Names]:
    """The ResNet that a file has the tensors of, and what it calls its shortcuts."""
    stages = [rename(f"backbone.layer{stage}.", layout.names) for stage in (1, 2, 3, 4)]
    depths = tuple(
        len({key.removeprefix(stage).split(".")[0] for key in state if key.startswith(stage)})
        for stage in stages
    )
    shape = depths, f"{stages[0]}0.conv3.weight" in state
    name = next((name for name, other in SHAPES.items() if other == shape), None)
    if name is None:
        raise ConfigError(f"its stages of {depths} blocks make none of {', '.join(SHAPES)}.")
    width, _, kernel, _ = state[rename("backbone.conv1.weight", layout.names)].shape
    shortcuts = next((s for s in SHORTCUTS if any(s in key for key in state)), None)
    if not layout.stems:
        stem = "cifar" if shortcuts is None else "imagenet" if kernel == 7 else "mini"
    elif kernel in layout.stems:
        stem = layout.stems[kernel]
    else:
        sides = " or ".join(f"{side}×{side}" for side in layout.stems)
        raise ConfigError(
            f"its first convolution is {kernel}×{kernel}, and that of files of {layout.project} is "
            f"{sides}."
        )
    norms = rename("backbone.bn1_adv.weight", layout.names) in state
    backbone = build_backbone(name, width=width, stem=stem, adversarial_norms=norms)
    return backbone, {} if shortcuts is None else SHORTCUTS[shortcuts]


def _heads(mark: str, state: State, d: int) -> dict[str, nn.Module]:
    """Projector and predictor after d features (idaa.md §4; siblings.md §2.1, §3.2)."""
    outputs = lambda key: state[f"{key}.weight"].shape[0]  # noqa: E731
    match mark:
        case "projector.":
            return {"projector": mlp(d, d, outputs("projector.2"), norm=False)}
        case "net." | "linear.":
            head = "net.fc" if mark == "net." else "linear"
            return {"projector": nn.Linear(d, outputs(head))}
        case "g.":
            return {"projector": mlp(d, outputs("g.0"), outputs("g.3"), bias=False)}
        case "encoder_q_head.":
            hidden, dim = outputs("encoder_q_head.0"), outputs("encoder_q_head.3")
            projector = mlp(d, hidden, dim, last_bias=False)
            predictor = mlp(dim, outputs("pred.0"), dim, last_bias=False)
        case "projector.layer":
            dim, hidden = outputs("projector.layer3.0"), outputs("predictor.layer1.0")
            projector = mlp(d, dim, dim, last_norm=True)
            predictor = mlp(dim, hidden, dim)
        case _:
            dim, hidden = outputs("encoder.fc.6"), outputs("predictor.0")
            projector = mlp(d, d, dim, 3, last_norm=True, affine=False, bias=False)
            predictor = mlp(dim, hidden, dim, bias=False)
    return {"projector": projector, "predictor": predictor}


def _cassle_heads(
    state: State, d: int, condition: Keys, injection: str | None
) -> tuple[str, dict[str, nn.Module], Names, dict[str, Any]]:
    """The framework of a file of CASSLE or AugSelf, its heads after d features (siblings.md §1.3 to
    §1.5), their names and knobs."""
    has = lambda *parts: any(key.startswith(parts) for key in state)  # noqa: E731
    outputs = lambda key: state[f"{key}.weight"].shape[0]  # noqa: E731
    at = "projector.projector." if has("projector.projector.") else "projector."
    last = 6 if has(f"{at}6.") else 3  # of three linear layers, or of two
    inputs, hidden, dim = state[f"{at}0.weight"].shape[1], outputs(f"{at}0"), outputs(f"{at}{last}")
    norm = f"{at}{last + 1}."
    last_norm, affine = has(norm), has(f"{norm}weight", f"{norm}bias")
    if has("predictor."):
        kind = "simsiam" if last_norm else "byol"
    elif last == 6 and hidden != dim:
        _refuse("MoCo-v3")
    else:
        kind = "barlow" if last == 6 else "moco"
    end = {"last_norm": last_norm, "affine": affine}
    projector = augself_head(inputs, hidden, dim, last // 3 + 1, **end)
    projector, knobs = _condition(state, projector, d, inputs - d, condition, injection)
    heads, names = {"projector": projector}, {"projector.": at}
    if knobs["condition"]:
        names = {"projector.gamma.": "projector.aug_processor.", "projector.head.": at}
    if has("predictor."):
        heads["predictor"] = augself_head(dim, outputs("predictor.0"), dim)
    if has("ss_predictor."):
        names |= {"differences.": "ss_predictor."}
        predicted = sorted({k.split(".")[1] for k in state if k.startswith("ss_predictor.")})
        sizes = {k: [outputs(f"ss_predictor.{k}.{i}") for i in (0, 6)] for k in predicted}
        heads["differences"] = nn.ModuleDict(
            {k: augself_head(2 * d, width, values, 3) for k, (width, values) in sizes.items()}
        )
    return kind, heads, names, {"heads": "augself", **knobs}


def _condition(
    state: State, head: nn.Module, d: int, added: int, condition: Keys, injection: str | None
) -> tuple[nn.Module, dict[str, Any]]:
    """The projector that `head`, with inputs `added` to d features, and γ in `state` make, and its
    knobs."""
    options: dict[str, Any] = {"condition": condition or ()}
    keys: tuple[str, ...] = Conditioned.Options(**options).condition
    numbers = [int(k.split(".")[2]) for k in state if k.startswith("projector.aug_processor.")]
    if not (numbers or added):
        if keys or injection:
            raise ConfigError(
                "its projector is given no condition: leave condition and injection out."
            )
        return head, {"condition": ()}
    gamma: nn.Module = nn.Identity()
    knobs: dict[str, Any] = {"gamma": "raw"}
    count = added  # values of a condition
    if numbers:
        depth = max(numbers) // 3 + 1
        first = state["projector.aug_processor.0.weight"]
        width, count = first.shape
        gamma = augself_head(count, width, added or d, depth, last_norm=True)
        knobs = {"gamma": "mlp", "gamma_depth": depth, "gamma_width": width}
    ways = ("concatenate",) if added else ("add", "multiply")
    if injection is None and added:
        injection = "concatenate"
    if injection is None or injection not in ways:
        raise ConfigError(
            f"injection must be {' or '.join(map(repr, ways))}, as its tensors have it, and is "
            f"{injection!r}."
        )
    keys = keys or PUBLISHED_KEYS.get(count, ())
    neutral = neutral_condition(keys)
    if len(neutral) != count:
        raise ConfigError(
            f"its projector is given {count} values of a view, and condition="
            f"{', '.join(keys)!r} names {len(neutral)}."
        )
    knobs |= {"condition": keys, "injection": injection}
    return ConditionedProjector(head, gamma, injection, neutral), knobs

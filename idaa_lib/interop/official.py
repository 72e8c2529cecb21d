"""Published checkpoints of IDAA and its baselines as modules (docs/spec/idaa.md §1, §4).

They are told apart by the names of their tensors. Nothing that a file holds is ever executed
(`weights_only=True`), and a tensor too many or too few is an error that names it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from idaa_lib.configs import ConfigError
from idaa_lib.data.cached import CIFAR_UNITS
from idaa_lib.evaluate.encoders import Encoder
from idaa_lib.nets import build_backbone
from idaa_lib.nets.heads import Embedder, mlp
from idaa_lib.nets.resnet import SHAPES, ResNet
from idaa_lib.nets.vae import VAE

Channels = tuple[float, ...]
_Units = tuple[int, Channels, Channels]  # size, mean, std
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Official:
    """A published checkpoint as modules: frozen, on the CPU, in eval mode.

    kind: vae, simclr, simsiam, or plain (UEL's files are alike: one network, another loss).
    module: the VAE, or the backbone: images (B, 3, size, size) → h (B, D).
    projector: h → z before its L2 norm; predictor: SimSiam's, z → p; None where there is none.
    size, mean, std: of the normalised images that it expects.
    epoch, acc (kNN top-1 on test images, percent): as the file or its name says; else None.
    """

    kind: str
    module: Any
    projector: nn.Module | None
    predictor: nn.Module | None
    size: int
    mean: Channels
    std: Channels
    epoch: int | None
    acc: float | None

    @property
    def units(self) -> _Units:
        return self.size, self.mean, self.std

    def encoder(self, layer: str = "backbone") -> Encoder:
        """As `load_encoder` gives it: `backbone` for h, `projector` for the L2-normalised z.

        Raises:
            ConfigError: it is a VAE, or there is no such layer.
        """
        if self.projector is None:
            raise ConfigError(f"A checkpoint of kind {self.kind!r} holds no encoder.")
        if layer not in ("backbone", "projector"):
            raise ConfigError(f"layer must be backbone or projector, and is {layer!r}.")
        module = Embedder(self.module, self.projector).eval() if layer == "projector" else None
        return Encoder(module or self.module, *self.units)


def load_official(
    path: str | Path,
    *,
    size: int | None = None,
    mean: Channels | None = None,
    std: Channels | None = None,
) -> Official:
    """Read a checkpoint of IDAA (VAE, SimCLR), Plain or UEL, or SimSiam, of CIFAR or ImageNet.

    A stem whose BatchNorm output the published code discards (spec §8.7) comes back as the same
    function: with a BatchNorm there that changes nothing in eval mode.

    Args:
        size, mean, std: what no file says, where it is not as published. CIFAR's statistics for a
            CIFAR stem and for a VAE of 32 or 84 px, else ImageNet's (at 64 px an inference).
            32 px for a CIFAR stem, 224 for the ImageNet SimSiam, else 84 as mini-ImageNet.
    Raises:
        ConfigError: the file is missing or damaged, would run code, or is none of these; tensors
            are missing, left over or of another shape, and which.
    """
    path = Path(path).expanduser()
    state, epoch, acc = _read(path)
    try:
        kind, parts, names, published = _networks(state)
        _fill(parts, state, names)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    units = size or published[0], tuple(mean or published[1]), tuple(std or published[2])
    module: Any = parts["vae" if kind == "vae" else "backbone"]
    if kind == "vae":
        if units[0] != module.size:
            raise ConfigError(f"{path} is of a VAE for size={module.size}, not {size}.")
        _, module.mean, module.std = units
    if epoch is None and (name := re.search(r"epoch_?(\d+)", path.stem)):
        epoch = int(name[1])
    return Official(
        kind, module, parts.get("projector"), parts.get("predictor"), *units, epoch, acc
    )


class _State(dict[str, Tensor]):
    """Tensors by name."""

    def __missing__(self, key: str) -> Tensor:
        raise ConfigError(f"it lacks {key}.")


def _read(path: Path) -> tuple[_State, int | None, float | None]:
    """Tensors by name, without DataParallel's `module.`; epoch and accuracy where they are kept."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ConfigError(f"There is no checkpoint {path}.") from None
    except (IsADirectoryError, PermissionError) as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    except Exception as error:  # a damaged file can raise anything
        if code := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ConfigError(
                f"{path} was not loaded: it holds more than tensors, and wants {code[1]} to be run."
            ) from error
        raise ConfigError(f"{path} is cut short, damaged or no PyTorch checkpoint.") from error
    about: Mapping[str, Any] = {}
    if isinstance(content, Mapping):
        for name in ("net", "model", "state_dict"):  # Plain and UEL, SimCLR, SimSiam (spec §4)
            if isinstance(content.get(name), Mapping):
                about, content = content, content[name]
                break
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ConfigError(f"{path} has no state dict, alone or as net, model or state_dict.")
    prefix = "module." if all(key.startswith("module.") for key in content) else ""
    state = _State((key.removeprefix(prefix), tensor) for key, tensor in content.items())
    epoch, acc = about.get("epoch"), about.get("acc")
    return (
        state,
        epoch if isinstance(epoch, int) else None,
        float(acc) if isinstance(acc, int | float | Tensor) else None,
    )


# Parts of our names → of a file's; first by what only files of this kind have a name begin with.
_Names = dict[str, str]
_SIMSIAM_IMAGENET = "encoder.fc."
_KINDS: dict[str, tuple[str, _Names]] = {
    "fc11.": ("vae", {"vae.": ""}),
    _SIMSIAM_IMAGENET: ("simsiam", {"backbone.": "encoder.", "projector.": "encoder.fc."}),
    "projector.layer": (
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
    "projector.": ("simclr", {"backbone.": "encoder."}),
    "net.": ("plain", {"backbone.": "net.", "projector.": "net.fc."}),
    "linear.": ("plain", {"backbone.": "", "projector.": "linear."}),
}
_SHORTCUTS: dict[str, _Names] = {
    ".ds_conv1.": {"shortcut.0.": "ds_conv1.", "shortcut_bn": "ds_bn1"},
    ".downsample.": {"shortcut.0.": "downsample.0.", "shortcut_bn.": "downsample.1."},
}
# What the published networks have beside a tensor, whether they ever run it or not.
_BESIDE = {".ds_bn1.": ".ds_bn1_adv.", "projector.layer1.": "projector.layer2."}


def _networks(state: _State) -> tuple[str, dict[str, Any], _Names, _Units]:
    """The kind; our parts without storage; the file's names; the published units."""
    mark = next((mark for mark in _KINDS if any(key.startswith(mark) for key in state)), None)
    if mark is None:
        some = ", ".join(sorted(state)[:3]) or "no tensor at all"
        raise ConfigError(
            f"it is no VAE, SimCLR, Plain, UEL or SimSiam of the published projects (it has "
            f"{some})."
        )
    kind, names = _KINDS[mark]
    with torch.device("meta"):  # which draws none of the caller's random numbers either
        if kind == "vae":
            vae = _vae(state)
            units = CIFAR_UNITS if vae.size in (32, 84) else _IMAGENET
            return kind, {"vae": vae}, names, (vae.size, *units)
        backbone, shortcuts = _backbone(state, names.get("backbone.", "backbone."))
        parts = {"backbone": backbone, **_heads(mark, state, backbone.feature_dim)}
    size = 32 if backbone.stem == "cifar" else 224 if mark == _SIMSIAM_IMAGENET else 84
    units = CIFAR_UNITS if backbone.stem == "cifar" else _IMAGENET
    return kind, parts, names | shortcuts, (size, *units)


def _vae(state: _State) -> VAE:
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


def _backbone(state: _State, prefix: str) -> tuple[ResNet, _Names]:
    """The ResNet that the tensors under `prefix` are of, and what they call its shortcuts."""
    layers = re.compile(rf"{re.escape(prefix)}layer([1-4])\.(\d+)\.")
    blocks = {match.groups() for key in state if (match := layers.match(key))}
    depths = tuple(sum(stage == s for stage, _ in blocks) for s in "1234")
    shape = depths, f"{prefix}layer1.0.conv3.weight" in state
    name = next((name for name, other in SHAPES.items() if other == shape), None)
    if name is None:
        raise ConfigError(f"its stages of {depths} blocks make none of {', '.join(SHAPES)}.")
    width, _, kernel, _ = state[f"{prefix}conv1.weight"].shape
    shortcuts = next((s for s in _SHORTCUTS if any(s in key for key in state)), None)
    stem = "cifar" if shortcuts is None else "imagenet" if kernel == 7 else "mini"
    norms = f"{prefix}bn1_adv.weight" in state
    backbone = build_backbone(name, width=width, stem=stem, adversarial_norms=norms)
    return backbone, {} if shortcuts is None else _SHORTCUTS[shortcuts]


def _heads(mark: str, state: _State, d: int) -> dict[str, nn.Module]:
    """Projector and predictor (spec §4) after d features."""
    outputs = lambda key: state[f"{key}.weight"].shape[0]  # noqa: E731
    match mark:
        case "projector.":
            return {"projector": mlp(d, d, outputs("projector.2"), norm=False)}
        case "net." | "linear.":
            head = "net.fc" if mark == "net." else "linear"
            return {"projector": nn.Linear(d, outputs(head))}
        case "projector.layer":
            dim, hidden = outputs("projector.layer3.0"), outputs("predictor.layer1.0")
            projector = mlp(d, dim, dim, last_norm=True)
        case _:
            dim, hidden = outputs("encoder.fc.6"), outputs("predictor.0")
            projector = mlp(d, d, dim, 3, last_norm=True, affine=False, bias=False)
    predictor = mlp(dim, hidden, dim, bias=mark != _SIMSIAM_IMAGENET)
    return {"projector": projector, "predictor": predictor}


@torch.no_grad()
def _fill(parts: dict[str, Any], state: _State, names: _Names) -> None:
    """Give the networks `parts`, made without storage, the tensors of a file; strict."""
    whole = nn.ModuleDict(parts)
    ours = whole.state_dict()
    theirs: dict[str, Tensor] = {}
    for key, tensor in ours.items():
        for part, other in names.items():
            key = key.replace(part, other)
        theirs[key] = tensor
    beside = {key.replace(*pair) for key in theirs for pair in _BESIDE.items()}
    faults = {
        "lacks": (theirs.keys() | beside) - state.keys(),
        "has, beside what belongs there,": state.keys() - theirs.keys() - beside,
        "has other shapes:": {
            f"{key} is {tuple(state[key].shape)} and should be {tuple(tensor.shape)}"
            for key, tensor in theirs.items()
            if key in state and state[key].shape != tensor.shape
        },
    }
    texts = [
        f"it {what} {', '.join(sorted(keys)[:20])}{' and more' if len(keys) > 20 else ''}"
        for what, keys in faults.items()
        if keys
    ]
    if texts:
        raise ConfigError(f"{'; '.join(texts)}.")
    tensors = [state[key] for key in theirs]
    whole.load_state_dict(dict(zip(ours, tensors, strict=True)), assign=True)
    whole.float().eval().requires_grad_(False)
    if "ds_conv1." in names.values() and _SIMSIAM_IMAGENET not in names.values():
        # ReLU sees conv1 itself, past the stem's norm (spec §8.7).
        for name, norm in parts["backbone"].named_children():
            if name in ("bn1", "bn1_adv"):
                norm.reset_parameters()
                norm.running_var.fill_(1 - norm.eps)

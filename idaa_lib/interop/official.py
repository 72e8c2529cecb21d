"""Published checkpoints of IDAA, its baselines and the sibling systems as modules.

Sources: docs/spec/idaa.md §1, §4; docs/spec/siblings.md §1.10, §2.9, §3.7.

They are told apart by the names of their tensors. Nothing that a file holds is ever executed
(`weights_only=True`), and a tensor too many or too few is an error that names it.
"""

from __future__ import annotations

import contextlib
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from idaa_lib.configs import ConfigError, SSLConfig
from idaa_lib.configs.reading import expand, read
from idaa_lib.evaluate.encoders import Encoder
from idaa_lib.interop.layouts import (
    BESIDE,
    SIMSIAM_IMAGENET,
    Channels,
    Keys,
    Names,
    State,
    Units,
    read_layout,
    rename,
)
from idaa_lib.nets.heads import Embedder


@dataclass(frozen=True)
class Official:
    """A published checkpoint as modules: frozen, on the CPU, in eval mode.

    kind: vae, simclr, simsiam, plain (UEL's files are alike: one network, another loss), ipirm,
        rsa; of CASSLE and AugSelf moco (SimCLR's are alike), byol, simsiam or barlow.
    module: the VAE, or the backbone: images (B, 3, size, size) → h (B, D).
    projector: h → z before its L2 norm; predictor: z → p; None where there is none.
    target: RSA's target network, its `backbone` and `projector`; None where a file has none.
    differences: AugSelf's heads by name, [h_a ; h_b] → (B, ·); None where there are none.
    knobs: what a file of CASSLE or AugSelf says of the knobs of its method.
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
    target: nn.Module | None = None
    differences: nn.ModuleDict | None = None
    knobs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def units(self) -> Units:
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
    condition: Keys = None,
    injection: str | None = None,
) -> Official:
    """Read a checkpoint of IDAA (VAE, SimCLR), Plain or UEL, SimSiam, CASSLE, AugSelf, IP-IRM, RSA.

    Whether max-pooling follows a stem of 3×3 no tensor tells: the kind of file does. A stem whose
    BatchNorm output the published code discards (idaa.md §8.7) comes back as the same function:
    with a BatchNorm there that changes nothing in eval mode.

    Args:
        size, mean, std: what no file says, where it is not as published. CIFAR's statistics for a
            CIFAR stem and for a VAE of 32 or 84 px, else ImageNet's (at 64 px an inference).
            32 px for a CIFAR stem, 224 for the ImageNet SimSiam, else 84 as mini-ImageNet.
            CASSLE and AugSelf: STL-10's (96 px) for a ResNet-18, else ImageNet's (224). IP-IRM:
            CIFAR-10's at 32 px, whatever it was trained on. RSA: by the data set in the file's
            name; else CIFAR's at 32 px without max-pooling, ImageNet's at 224 with it.
        condition: what CASSLE's projector is told of a view, as the knob of this name; None for its
            README's, with `flip` where it takes 14 values.
        injection: `add` or `multiply`, where features and γ(ω) are not concatenated: no tensor
            tells which.
    What wrappers add to names (`module.`, `model.`, `_orig_mod.`) is taken off, and counters of
    batches that old files lack are set to 0; both is printed.

    Raises:
        ConfigError: the file is missing or damaged, would run code, or is none of these (ViT, SwAV,
            MoCo-v3 and hypernetworks are not read); tensors are missing, left over, of another
            shape, NaN or infinite, and which; condition or injection is not what the tensors have;
            size, mean or std is of no images.
    """
    path = expand(path)
    overrides: dict[str, Any] = {"size": size, "mean": mean, "std": std}
    overrides = {name: read(SSLConfig, name, value) for name, value in overrides.items()}
    SSLConfig(**overrides)  # which refuses what no images have
    file = _read(path)
    try:
        state, prefixes, epoch, acc = _unwrap(file)
        kind, parts, names, published, knobs = read_layout(state, path.name, condition, injection)
        counters = _fill(parts, state, names)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except Exception as error:  # tensors that fit no network, such as one of no dimension
        raise ConfigError(f"{path}: its tensors make no network that was published.") from error
    notes = [f"{', '.join(prefixes)} taken off its names"] if prefixes else []
    notes += [f"{counters} missing num_batches_tracked set to 0"] if counters else []
    if notes:
        print(f"{path.name}: {'; '.join(notes)}.")
    units: Any = [own or its for own, its in zip(overrides.values(), published, strict=True)]
    module: Any = parts["vae" if kind == "vae" else "backbone"]
    if kind == "vae":
        if units[0] != module.size:
            raise ConfigError(f"{path} is of a VAE for size={module.size}, not {units[0]}.")
        _, module.mean, module.std = units
    if epoch is None and (name := re.search(_EPOCH, path.stem)):
        epoch = int(name[1])
    heads = {k: parts.get(k) for k in ("projector", "predictor", "target", "differences")}
    return Official(
        kind,
        module,
        size=units[0],
        mean=units[1],
        std=units[2],
        epoch=epoch,
        acc=acc,
        knobs=knobs,
        **heads,
    )


# In a file's name: model_epoch292, ckpt-500, model_400, Train_cifar10_RSA_aa_200.
_EPOCH = r"(?:epoch_?|ckpt-|model_|Train[\w-]*_)(\d+)"
_CASSLE = ("backbone", "projector", "predictor", "prototypes", "ss_predictor")
# Where a state dict lies in a file: Plain and UEL, SimCLR, SimSiam (spec §4), then what others use.
NESTS = ("net", "model", "state_dict", "model_state_dict", "network", "module")
# What DataParallel and Lightning put before each name.
PREFIXES = ("module.", "model.")


def _read(path: Path) -> Any:
    """What a file holds, of which nothing is executed."""
    if not os.path.isfile(path):  # a pipe or device might never end
        raise ConfigError(
            f"{path} cannot be read: it is no file."
            if os.path.exists(path)
            else f"There is no checkpoint {path}."
        )
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                size = sum(member.file_size for member in archive.infolist())
                # torch packs hardly anything, and sees no bytes that have changed.
                if size > 2**20 + 2 * path.stat().st_size or archive.testzip():
                    raise zipfile.BadZipFile
        return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    except Exception as error:  # a damaged file can raise anything
        if code := re.search(r"(?<=GLOBAL )[\w.]+|TorchScript", str(error)):
            raise ConfigError(
                f"{path} was not loaded: it holds more than tensors, and wants {code[0]} to be "
                f"run; if you trust it, open it where it was made, and save its weights alone: "
                f"torch.save(model.state_dict(), 'weights.pth')."
            ) from error
        raise ConfigError(
            f"{path} is cut short, damaged or no PyTorch checkpoint: copy or download it again."
        ) from error


def _unwrap(content: Any) -> tuple[State, list[str], int | None, float | None]:
    """Tensors by name, without the prefixes that follow; epoch and accuracy where they are kept."""
    about: Mapping[str, Any] = {}
    if isinstance(content, Mapping) and isinstance(content.get("backbone"), Mapping):
        match content.get("trainer"):
            case {"iteration": int(steps), "epoch_length": int(length)} if length > 0:
                about = {"epoch": steps // length}
        content = dict(_flatten({k: content[k] for k in _CASSLE if k in content}))
    for _ in NESTS:  # a file may hold itself
        outer = content if isinstance(content, Mapping) else {}
        inner = next((outer[name] for name in NESTS if isinstance(outer.get(name), Mapping)), None)
        if inner is not None:
            about, content = {**about, **outer}, inner
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ConfigError(f"it has no state dict, alone or as {', '.join(NESTS)}.")
    tensors, prefixes = dict(_flatten(content)), list[str]()
    if any("_orig_mod." in key for key in tensors):  # of torch.compile, at any place
        tensors = {key.replace("_orig_mod.", ""): value for key, value in tensors.items()}
        prefixes.append("_orig_mod.")
    while tensors and (
        prefix := next((p for p in PREFIXES if all(key.startswith(p) for key in tensors)), None)
    ):
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
        prefixes.append(prefix)
    for key, tensor in tensors.items():
        plain = tensor.layout is torch.strided and tensor.device.type == "cpu"
        if not plain or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ConfigError(f"it is damaged: {key} lacks the values that its shape needs.")
    epoch, acc = about.get("epoch"), about.get("acc")
    accuracy = None
    if isinstance(acc, int | float | Tensor):
        with contextlib.suppress(ValueError, OverflowError, RuntimeError):  # not one number
            accuracy = float(acc)
    return State(tensors), prefixes, epoch if type(epoch) is int else None, accuracy


def _flatten(content: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, Any]]:
    """What is in mappings inside one another, by names joined with dots, the inner ones without
    `module.`."""
    wrapped = all(str(key).startswith("module.") for key in content)
    for key, value in content.items():
        name = at + (str(key).removeprefix("module.") if wrapped and at else str(key))
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{name}.")
        else:
            yield name, value


@torch.no_grad()
def _fill(parts: dict[str, Any], state: State, names: Names) -> int:
    """Give the networks `parts`, made without storage, the tensors of a file; strict, but for
    counters of batches, which no network here reads: how many of them the file lacks."""
    whole = nn.ModuleDict(parts)
    ours = whole.state_dict()
    theirs = {rename(key, names): tensor for key, tensor in ours.items()}
    beside = {key.replace(*pair) for key in theirs for pair in BESIDE.items()}
    lacking = (theirs.keys() | beside) - state.keys()
    counters = [key for key in lacking if key.endswith("num_batches_tracked")]
    state |= {key: torch.tensor(0) for key in counters}
    broken = sorted(key for key, tensor in state.items() if not tensor.isfinite().all())
    if broken:
        raise ConfigError(
            f"{', '.join(broken[:3])}{' and more' if len(broken) > 3 else ''} hold values that are "
            f"NaN or infinite: its training had failed; take a file of an earlier epoch."
        )
    faults = {
        "lacks": lacking - {*counters},
        "has, beside what belongs there,": state.keys() - theirs.keys() - beside,
        "has other shapes:": {
            f"{key} is {tuple(state[key].shape)} and should be {tuple(tensor.shape)}"
            for key, tensor in theirs.items()
            if key in state and state[key].shape != tensor.shape
        },
    }
    texts = [
        f"it {what} {', '.join(sorted(keys)[:2])}{' and more' if len(keys) > 2 else ''}"
        for what, keys in faults.items()
        if keys
    ]
    if texts:
        raise ConfigError(f"{'; '.join(texts)}.")
    tensors = [state[key] for key in theirs]
    whole.load_state_dict(dict(zip(ours, tensors, strict=True)), assign=True)
    whole.float().eval().requires_grad_(False)
    if "ds_conv1." in names.values() and SIMSIAM_IMAGENET not in names.values():
        # ReLU sees conv1 itself, past the stem's norm (spec §8.7).
        for name, norm in parts["backbone"].named_children():
            if name in ("bn1", "bn1_adv"):
                norm.reset_parameters()
                norm.running_var.fill_(1 - norm.eps)
    return len(counters)

"""Encoders as files for other frameworks."""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from idaa_lib.configs import ConfigError
from idaa_lib.configs.reading import expand
from idaa_lib.evaluate.encoders import Encoder, load_encoder
from idaa_lib.interop.official import Official
from idaa_lib.nets import evaluating
from idaa_lib.nets.resnet import ResNet, torchvision_weights
from idaa_lib.runs import Run, RunError


def export(
    source: Run | str | Encoder | Official | None,
    path: str | Path,
    format: str | None = None,
) -> Path:
    """Write an encoder for another framework; the path of the file.

    The main norms alone are written; adversarial ones serve training. Images are expected as the
    encoder has them: (B, 3, size, size), normalised by its mean and std.

    Args:
        source: a finished SSL run, its id or path (None: as `load_encoder`); or an encoder, of
            `load_encoder` or `load_official`.
        format: `torchvision`, a state dict for `torchvision.models.resnet…` without `fc`;
            `safetensors`, the same names, for any encoder, with size, mean and std as metadata;
            `onnx`, a graph images → features for any batch size, checked with onnxruntime;
            `detectron2`, a .pkl for MODEL.WEIGHTS of a ResNet backbone with STRIDE_IN_1X1 False,
            INPUT.FORMAT "RGB", PIXEL_MEAN and PIXEL_STD 255 times mean and std; reading it takes
            NumPy 1.26 or newer. None: as the path ends, in .onnx, .safetensors or .pkl
            (`detectron2`), else `torchvision`.
    Raises:
        ConfigError: the format cannot hold this encoder, needs a package, or the path is not
            writable. RunError: there is no such run.
    """
    path = expand(path)
    if format is None:
        format = _ENDINGS.get(path.suffix.lower(), "torchvision")
    if format not in _WRITERS:
        raise ConfigError(f"format must be one of {', '.join(_WRITERS)}, and is {format!r}.")
    if isinstance(source, Official):
        encoder = source.encoder()
    else:
        encoder = source if isinstance(source, Encoder) else load_encoder(source)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.touch()  # fails before any work where the path cannot be written
        _WRITERS[format](encoder, draft)
        os.replace(draft, path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}.") from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
    return path


def _imagenet_resnet(encoder: Encoder, format: str) -> dict[str, Tensor]:
    """Weights under torchvision's names, if a framework's own ResNet computes the same of them."""
    backbone = encoder.module
    if not isinstance(backbone, ResNet):
        raise ConfigError(
            f"format={format!r} holds the backbone of a ResNet, not a {type(backbone).__name__}: "
            f"use safetensors or onnx."
        )
    if backbone.stem != "imagenet":
        raise ConfigError(
            f"format={format!r} has a stem of 7×7, stride 2 and max-pooling, and this encoder was "
            f"trained with stem={backbone.stem!r}: use safetensors or onnx."
        )
    return {key: tensor.cpu() for key, tensor in torchvision_weights(backbone).items()}


def _torchvision(encoder: Encoder, path: Path) -> None:
    weights = _imagenet_resnet(encoder, "torchvision")
    if (width := encoder.module.width) != 64:
        raise ConfigError(
            f"torchvision's ResNets begin with 64 channels, and this one with width={width}: use "
            f"safetensors or onnx."
        )
    torch.save(weights, path)


def _safetensors(encoder: Encoder, path: Path) -> None:
    module, *units = encoder
    about = {key: str(value) for key, value in zip(("size", "mean", "std"), units, strict=True)}
    if isinstance(module, ResNet):
        weights = torchvision_weights(module)
        about |= {"names": "torchvision", "stem": module.stem, "width": str(module.width)}
    else:
        weights = {k: v for k, v in module.state_dict().items() if "_adv." not in k}
    save_file({k: v.cpu().contiguous() for k, v in weights.items()}, path, metadata=about)


def _detectron2(encoder: Encoder, path: Path) -> None:
    """Detectron2 reads no other format of backbones than a pickle; it holds arrays alone.

    Checked by undoing the renaming with MoCo's published table of names and comparing features
    with torchvision's; Detectron2 itself has not read one.
    """
    weights = {}
    for key, tensor in _imagenet_resnet(encoder, "detectron2").items():
        if key.endswith("num_batches_tracked"):
            continue
        key = re.sub(r"layer(\d)", lambda stage: f"res{int(stage[1]) + 1}", key)
        key = re.sub(r"\bbn(\d)", r"conv\1.norm", key)
        key = key.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        weights[key if key.startswith("res") else f"stem.{key}"] = tensor.numpy()
    content = {"model": weights, "__author__": "IDAA workbench", "matching_heuristics": True}
    path.write_bytes(pickle.dumps(content))


def _onnx(encoder: Encoder, path: Path) -> None:
    """By torch's exporter; run by onnxruntime on batches of other sizes, before it is kept."""
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 - the exporter's own need
    except ImportError as error:
        raise ConfigError(
            f"format='onnx' needs {error.name}: pip install 'idaa_lib[onnx]'."
        ) from error
    module, size, mean, std = encoder
    module = copy.deepcopy(module).cpu()
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    with evaluating(module), torch.no_grad():
        torch.onnx.export(
            module,
            (images[:2],),
            path,
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=18,  # the first that torch's exporter writes without a conversion
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        model = onnx.load(path)
        onnx.helper.set_model_props(model, {"mean": str(mean), "std": str(std)})
        onnx.save(model, path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        for batch in (images[:1], images[:3]):
            features = torch.from_numpy(session.run(None, {"images": batch.numpy()})[0])
            expected = module(batch)
            if not torch.allclose(features, expected, rtol=1e-3, atol=1e-4):
                apart = (features - expected).abs().max()
                raise RunError(
                    f"onnxruntime's features differ by up to {apart:.2g} from PyTorch's: nothing "
                    f"was written."
                )


_WRITERS: dict[str, Callable[[Encoder, Path], None]] = {
    "torchvision": _torchvision,
    "safetensors": _safetensors,
    "onnx": _onnx,
    "detectron2": _detectron2,
}
_ENDINGS = {".onnx": "onnx", ".safetensors": "safetensors", ".pkl": "detectron2"}

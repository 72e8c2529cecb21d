"""3×3 convolutions by Winograd's minimal filtering, on CPUs with AVX-512 bf16.

Lavin & Gray 2016 (arXiv:1509.09308), F(2×2, 3×3): a convolution, the gradient of its input and that
of its weight take 2.25 times fewer products, summed in fp32. What is multiplied are transforms,
rounded to bf16 once more: an output differs from the exact one by .4 % of its norm where oneDNN's
differs by .23 % (most of it the output's own rounding). Where a processor has AMX too, oneDNN's
kernels are left alone. Measured: benchmarks/results, `simclr_step_ratio`, `idaa_step_ratio`.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

SOURCE = Path(__file__).with_name("winograd.cpp")
FLAGS = ["-std=c++20", "-O3", "-fopenmp", "-shared", "-fPIC", "-mfma"] + [
    f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "bf16")
]
CHANNELS = 64  # a layer's must be multiples
SIDE = 4  # pixels; on smaller maps most of a kernel lies on the padding, which oneDNN leaves out

possible = torch.cpu._is_avx512_bf16_supported()
wins = possible and not torch.cpu._is_amx_tile_supported()
loaded = False


def load() -> None:
    """Build the kernels, once for a user and a version, and load them.

    Raises:
        RuntimeError: the compiler did not take the source, or there is none.
        OSError: the cache cannot be written, or the library not be loaded.
    """
    global loaded
    if not loaded:
        torch.ops.load_library(_built())
        torch.library.register_fake("idaa_winograd::convolve", _like_convolve)
        torch.library.register_fake("idaa_winograd::weight_gradient", _like_weight_gradient)
        loaded = True


def _built() -> Path:
    """The library, from the cache of torch's extensions or compiled into it (a dozen seconds)."""
    from torch.utils import cpp_extension  # half a second, which a start without it keeps

    made_of = SOURCE.read_bytes() + " ".join([*FLAGS, torch.__version__]).encode()
    key = hashlib.sha256(made_of).hexdigest()[:16]
    cache = os.environ.get("TORCH_EXTENSIONS_DIR", "~/.cache/torch_extensions")
    library = Path(cache).expanduser() / f"idaa_winograd-{key}.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(library.with_suffix(".lock")):
        if not library.exists():
            half = library.with_suffix(".part")
            command = [cpp_extension.get_cxx_compiler(), *FLAGS, str(SOURCE), "-o", str(half)]
            command += [f"-I{path}" for path in cpp_extension.include_paths("cpu")]
            command += [f"-L{path}" for path in cpp_extension.library_paths("cpu")]
            try:
                subprocess.run(
                    [*command, "-ltorch_cpu", "-lc10"], check=True, capture_output=True, text=True
                )
            except (OSError, subprocess.CalledProcessError) as error:
                said = getattr(error, "stderr", None) or str(error)
                raise RuntimeError(f"{command[0]} did not build {SOURCE.name}: {said}") from error
            half.replace(library)
    return library


def serves(weight: Tensor) -> bool:
    """Whether these kernels are for layers of such a weight (K, C, 3, 3), of stride 1."""
    wide = weight.shape[0] % CHANNELS == weight.shape[1] % CHANNELS == 0
    return wide and weight.device.type == "cpu"


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether they convolve such maps x (B, C, H, W) with it."""
    height, width = x.shape[2:]
    halves = (x.dtype, weight.dtype) == (torch.bfloat16, torch.float32)
    return halves and height % 2 == width % 2 == 0 and min(height, width) >= SIDE


class Winograd(torch.autograd.Function):
    """x (B, C, H, W) in bf16, weight (K, C, 3, 3) in fp32 → their convolution with padding 1
    (B, K, H, W) in bf16; for what `fits`, once kernels are loaded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.ops.idaa_winograd.convolve(x, weight, False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        kernels, (for_x, for_weight) = torch.ops.idaa_winograd, ctx.needs_input_grad
        return (
            kernels.convolve(gradient, weight, True) if for_x else None,
            kernels.weight_gradient(x, gradient) if for_weight else None,
        )


def _like_convolve(maps: Tensor, weight: Tensor, turned: bool) -> Tensor:
    shape = (maps.shape[0], weight.shape[1 if turned else 0], *maps.shape[2:])
    return maps.new_empty(shape).contiguous(memory_format=torch.channels_last)


def _like_weight_gradient(maps: Tensor, gradient: Tensor) -> Tensor:
    found = maps.new_empty((gradient.shape[1], maps.shape[1], 3, 3), dtype=torch.float32)
    return found.contiguous(memory_format=torch.channels_last)

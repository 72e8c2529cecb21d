"""`make profile`: where the time of a training step goes, on one page, and a trace of it.

    python benchmarks/profile_step.py [simclr|idaa]      # idaa without an argument

Writes `outputs/profile/<method>-trace.json` (chrome://tracing, ui.perfetto.dev) and
`<method>.txt`: the parts of a step that is not recorded; what was computed and moved, counted
operation by operation, against what this machine was measured to do at best; on a GPU also the
step as training runs it, recorded as a CUDA graph: its time, the host's, waits for the device, and
its kernels by kind. The figures are a result file too.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import record
import sides
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from idaa_lib.adversaries import NoAdversary
from idaa_lib.runs import outputs_root
from idaa_lib.runs.machine import hardware, versions
from idaa_lib.train.graphs import WARM_UP
from idaa_lib.train.loop import Fit

STEPS, RECORDED_STEPS, TRACED_STEPS = 5, 30, 3
PROTOCOL = f"""One step, ResNet-18 of the paper, batch {sides.BATCH}, after a warm-up: the median of
{STEPS}, and the mean of each part, neither compiled nor recorded. computed, moved: counted
operation by operation (moved as if nothing were fused or cached); baseline: what the machine did at
best, a large product of matrices and a large copy. On a GPU recorded_*: the step as a CUDA graph,
the mean of {RECORDED_STEPS} in a row; host: until the last was launched; waits: calls that waited
for the device meanwhile; kernels_*: milliseconds of a step by the profiler, mean of {TRACED_STEPS}
steps; baseline: how many kernels."""
CUDA = sides.DEVICE.type == "cuda"
# Parts of the names of CUDA kernels, by kind; the first kind that fits counts.
KINDS = {
    "normalisation": ("batch_norm", "batchnorm", "bn_fw", "bn_bw"),
    "layout": ("nchwtonhwc", "nhwctonchw"),
    "convolution": ("conv", "cudnn", "fprop", "dgrad", "wgrad"),
    "matrix product": ("gemm", "gemv", "cublas"),
    "optimiser": ("multi_tensor", "adam"),
    "copy": ("memcpy", "memset", "copy"),
    "reduction": ("reduce", "softmax", "triton_red", "triton_per"),
    "elementwise": ("elementwise", "triton_poi", "fill"),
    "indexing": ("index", "gather", "scatter"),
}


class Moved(TorchDispatchMode):
    """Bytes of all tensors that operations read and write: what goes through memory if nothing is
    fused and nothing stays in a cache (views and reshapes move nothing and are left out)."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            leaves = torch.utils._pytree.tree_leaves((args, kwargs, result))
            tensors = {id(t): t for t in leaves if isinstance(t, Tensor)}
            self.bytes += sum(t.numel() * t.element_size() for t in tensors.values())
        return result


def main(words: list[str]) -> int:
    name = words[0] if words else "idaa"
    if name not in ("simclr", "idaa"):
        print(f"The method must be simclr or idaa, and is {name!r}.", file=sys.stderr)
        return 2
    sides.COMPILE = sides.RECORD = False  # such a step has no parts
    spent: dict[str, list[float]] = defaultdict(list)
    with _watch(spent):
        step = sides.PARTS[f"{name}-ours"]()
        step()
        spent.clear()
        seconds = [_time(step) for _ in range(STEPS)]
        parts = {part: sum(values) / STEPS for part, values in spent.items()}
    folder = outputs_root() / "profile"
    folder.mkdir(parents=True, exist_ok=True)
    with FlopCounterMode(display=False) as flops, Moved() as moved:
        step()
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] * CUDA
    with torch.profiler.profile(activities=activities) as trace:
        step()
    trace.export_chrome_trace(str(folder / f"{name}-trace.json"))
    page, rows = _page(name, median(seconds), parts, flops.get_total_flops(), moved.bytes)
    if CUDA:
        more = recorded_rows(name)
        rows += more
        page += "\n" + "\n".join(f"{r['what']:<28}{r['value']:>10,.2f} {r['unit']}" for r in more)
    (folder / f"{name}.txt").write_text(page, encoding="utf-8")
    print(f"{page}\n{folder / f'{name}-trace.json'}")
    print(record.write(f"profile-{name}", " ".join(PROTOCOL.split()), rows))
    return 0


@contextmanager
def _watch(spent: dict[str, list[float]]) -> Iterator[None]:
    """Time the parts of `Fit.train_step` by wrapping what it calls; each part alone, without the
    parts that it calls in turn."""
    plain = Fit.__init__
    inside: list[float] = []

    def watch(owner: Any, attribute: str, part: str) -> None:
        call = getattr(owner, attribute)

        def time_call(*args: Any, **kwargs: Any) -> Any:
            inside.append(0.0)
            seconds, result = _clock(lambda: call(*args, **kwargs))
            spent[part].append(seconds - inside.pop())
            if inside:
                inside[-1] += seconds
            return result

        setattr(owner, attribute, time_call)

    class Watched:
        """An adversary is called as an object, which an attribute of it cannot stand in for."""

        def __init__(self, adversary: Any) -> None:
            self.adversary, self.attack = adversary, adversary.__call__
            watch(self, "attack", "attack")

        def __getattr__(self, name: str) -> Any:
            return getattr(self.adversary, name)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self.attack(*args, **kwargs)

    def build(fit: Any, *args: Any, **kwargs: Any) -> None:
        plain(fit, *args, **kwargs)
        watch(fit, "train_step", "losses, logging, the rest")
        watch(fit, "_numbers", "random numbers")
        watch(fit.method, "draw", "views")
        watch(fit.accelerator, "backward", "backward")
        if not isinstance(fit.adversary, NoAdversary):
            fit.adversary = Watched(fit.adversary)
        make = fit.method.step

        def step(*args: Any) -> Any:
            result = make(*args)
            if result.adversarial_loss is not None:
                watch(result, "adversarial_loss", "adversarial forward")
            return result

        fit.method.step = step
        watch(fit.method, "step", "forward")
        # `prepare_optimizer` wraps it later: the inner one is what costs.
        watch(fit.optimizer, "step", "optimiser")

    Fit.__init__ = build  # type: ignore
    try:
        yield
    finally:
        Fit.__init__ = plain  # type: ignore


def _clock(call: Callable[[], Any]) -> tuple[float, Any]:
    if CUDA:
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = call()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def _time(call: Callable[[], Any]) -> float:
    return _clock(call)[0]


def recorded_rows(name: str) -> list[dict[str, Any]]:
    """Rows of the step as training runs it on a GPU, recorded where it can be."""
    sides.RECORD = True
    step = sides.PARTS[f"{name}-ours"]()
    for _ in range(WARM_UP + 2):  # as they are, the recording, and one replay
        step()
    torch.cuda.synchronize()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        start = time.perf_counter()
        first.record()
        for _ in range(RECORDED_STEPS):
            step()
        last.record()
        host = 1000 * (time.perf_counter() - start) / RECORDED_STEPS
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    elapsed = first.elapsed_time(last) / RECORDED_STEPS
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        for _ in range(TRACED_STEPS):
            step()
        torch.cuda.synchronize()
    kernels = [
        (event.name, event.time_range.elapsed_us())
        for event in trace.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    return [
        record.row("recorded_step", round(elapsed, 3), "ms", RECORDED_STEPS),
        record.row("recorded_host", round(host, 3), "ms", RECORDED_STEPS),
        record.row("recorded_waits", len(waits) / RECORDED_STEPS, "a step", RECORDED_STEPS),
        *kernel_rows(kernels, TRACED_STEPS),
    ]


def kernel_rows(kernels: list[tuple[str, float]], steps: int) -> list[dict[str, Any]]:
    """Milliseconds a step of each kind of kernel, the longest first, and of all.

    Args:
        kernels: name and microseconds of each that ran in `steps` steps.
    """
    times: dict[str, list[float]] = defaultdict(list)
    for name, microseconds in kernels:
        times[kind(name)].append(microseconds)
        times["all"].append(microseconds)
    return [
        record.row(
            f"kernels_{kind}",
            round(sum(each) / 1000 / steps, 3),
            "ms",
            steps,
            None,
            round(len(each) / steps),
        )
        for kind, each in sorted(times.items(), key=lambda item: -sum(item[1]))
    ]


def kind(kernel: str) -> str:
    """The kind of a CUDA kernel by its name, `other` where no part of it tells."""
    name = kernel.lower()
    return next((k for k, parts in KINDS.items() if any(p in name for p in parts)), "other")


def ceilings() -> tuple[float, float]:
    """FLOP/s of a large product of matrices (bf16 where steps use it), and bytes/s of a large copy,
    each the best of several."""
    dtype = torch.bfloat16 if sides.bf16() else torch.float32
    n = 8192 if CUDA else 2048
    a, b = (torch.randn(n, n, device=sides.DEVICE, dtype=dtype) for _ in range(2))
    product = min(_time(lambda: a @ b) for _ in range(8))
    source = torch.empty((2**30 if CUDA else 2**28), dtype=torch.uint8, device=sides.DEVICE)
    target = torch.empty_like(source)
    copy = min(_time(lambda: target.copy_(source)) for _ in range(8))
    return 2 * n**3 / product, 2 * source.numel() / copy


def _page(
    name: str, seconds: float, parts: dict[str, float], flops: int, moved: int
) -> tuple[str, list[dict[str, Any]]]:
    """A page to read, and the rows of a result file."""
    fast, wide = ceilings()
    rows = [record.row("step_seconds", round(seconds, 4), "s", STEPS)]
    rows += [record.row(part, round(value, 4), "s", STEPS) for part, value in parts.items()]
    rows += [
        record.row("computed", round(flops / 1e9), "GFLOP", 1),
        record.row(
            "flop_rate", round(flops / seconds / 1e9), "GFLOP/s", STEPS, None, round(fast / 1e9)
        ),
        record.row("moved", round(moved / 2**30, 1), "GiB", 1),
        record.row(
            "byte_rate", round(moved / seconds / 1e9, 1), "GB/s", STEPS, None, round(wide / 1e9, 1)
        ),
    ]
    lines = [
        f"One {name} step, batch {sides.BATCH}, ResNet-18 of the paper",
        f"{hardware()}; torch {versions()['torch']}; {'bf16' if sides.bf16() else 'fp32'}",
        f"median of {STEPS} steps after a warm-up: {1000 * seconds:,.1f} ms, "
        f"{sides.BATCH / seconds:,.0f} images/s",
        "",
    ]
    for part, value in sorted(parts.items(), key=lambda item: -item[1]):
        share = value / sum(parts.values())
        lines.append(
            f"{part:<28}{1000 * value:>10,.1f} ms {share:>7.1%}  {'#' * round(40 * share)}"
        )
    lines += [
        "",
        f"computed   {flops / 1e9:>9,.0f} GFLOP  {flops / seconds / 1e12:>8.3f} TFLOP/s  "
        f"{flops / seconds / fast:>6.1%} of {fast / 1e12:.2f} (largest product of matrices)",
        f"moved      {moved / 2**30:>9,.1f} GiB    {moved / seconds / 1e9:>8.1f} GB/s     "
        f"{moved / seconds / wide:>6.1%} of {wide / 1e9:.1f} (a large copy)",
        "moved: what operations read and write one by one, as if nothing were fused or cached;",
        "above 100 % caches served it.",
    ]
    return "\n".join(lines) + "\n", rows


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

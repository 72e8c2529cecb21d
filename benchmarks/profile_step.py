"""`make profile`: where the time of a training step goes, on one page, and a trace of it.

    python benchmarks/profile_step.py [simclr|idaa]      # idaa without an argument

Writes `outputs/profile/<method>-trace.json` (chrome://tracing, ui.perfetto.dev) and
`<method>.txt`: the parts of a step; what was computed and moved, counted operation by operation,
against what this machine was measured to do at best. The figures are a result file too.
"""

from __future__ import annotations

import sys
import time
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

from idaa_lib.runs import outputs_root
from idaa_lib.runs.machine import hardware, versions
from idaa_lib.train.loop import Fit

STEPS = 5
PROTOCOL = f"""One step, ResNet-18 of the paper, batch {sides.BATCH}, after a warm-up: the median of
{STEPS}, and the mean of each part, without compile=True. computed, moved: counted operation by
operation (moved as if nothing were fused or cached); baseline: what the machine did at best, a
large product of matrices and a large copy."""
CUDA = sides.DEVICE.type == "cuda"


class Moved(TorchDispatchMode):
    """Bytes of all tensors that operations read and write: what goes through memory if nothing is
    fused and nothing stays in a cache (views and reshapes move nothing and are left out)."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        if not function.is_view:
            seen = torch.utils._pytree.tree_leaves((args, kwargs, made))
            tensors = {id(t): t for t in seen if isinstance(t, Tensor)}
            self.bytes += sum(t.numel() * t.element_size() for t in tensors.values())
        return made


def main(words: list[str]) -> int:
    name = words[0] if words else "idaa"
    if name not in ("simclr", "idaa"):
        print(f"The method must be simclr or idaa, and is {name!r}.", file=sys.stderr)
        return 2
    sides.COMPILE = False  # a compiled step has no parts
    spent: dict[str, list[float]] = defaultdict(list)
    with _watched(spent):
        step = sides.PARTS[f"{name}-ours"]()
        step()
        spent.clear()
        seconds = [_timed(step) for _ in range(STEPS)]
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
    (folder / f"{name}.txt").write_text(page)
    print(f"{page}\n{folder / f'{name}-trace.json'}")
    print(record.write(f"profile-{name}", " ".join(PROTOCOL.split()), rows))
    return 0


@contextmanager
def _watched(spent: dict[str, list[float]]) -> Iterator[None]:
    """Time the parts of `Fit.train_step` by wrapping what it calls; each part alone, without the
    parts that it calls in turn."""
    plain = Fit.__init__
    inside: list[float] = []

    def watch(owner: Any, attribute: str, part: str) -> None:
        call = getattr(owner, attribute)

        def timed(*args: Any, **kwargs: Any) -> Any:
            inside.append(0.0)
            seconds, made = _clocked(lambda: call(*args, **kwargs))
            spent[part].append(seconds - inside.pop())
            if inside:
                inside[-1] += seconds
            return made

        setattr(owner, attribute, timed)

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
        watch(fit.method, "draw", "views")
        watch(fit.accelerator, "backward", "backward")
        fit.adversary = Watched(fit.adversary)
        make = fit.method.step

        def step(*given: Any) -> Any:
            made = make(*given)
            if made.adversarial_loss is not None:
                watch(made, "adversarial_loss", "adversarial forward")
            return made

        fit.method.step = step
        watch(fit.method, "step", "forward")
        # `prepare_optimizer` wraps it later: the inner one is what costs.
        watch(fit.optimizer, "step", "optimiser")

    Fit.__init__ = build  # type: ignore[method-assign]
    try:
        yield
    finally:
        Fit.__init__ = plain  # type: ignore[method-assign]


def _clocked(call: Callable[[], Any]) -> tuple[float, Any]:
    if CUDA:
        torch.cuda.synchronize()
    began = time.perf_counter()
    made = call()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - began, made


def _timed(call: Callable[[], Any]) -> float:
    return _clocked(call)[0]


def ceilings() -> tuple[float, float]:
    """FLOP/s of a large product of matrices (bf16 where steps use it), and bytes/s of a large copy,
    each the best of several."""
    dtype = torch.bfloat16 if sides.bf16() else torch.float32
    n = 8192 if CUDA else 2048
    a, b = (torch.randn(n, n, device=sides.DEVICE, dtype=dtype) for _ in range(2))
    product = min(_timed(lambda: a @ b) for _ in range(8))
    source = torch.empty((2**30 if CUDA else 2**28), dtype=torch.uint8, device=sides.DEVICE)
    target = torch.empty_like(source)
    copy = min(_timed(lambda: target.copy_(source)) for _ in range(8))
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
    found = versions()
    lines = [
        f"One {name} step, batch {sides.BATCH}, ResNet-18 of the paper",
        f"{hardware()}; torch {found['torch']}; {'bf16' if sides.bf16() else 'fp32'}",
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

"""`make bench`: ours against the straightforward formulation, every ratio paired within one run.

    python benchmarks/speed.py [ROW …]     # such as idaa_step_ratio; all without an argument

What the sides do is in sides.py, how they take turns in paired.py. On a CPU leave the machine
alone meanwhile: two torch processes on the same cores slow each other down many times over.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from statistics import fmean, median
from typing import Any

import record
import sides
from paired import ALLOCATOR, Pair, Side, pair

from idaa_lib.evaluate.probe import LAMBDAS

Rows = list[dict[str, Any]]
CUDA = sides.DEVICE.type == "cuda"
EPOCH = 50_000  # images
PROTOCOL = f"""Each ratio is straightforward / ours, the median over n turns of two processes that
take turns (benchmarks/paired.py; warm-up not counted, a second's pause between turns); spread:
quartiles of the ratio; baseline: median seconds of [straightforward, ours]. Images: photographs, 32
px. The straightforward formulation (benchmarks/sides.py) is the specification's, in fp32 and the
published order of work; its ResNet rectifies out of place, as the published one does.
views: two SimCLR views of {8 * sides.BATCH} images in batches of {sides.BATCH}, against PIL in 2
workers. steps: ResNet-18 of the paper, batch {sides.BATCH}, views included (straightforward: 2
workers that work ahead). Ours, the VAE too, with compile={sides.COMPILE}. Both sides run with the
allocator settings of `make lab`, but for idaa_step_ratio_default_allocator, whose straightforward
side has glibc's. idaa_over_simclr: ours both. vae_epoch: {sides.VAE_STEPS} steps of
{sides.VAE_BATCH}, views included. linear_eval: straightforward: an epoch that encodes {sides.TRAIN}
+ {sides.TEST} images anew, times 1000 (extrapolated), against our whole evaluation. knn_extra_mib:
peak beyond the features of 10,000 queries against 50,000 × 512 (random; resident, on a GPU
allocated; baseline: seconds). step_peak_mib: peak resident (on a GPU: allocated) memory of an IDAA
step's process; baseline: the straightforward one's. startup_seconds: a new process imports, loads
the cached images and takes a first SimCLR step of 64; spread: smallest and largest.
transfer_probe_seconds: {len(LAMBDAS)} penalties of the transfer protocol on {sides.PROBED:,} × 512
features of 10 classes (made), a tenth of them for validation; spread: smallest and largest. On a
GPU a turn of ours is {sides.TIMES} steps, epochs of the VAE or of views, of which the seconds of
one count; also epoch_seconds_*: of
{EPOCH:,} images, from n steps in turns of {sides.TIMES} (of the VAE, times {sides.VAE_STEPS});
minutes_300_epochs_idaa: 300 such epochs and 30 validations (kNN, {sides.QUERIES} against
{sides.BANK}), added up; baseline: seconds of [an epoch, a validation]."""


def ratio(what: str, timed: Pair) -> dict[str, Any]:
    baseline = [round(timed.slow_s, 4), round(timed.fast_s, 4)]
    return record.row(what, round(timed.ratio, 3), "ratio", timed.n, timed.quartiles, baseline)


def views() -> Rows:
    eager = pair(Side("views-pil"), Side("views-eager"), 9)
    compiled = pair(Side("views-pil"), Side("views-compiled"), 9)
    return [ratio("views_ratio_eager", eager), ratio("views_ratio_compiled", compiled)]


def simclr() -> Rows:
    return [
        ratio("simclr_step_ratio", pair(Side("simclr-straightforward"), Side("simclr-ours"), 7))
    ]


def idaa() -> Rows:
    step = pair(Side("idaa-straightforward"), Side("idaa-ours"), 7)
    peak = record.row(
        "step_peak_mib", round(step.fast_mib), "MiB", step.n, None, round(step.slow_mib)
    )
    default = pair(Side("idaa-straightforward", allocator=False), Side("idaa-ours"), 9)
    return [
        ratio("idaa_step_ratio", step),
        peak,
        ratio("idaa_step_ratio_default_allocator", default),
    ]


def idaa_over_simclr() -> Rows:
    return [ratio("idaa_over_simclr", pair(Side("idaa-ours"), Side("simclr-ours"), 9))]


def vae() -> Rows:
    return [ratio("vae_epoch_ratio", pair(Side("vae-straightforward"), Side("vae-ours"), 9))]


def linear() -> Rows:
    once = pair(Side("linear-straightforward"), Side("linear-ours"), 3, warm_up=1)
    low, high = (1000 * edge for edge in once.quartiles)
    thousand = once._replace(
        ratio=1000 * once.ratio, quartiles=[low, high], slow_s=1000 * once.slow_s
    )
    return [ratio("linear_eval_ratio", thousand)]


def knn() -> Rows:
    code = """
import resource, time, torch
from idaa_lib.runs.machine import torch_device
from idaa_lib.evaluate.knn import knn
torch.manual_seed(0)
device = torch_device("auto")
bank, queries = torch.randn(50_000, 512, device=device), torch.randn(10_000, 512, device=device)
labels = torch.arange(50_000, device=device) % 10
def peak():
    if device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
knn(bank[:500], labels[:500], queries[:5], classes=10)
before, began = peak(), time.perf_counter()
knn(bank, labels, queries, classes=10)
more = peak() - before
print(more, time.perf_counter() - began)
"""
    runs = [tuple(map(float, _python(code).split())) for _ in range(3)]
    mib, seconds = (median(column) for column in zip(*runs, strict=True))
    return [record.row("knn_extra_mib", round(mib), "MiB", len(runs), None, round(seconds, 2))]


def transfer() -> Rows:
    side = Side("transfer-ours")
    for _ in range(3):
        side.work()
    side.close()
    spread = [round(min(side.seconds), 2), round(max(side.seconds), 2)]
    seconds = round(median(side.seconds), 2)
    return [record.row("transfer_probe_seconds", seconds, "s", len(side.seconds), spread)]


def startup() -> Rows:
    code = """
from idaa_lib.configs import SSLConfig
from idaa_lib.runs.machine import open_images
from idaa_lib.methods import About, build_method
from idaa_lib.runs import outputs_root
from idaa_lib.train.accelerator import make_accelerator
from idaa_lib.train.loop import Fit
from idaa_lib.views import recipe
import os, torch
data = open_images(os.environ.get("IDAA_CIFAR10_ZIP", "photos"), "train", 32, None)
config = SSLConfig(preset="cifar10", batch_size=64)
accelerator = make_accelerator(config, outputs_root())
views = recipe("simclr", 32, data.mean, data.std)
about = About(views, data.labels, len(data.classes), config.epochs, config.batch_size)
fit = Fit(accelerator, build_method(config, about), data.images, config)
batch, images = next(fit.feed([{"images": torch.arange(64)}]))
fit.train_step(0, images, batch)
if accelerator.device.type == "cuda": torch.cuda.synchronize()
"""
    _python(code)  # fills the cache of decoded images
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        _python(code)
        seconds.append(time.perf_counter() - began)
    spread = [round(min(seconds), 2), round(max(seconds), 2)]
    data = "CIFAR-10" if "IDAA_CIFAR10_ZIP" in os.environ else "photos"
    return [record.row("startup_seconds", round(median(seconds), 2), "s", 5, spread, data)]


def epochs() -> Rows:
    """On a GPU: an epoch of 50,000 images, and 300 of them with a validation every ten."""
    if not CUDA:
        return []
    turns = 12
    steps = turns * sides.TIMES
    vae = EPOCH // (sides.VAE_BATCH * sides.VAE_STEPS) * _seconds("vae-ours", turns)
    simclr, idaa = (
        EPOCH // sides.BATCH * _seconds(f"{name}-ours", turns) for name in ("simclr", "idaa")
    )
    validation = _seconds("validation-ours", 3)
    whole = (300 * idaa + 30 * validation) / 60
    parts = [round(idaa, 3), round(validation, 3)]
    return [
        record.row("epoch_seconds_vae", round(vae, 3), "s", steps * sides.VAE_STEPS),
        record.row("epoch_seconds_simclr", round(simclr, 3), "s", steps),
        record.row("epoch_seconds_idaa", round(idaa, 3), "s", steps),
        record.row("minutes_300_epochs_idaa", round(whole, 2), "min", steps, None, parts),
    ]


def _seconds(name: str, turns: int) -> float:
    """Of one working of a side, the mean over so many turns after two that warm it up."""
    side = Side(name)
    for _ in range(2):
        side.work(count=False)
    for _ in range(turns):
        side.work()
    side.close()
    return fmean(side.seconds)


def _python(code: str) -> str:
    environment = os.environ | ALLOCATOR
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        check=True,
        capture_output=True,
        encoding="utf-8",
    ).stdout


PARTS: dict[str, Callable[[], Rows]] = {
    "startup_seconds": startup,
    "views_ratio": views,
    "vae_epoch_ratio": vae,
    "simclr_step_ratio": simclr,
    "idaa_over_simclr": idaa_over_simclr,
    "idaa_step_ratio": idaa,
    "linear_eval_ratio": linear,
    "knn_extra_mib": knn,
    "transfer_probe_seconds": transfer,
    "epoch_seconds": epochs,
}


def main(words: list[str]) -> int:
    if unknown := set(words) - PARTS.keys():
        print(f"There is no row {unknown.pop()!r}; there are {', '.join(PARTS)}.", file=sys.stderr)
        return 2
    rows: Rows = []
    name = "-".join(["speed", *words])  # parts have files of their own
    with tempfile.TemporaryDirectory() as folder:
        os.environ["IDAA_OUTPUTS"] = folder
        for part in words or PARTS:
            for row in PARTS[part]():
                _, target = record.ROWS.get(row["what"], ("", ""))
                print(f"{row['what']:<36} {row['value']:>10} {row['unit']:<6} {target}", flush=True)
                rows.append(row)
            # After each, so that what stops the next loses nothing.
            path = record.write(name, " ".join(PROTOCOL.split()), rows)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Photographs streamed from their files: speed, memory; the cost of the ImageNet recipe, by count.

    python benchmarks/stream.py [speed] [growth] [shards] [open] [kinds] [cost]   # or all of them

Photographs of 500 × 375 pixels are made of those inside scikit-learn and scikit-image, with noise
so that they are as large as ImageNet's. Needs 6 GB of disk in the folder for temporary files.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import psutil
import record
import torch
from PIL import Image
from skimage import data as samples
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from idaa_lib.adversaries import build_adversary
from idaa_lib.configs import SSLConfig, VAEConfig
from idaa_lib.data import __main__ as commands
from idaa_lib.data import streamed
from idaa_lib.data.cached import ImageSet, load
from idaa_lib.methods import About, Moment, build_method
from idaa_lib.methods.vae import VAETraining
from idaa_lib.nets.vae import VAE
from idaa_lib.train import feed
from idaa_lib.train.feed import Feed
from idaa_lib.views import keyed_generator, recipe

Rows = list[dict[str, Any]]
PHOTOS, TURNS, BATCH, FILES = 1000, 9, 16, 200_000
SHARD_PHOTOS = 20_000  # 2 GB
ROOT = Path(os.environ.get("IDAA_STREAM_ROOT") or tempfile.mkdtemp(prefix="idaa-stream-"))
PROTOCOL = f"""Photographs of 500 × 375 pixels, JPEG of quality 90, as large as the row
photograph_kib says. stream_images_per_core_second: {PHOTOS} photographs decoded and cut to two
crops of 224 pixels by boxes of SimSiam's views, in one process with one thread; images over seconds
of that process's processor time, the median of {TURNS} turns, spread: quartiles; baseline: the same
with Pillow. stream_growth_mib: memory of a process and its workers (PSS) that takes batches of
{BATCH}, after 2,000 less after 200; baseline: after 200. shards_peak_mib: the most of it while
batches of 128 are drawn from {SHARD_PHOTOS:,} photographs in tar shards; baseline: MiB of the
shards; n: batches. open_{FILES}_seconds: load(…, streamed=True) of so many small files in 1,000
folders, in a new process, imports not counted, the median of {TURNS}, spread: quartiles; baseline:
load and 64 images. kinds_equal: kinds of workers (fork, spawn, forkserver) whose batches are those
of the process itself, of a streamed set and of one that lies decoded in its file.
*_gflop_per_image: floating-point operations of a training step of the recipe simsiam-imagenet over
its images, counted by torch's FlopCounterMode in a batch of 2 (a multiplication and an addition are
two)."""


def photograph(seed: int, photos: list[Any]) -> Image.Image:
    rng = np.random.default_rng(seed)
    whole = Image.fromarray(photos[seed % len(photos)])
    side = rng.uniform(0.5, 0.9)
    box = [int(side * length) for length in whole.size]
    left, top = (int(rng.integers(0, n - m)) for n, m in zip(whole.size, box, strict=True))
    crop = whole.crop((left, top, left + box[0], top + box[1])).resize((500, 375))
    noisy = np.asarray(crop) + rng.normal(0, 14, (375, 500, 1))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def photographs() -> Path:
    """A folder of class folders, made once."""
    root = ROOT / "photographs"
    photos = [
        samples.astronaut(),
        samples.chelsea(),
        samples.coffee(),
        *load_sample_images().images,
    ]
    for i in range(PHOTOS) if not root.exists() else ():
        path = root / f"train/{i % 10:03}/{i:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph(i, photos).save(path, quality=90)
    return root


def boxes_of(images: ImageSet, seed: int) -> Tensor:
    """Of two views of each image (2, N, 4)."""
    views, generator = recipe("simsiam", 224, (0.5,) * 3, (0.25,) * 3), keyed_generator(seed)
    numbers = [views.numbers(len(images), generator) for _ in range(2)]
    sizes = images.sizes
    return torch.stack([views.parameters(part, sizes)["crop"] for part in numbers])


def batches(images: ImageSet, n: int, seed: int) -> Any:
    """Batches of n photographs, without end, as a training draws them."""
    sizes = images.sizes
    views = recipe("simsiam", 224, images.mean, images.std)
    for step in itertools.count():
        generator = keyed_generator(seed, step)
        index = torch.randint(len(images), (n,), generator=generator)
        batch = {"images": index}
        for view in range(2):
            params = views.parameters(views.numbers(n, generator), sizes[index])
            batch[f"cut {view}"] = torch.cat([params["source"], params["crop"]], 1)
        yield batch


def memory() -> float:
    """MiB of this process and its children; what they share is counted once."""
    own = psutil.Process()
    return sum(p.memory_full_info().pss for p in (own, *own.children(recursive=True))) / 2**20


def spread(values: list[float], digits: int) -> list[float]:
    low, _, high = quantiles(values, n=4)
    return [round(low, digits), round(high, digits)]


def speed() -> Rows:
    images = load(photographs(), "train", 224, streamed=True)
    files = [path.stat().st_size for path in photographs().rglob("*.jpg")]
    index = torch.arange(len(images))
    rates: dict[str, list[float]] = {"torchcodec": [], "Pillow": []}
    streamed.get_worker_info = lambda: True  # type: ignore  # one thread, as in a worker
    decode = streamed.jpeg_decoder()
    for turn in range(TURNS + 1):
        boxes = boxes_of(images, turn)
        for name in rates:
            streamed.jpeg_decoder = lambda name=name: decode if name == "torchcodec" else None  # type: ignore
            begin = time.process_time()
            images.gather(index, boxes, 224)
            rates[name].append(len(images) / (time.process_time() - begin))
    ours, pillow = (values[1:] for values in rates.values())  # the first is a warm-up
    rate = round(median(ours))
    return [
        record.row("photograph_kib", round(np.mean(files) / 1024), "KiB", len(files)),
        record.row(
            "stream_images_per_core_second",
            rate,
            "images/s",
            TURNS,
            spread(ours, 0),
            round(median(pillow)),
        ),
    ]


def growth() -> Rows:
    images = load(photographs(), "train", 224, streamed=True)
    marks = {}
    feed_ = Feed(images.images, torch.device("cpu"))
    for step, _ in enumerate(feed_(batches(images, BATCH, 0)), 1):
        if step in (200, 2000):
            marks[step] = memory()
        if step == 2000:
            break
    more = marks[2000] - marks[200]
    return [record.row("stream_growth_mib", round(more, 1), "MiB", 1, None, round(marks[200]))]


def shards() -> Rows:
    out, heap = ROOT / "shards", ROOT / "heap"
    if not out.exists():
        sources = sorted(photographs().rglob("*.jpg"))
        for i in range(SHARD_PHOTOS):
            path = heap / f"train/{i % 100:03}/{i:06}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            os.link(sources[i % len(sources)], path)
        commands.shard(str(heap), out)
    images = load(out, "trainval", 224, streamed=True)
    size = sum(path.stat().st_size for path in out.iterdir()) / 2**20
    peak, sampler = 0.0, Feed(images.images, torch.device("cpu"))
    steps = 50
    for step, _ in enumerate(sampler(batches(images, 128, 0)), 1):
        peak = max(peak, memory() if step % 5 == 0 else 0.0)
        if step == steps:
            break
    return [record.row("shards_peak_mib", round(peak), "MiB", steps, None, round(size))]


def open_() -> Rows:
    root = ROOT / "files"
    for i in range(FILES) if not root.exists() else ():
        path, first = root / f"train/{i % 1000:04}/{i:06}.jpg", ROOT / f"small-{i // 50_000}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if i % 50_000 == 0:  # a file may have so many names
            Image.new("RGB", (32, 24), (i // 1000, 90, 30)).save(first)
        os.link(first, path)
    load(root, "train", 32, streamed=True)
    code = f"""
import time, torch
from idaa_lib.data.cached import load
start = time.perf_counter()
images = load({str(root)!r}, "train", 32, streamed=True)
print(time.perf_counter() - start)
images.images[torch.arange(0, len(images), len(images) // 64)[:64]]
print(time.perf_counter() - start)
"""
    runs = [_python(code) for _ in range(TURNS)]
    opens, reads = ([float(run.split()[-2 + i]) for run in runs] for i in range(2))
    value = round(median(opens), 3)
    return [
        record.row(
            f"open_{FILES}_seconds", value, "s", TURNS, spread(opens, 3), round(median(reads), 3)
        )
    ]


def kinds() -> Rows:
    """Each kind of worker, in a process of its own: what it starts by is set once."""
    photographs()
    code = "import stream, sys; sys.exit(stream.compare(sys.argv[1]))"
    equal = []
    for kind in ("fork", "spawn", "forkserver"):
        command = [sys.executable, "-c", code, kind]
        environment = os.environ | {"IDAA_STREAM_ROOT": str(ROOT), "IDAA_DATA": str(ROOT / "data")}
        status = subprocess.run(command, cwd=Path(__file__).parent, env=environment).returncode
        equal.append(status == 0)
    return [record.row("kinds_equal", sum(equal), "kinds", len(equal))]


def compare(kind: str) -> int:
    """0 if workers of this kind give what the process itself gives, and take no copy of the set."""
    multiprocessing.set_start_method(kind)
    from idaa_lib.data import cached

    cached.SMALL, feed.count_cores = 0, lambda: 2
    photos = load(photographs(), "train", 224, streamed=True)
    decoded = load(photographs(), "train", 224)
    device, failures = torch.device("cpu"), 0
    for images, how in ((photos, {}), (decoded, {"resident": False})):
        theirs = Feed(images.images, device, **how)
        jobs = list(itertools.islice(batches(photos, BATCH, 1), 6))
        if images is decoded:
            jobs = [{"images": job["images"]} for job in jobs]
        for job, (_, tensors) in zip(jobs, theirs(jobs), strict=True):
            if images is decoded:
                failures += not torch.equal(tensors["images"], images.images[job["images"]])
                continue
            for view in range(2):
                own = images.gather(job["images"], job[f"cut {view}"][:, 2:], 224)
                failures += not torch.equal(tensors[f"view {view}"], own)
    print(f"{kind}: {failures} differences")
    return failures


def cost() -> Rows:
    """Of a step of the recipe, by count."""
    n, rows = 2, dict[str, float]()
    settings: dict[str, Any] = {"preset": "simsiam-imagenet", "dataset": "imagenet"}
    vae: Any = VAEConfig(**settings)
    for name in ("none", "idaa"):
        config: Any = SSLConfig(**settings, adversary=name)
        about = About(
            recipe("simsiam", 224, config.mean, config.std),
            torch.zeros(n),
            1,
            1,
            n,
        )
        method = build_method(config, about).train()
        net = VAE(vae.dim, 224, vae.width, config.mean, config.std)
        adversary = build_adversary(
            config,
            net.eval().requires_grad_(False) if name == "idaa" else None,
            mean=config.mean,
            std=config.std,
        )
        with FlopCounterMode(display=False) as counter:
            step = _step(method, n)
            loss = step.loss
            if name == "idaa":
                x_adv = adversary(step.attacked.images, step.attack_loss).images
                loss = loss + step.adversarial_loss(x_adv)
            loss.backward()
        rows[f"simsiam_{name}"] = counter.get_total_flops() / n
    about = About(recipe("simsiam", 224, vae.mean, vae.std), torch.zeros(n), 1, 1, n)
    method = VAETraining(vae, about).train()
    with FlopCounterMode(display=False) as counter:
        _step(method, n).loss.backward()
    rows["vae"] = counter.get_total_flops() / n
    return [
        record.row(f"{name}_gflop_per_image", round(value / 1e9, 2), "GFLOP", n)
        for name, value in rows.items()
    ]


def _step(method: Any, n: int) -> Any:
    generator = keyed_generator(0)
    images = torch.randint(0, 256, (n, 3, 256, 256), generator=generator).to(torch.uint8)
    batch = {"images": torch.arange(n)}
    moment = Moment(steps=2, numbers=method.numbers({"images": n}, generator))
    return method.step(method.draw({"images": images}, batch, moment), batch, moment)


def _python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        encoding="utf-8",
        check=True,
        env=os.environ | {"IDAA_DATA": str(ROOT / "data")},
    ).stdout


PARTS = {"speed": speed, "growth": growth, "shards": shards, "open": open_}
PARTS |= {"kinds": kinds, "cost": cost}


def main(words: list[str]) -> int:
    torch.set_num_threads(1)
    os.environ["IDAA_DATA"] = str(ROOT / "data")
    rows = []
    for word in words or PARTS:
        for each in PARTS[word]():
            print(each, flush=True)
            rows.append(each)
    name = f"stream{'-' + '-'.join(words) if words else ''}"
    print(record.write(name, " ".join(PROTOCOL.split()), rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What is timed: ours and the straightforward formulation of the same, each in its own process.

`python benchmarks/sides.py NAME` gets ready, prints a line, and then works once for each line that
it reads, answering with the seconds (JSON). `paired.py` lets two of them take turns. On a GPU what
does not wait (`AHEAD`) works several times for a line, and the answer is the seconds of one: as in
training, the GPU computes a step while the host prepares the next.

The straightforward formulation is what the specification says, in the published order of work
(docs/spec/idaa.md §1, §2, §5, §8): fp32, images as PIL sees them, NT-Xent by broadcasting, the
attack by a backward pass through everything, features anew in every epoch of the linear probe.
Its networks are ours, but the ResNet rectifies out of place, as the published one does: what is
compared is the way of working, not the model.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T

from idaa_lib.adversaries import IDAA, Adversary, build_adversary
from idaa_lib.configs import SSLConfig, VAEConfig
from idaa_lib.evaluate.encoders import features
from idaa_lib.evaluate.knn import knn
from idaa_lib.evaluate.probe import TRANSFER, linear_probe
from idaa_lib.methods import About, build_method
from idaa_lib.methods.ipirm import IPIRM
from idaa_lib.methods.vae import VAETraining
from idaa_lib.nets.vae import VAE
from idaa_lib.runs import outputs_root
from idaa_lib.runs.machine import open_images, torch_device
from idaa_lib.train.accelerator import make_accelerator
from idaa_lib.train.loop import Fit, gpu_settings
from idaa_lib.views import compile_view, keyed_generator, recipe, send

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import reference

BATCH, VAE_BATCH, VAE_STEPS = 256, 128, 4
TRAIN, TEST = 2000, 1000  # images of the linear evaluation
PROBED = 50_000  # features of the transfer's probe
BANK, QUERIES = 45_000, 5_000  # of a validation by kNN: CIFAR-10's splits
DEVICE = torch_device("auto")
# Our steps are as training is by default; IDAA_BENCH_COMPILE=1 measures them with compile=True.
COMPILE = os.environ.get("IDAA_BENCH_COMPILE") == "1"
RECORD = True  # and on a GPU record them as a CUDA graph
# A straightforward step waits for its loss.
AHEAD = ("views-eager", "views-compiled", "simclr-ours", "idaa-ours", "vae-ours")
TIMES = 16 if DEVICE.type == "cuda" else 1
Work = Callable[[], Any]


def images(n: int, split: str = "train") -> Any:
    """Real photographs, 32 px: what costs the same whatever is on them needs no download."""
    return open_images("photos", split, 32, n)


# --- the straightforward formulation -------------------------------------------------------------

# F.relu as the published ResNet calls it, whatever ours asks for (`idaa_lib/nets/resnet.py`).
out_of_place = patch.object(F, "relu", lambda x, inplace=False: torch.relu(x))


class Photographs(Dataset):
    """Images as a data set of PIL images with a transform, as torchvision's are."""

    def __init__(self, data: Any, transform: Any, views: int) -> None:
        self.pictures = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in data.images]
        self.labels, self.transform, self.views = data.labels.tolist(), transform, views

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int) -> tuple[list[Tensor], int]:
        return [self.transform(self.pictures[i]) for _ in range(self.views)], self.labels[i]


def simclr_transform(mean: Any, std: Any) -> Any:
    """Spec §1, mode simclr: torchvision's transforms of PIL images, one sample at a time."""
    jitter = T.ColorJitter(0.8, 0.8, 0.8, 0.2)
    return T.Compose(
        [
            T.RandomResizedCrop(32),
            T.RandomHorizontalFlip(),
            T.RandomApply([jitter], 0.8),
            T.RandomGrayscale(0.2),
            T.ToTensor(),
            T.Normalize(mean, std),
        ]
    )


def pil_loader(n: int, batch: int, views: int) -> DataLoader:
    """Batches of `views` views of each of n images, made by 2 workers."""
    data = images(n)
    pictures = Photographs(data, simclr_transform(data.mean, data.std), views)
    return DataLoader(
        pictures, batch, shuffle=True, num_workers=2, drop_last=True, persistent_workers=True
    )


def broadcast_nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """NT-Xent by cosines of all pairs at once: holds (2B, 2B, D)."""
    z, n = torch.cat([z1, z2]), len(z1)
    logits = F.cosine_similarity(z[:, None], z[None], dim=2) / temperature
    logits = logits.masked_fill(torch.eye(2 * n, dtype=torch.bool, device=z.device), -torch.inf)
    return F.cross_entropy(logits, torch.arange(2 * n, device=z.device).roll(n))


def views_pil() -> Work:
    loader = pil_loader(8 * BATCH, BATCH, 2)

    def epoch() -> None:
        for _ in loader:
            pass

    return epoch


def simclr_straightforward() -> Work:
    network, views = _network("none"), _pil_views()
    optimizer = _adam(network)

    @out_of_place
    def step() -> None:
        x_i, x_j = next(views)
        optimizer.zero_grad()
        loss = broadcast_nt_xent(network(x_i), network(x_j), 0.5)
        loss.backward()
        optimizer.step()
        loss.item()  # a line of progress at every step

    return step


def idaa_straightforward() -> Work:
    network, views = _network("idaa"), _pil_views()
    optimizer = _adam(network)
    # The published backward pass through everything fills the VAE's gradients too (spec §8.1).
    vae = _vae().to(DEVICE).requires_grad_(True)

    def attack(x: Tensor) -> Tensor:
        return reference.idaa(network, vae, x, 0.1, 0.5, broadcast_nt_xent)

    @out_of_place
    def step() -> None:
        x_i, x_j = next(views)
        loss, _ = reference.simclr_step(network, x_i, x_j, attack, 1.0, 0.5, broadcast_nt_xent)
        optimizer.step()
        loss.item()

    return step


def _network(adversary: Any) -> nn.Module:
    """The paper's network, called as network(images, adversarial=False) → z (B, D)."""
    config = _ssl(adversary)
    return Projected(build_method(config, _about(config, images(BATCH))).network).to(DEVICE).train()


class Projected(nn.Module):
    """A network's embedding z alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, adversarial: bool = False) -> Tensor:
        return self.network(x, adversarial=adversarial).z


def _backbone(adversary: Any) -> nn.Module:
    return _network(adversary).get_submodule("network.backbone")


def _adam(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(network.parameters(), lr=3e-4)


def _pil_views() -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of views without end, made by 2 workers while the step before computes."""
    loader = pil_loader(8 * BATCH, BATCH, 2)
    while True:
        for (x_i, x_j), _ in loader:
            yield x_i.to(DEVICE), x_j.to(DEVICE)


def vae_straightforward() -> Work:
    loader = pil_loader(VAE_STEPS * VAE_BATCH, VAE_BATCH, 1)
    vae = _vae().to(DEVICE).train().requires_grad_(True)
    optimizer = torch.optim.Adam(vae.parameters(), lr=5e-4, betas=(0.0, 0.9), foreach=False)

    def epoch() -> None:
        for (x,), _ in loader:
            x = x.to(DEVICE)
            _, G, mu, logvar = vae(x, torch.randn(len(x), 512, device=DEVICE))
            kl = -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum() / (3 * mu.numel())
            loss = F.mse_loss(G, x) + 0.1 * kl
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()

    return epoch


def linear_straightforward() -> Work:
    """One epoch of the published probe: train and test encoded anew, a step of Adam a batch."""
    network = _backbone("none").eval()
    data, test = images(TRAIN), images(TEST, "test")
    plain = T.Compose([T.ToTensor(), T.Normalize(data.mean, data.std)])
    head = nn.Linear(512, len(data.classes)).to(DEVICE)
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-4)

    @out_of_place
    def epoch() -> None:
        for part, learn in ((data, True), (test, False)):
            for (x,), y in DataLoader(Photographs(part, plain, 1), BATCH, shuffle=learn):
                with torch.no_grad():
                    h = network(x.to(DEVICE))
                loss = F.cross_entropy(head(h), y.to(DEVICE))
                if learn:
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()

    return epoch


# --- ours ----------------------------------------------------------------------------------------


def _views(compile: bool) -> Work:
    data = images(8 * BATCH)
    transform = recipe("simclr", 32, data.mean, data.std)
    view = compile_view(transform.view) if compile else transform.view
    resident, count = data.images.to(DEVICE), itertools.count()

    def epoch() -> None:
        generator = keyed_generator(next(count))
        for index in torch.randperm(len(resident), generator=generator).split(BATCH):
            x = resident[send(index, DEVICE)]
            for _ in range(2):
                view(x, transform.numbers(len(x), generator))

    return epoch


def views_eager() -> Work:
    return _views(compile=False)


def views_compiled() -> Work:
    return _views(compile=True)


def simclr_ours() -> Work:
    return _fit("none")


def idaa_ours() -> Work:
    return _fit("idaa")


def _fit(adversary: Any) -> Work:
    """A step of the training loop as users run it, its views included."""
    config, data = _ssl(adversary), images(2 * BATCH)
    accelerator = make_accelerator(config, outputs_root())
    method = build_method(config, _about(config, data))
    attack: Adversary | None = IDAA(_vae(), epsilon=0.1) if adversary == "idaa" else None
    return _steps(Fit(accelerator, method, data.images, config, attack), BATCH, 1)


def train_steps(config: SSLConfig, vae: VAE | None) -> Work:
    """A step of any training on photographs; IP-IRM has one partition."""
    data = images(2 * config.batch_size)
    method = build_method(config, _about(config, data))
    if isinstance(method, IPIRM):
        method.keep(torch.arange(len(data.images)) % 2)
    attack = build_adversary(config, vae)
    accelerator = make_accelerator(config, outputs_root())
    return _steps(Fit(accelerator, method, data.images, config, attack), config.batch_size, 1)


def vae_ours() -> Work:
    data = images(VAE_STEPS * VAE_BATCH)
    config = VAEConfig(preset="cifar10", dataset="photos", batch_size=VAE_BATCH, compile=COMPILE)
    accelerator = make_accelerator(config, outputs_root())
    method = VAETraining(config, _about(config, data))
    return _steps(Fit(accelerator, method, data.images, config), VAE_BATCH, VAE_STEPS)


def _steps(fit: Fit, batch: int, steps: int) -> Work:
    """So many steps of a training at each call, set up as `Fit.run` does."""
    if not RECORD:
        fit.recorded = None
    accelerator = fit.accelerator
    fit.method.network = accelerator.prepare_model(fit.method.network)
    fit.optimizer = accelerator.prepare_optimizer(fit.optimizer)
    fit.method.train()
    n, count, numbers = len(fit.feed.images), itertools.count(), itertools.count()

    def work() -> None:
        order = torch.randperm(n, generator=keyed_generator(next(count)))
        with gpu_settings(accelerator.mixed_precision):
            for index, chosen in fit.feed({"images": i} for i in order.split(batch)[:steps]):
                fit.train_step(next(numbers) % fit.total, chosen, index)

    return work


def _about(config: Any, data: Any) -> About:
    views = recipe(config.augmentation, 32, data.mean, data.std)
    return About(views, data.labels, len(data.classes), config.epochs, config.batch_size)


def linear_ours() -> Work:
    """The whole evaluation: features of all images once, nine penalties, the refit, the test."""
    encoder = _backbone("none")
    encoder = encoder.to(memory_format=torch.channels_last)
    data, test = images(TRAIN), images(TEST, "test")
    cut = TRAIN * 9 // 10

    def whole() -> None:
        z, z_test = (
            features(encoder, d.images, 32, d.mean, d.std, device=DEVICE, bf16=bf16())
            for d in (data, test)
        )
        linear_probe(
            (z[:cut], data.labels[:cut]),
            (z[cut:], data.labels[cut:]),
            z_test,
            classes=len(data.classes),
        )

    return whole


def transfer_ours() -> Work:
    """The probe of the transfer protocol on features that are made: ReLU of correlated normals
    around a centre for each of 10 classes, with a decaying spectrum, half of them predictable."""
    generator, rows, dim = torch.Generator().manual_seed(0), PROBED + PROBED // 5, 512

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    labels = torch.randint(10, (rows,), generator=generator)
    latent = normal(rows, dim) + 0.13 * normal(10, dim)[labels]
    x = (latent * torch.arange(1, dim + 1) ** -0.7 @ normal(dim, dim)).relu().to(DEVICE)
    y = labels.to(DEVICE)
    val, test = PROBED * 9 // 10, PROBED
    splits = (x[:val], y[:val]), (x[val:test], y[val:test]), x[test:]

    def whole() -> None:
        linear_probe(
            *splits, classes=10, protocol=TRANSFER
        ).predictions.cpu()  # which waits for the device

    return whole


def validation_ours() -> Work:
    """kNN on the validation split, as the training stage does it every few epochs."""
    encoder = _backbone("idaa")
    encoder = encoder.to(memory_format=torch.channels_last)
    data = images(1000)  # as often as it takes: what they show costs the same
    bank, queries = (
        data.images.repeat(-(-n // 1000), 1, 1, 1)[:n].to(DEVICE) for n in (BANK, QUERIES)
    )
    labels = torch.arange(BANK) % 10

    def whole() -> None:
        z, z_queries = (
            features(encoder, x, 32, data.mean, data.std, device=DEVICE, bf16=bf16())
            for x in (bank, queries)
        )
        knn(z, labels, z_queries, classes=10)

    return whole


def _ssl(adversary: Any) -> SSLConfig:
    own = {"adversary": adversary, "compile": COMPILE}
    return SSLConfig(preset="cifar10", dataset="photos", batch_size=BATCH, **own)


def _vae() -> VAE:
    torch.manual_seed(0)
    return VAE(512, 32, 64, (0.5,) * 3, (0.25,) * 3).eval().requires_grad_(False)


def bf16() -> bool:
    """Whether steps multiply in bf16 here."""
    return make_accelerator(_ssl("none"), outputs_root()).mixed_precision == "bf16"


def peak_mib() -> float:
    """The most this process has held so far: on the device where there is one, else resident."""
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


PARTS: dict[str, Callable[[], Work]] = {
    part.__name__.replace("_", "-"): part
    for part in (
        views_pil,
        views_eager,
        views_compiled,
        simclr_straightforward,
        simclr_ours,
        idaa_straightforward,
        idaa_ours,
        vae_straightforward,
        vae_ours,
        linear_straightforward,
        linear_ours,
        transfer_ours,
        validation_ours,
    )
}


def main(name: str) -> None:
    work, times = PARTS[name](), TIMES if name in AHEAD else 1
    print(json.dumps({"ready": name}), flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        for _ in range(times):
            work()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - began) / times
        print(json.dumps({"seconds": seconds, "peak_mib": peak_mib()}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])

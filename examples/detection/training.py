"""The training of a detector on `Steps`, the library's resumable loop.

Detectron2's recipe: SGD with momentum, a linear warm-up, two drops of the rate, and BatchNorm
statistics that are averaged anew over 200 batches at the end (`PRECISE_BN`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from coco import CocoSet, Target, for_training
from configuration import DetectionConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader

from idaa_lib.runs import RunError, Writer, checkpoints
from idaa_lib.runs.steps import State, Steps
from idaa_lib.views import keyed_generator

# Streams of random numbers (the last part of the key).
ORDER, SAMPLE = 1, 2
DROPS = (2 / 3, 8 / 9)  # of the schedule: 60,000 and 80,000 of 90,000
PRECISE = 200  # batches that the BatchNorms' statistics are averaged over
# Detectron2's defaults.
MOMENTUM, WEIGHT_DECAY, WARMUP_FACTOR = 0.9, 1e-4, 1e-3


class Training:
    """The training of `detector` (on its device) on `data`, from the run's last checkpoint on.

    `steps` counts; `run` trains to the end.
    """

    def __init__(
        self, detector: nn.Module, data: CocoSet, config: DetectionConfig, writer: Writer
    ) -> None:
        self.detector, self.data, self.config = detector, data, config
        self.device = next(detector.parameters()).device
        self.norms = [m for m in detector.modules() if isinstance(m, nn.BatchNorm2d)]
        undecayed = [p for norm in self.norms for p in norm.parameters()]
        ids = {*map(id, undecayed)}
        decayed = [p for p in detector.parameters() if id(p) not in ids]
        groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": WEIGHT_DECAY}]
        groups += [{"params": undecayed}]
        self.optimizer = torch.optim.SGD(groups, config.learning_rate, momentum=MOMENTUM)
        self.steps = Steps(
            writer.run,
            writer,
            config.iterations,
            per_epoch=math.ceil(len(data.useful) / config.batch_size),
            images=config.batch_size,
            state=self.state,
            restore=self.restore,
            log_every=config.log_every,
            checkpoint_every=config.checkpoint_every,
            at_log=lambda: {"lr": rate(config, self.steps.step - 1)},
        )
        self.steps.resume()

    def run(self) -> None:
        """Train to the end, average the BatchNorms' statistics, save.

        Raises:
            Stopped: asked to. RunError: the loss is not finite.
        """
        self.detector.train()
        batches = self.batches(self.steps.step, self.config.iterations)
        for step in self.steps:
            self.steps.add(self.train_step(step, *next(batches)))
        self.average_statistics()
        self.steps.save()

    def batches(self, first: int, last: int) -> Iterator[tuple[list[Tensor], list[Target]]]:
        """Images in [0, 1] and their targets of steps first…last − 1, on the device."""
        config, data = self.config, self.data
        order = batch_indices(data.useful, config, range(first, last))
        loader = DataLoader(data, batch_sampler=order, num_workers=config.workers, collate_fn=list)
        for step, samples in zip(range(first, last), loader, strict=True):
            # torchvision draws flips, sides and regions from torch's own generators.
            torch.manual_seed(keyed_generator(config.seed, 0, step, SAMPLE).initial_seed())
            pairs = [
                for_training(
                    image.to(self.device), {k: v.to(self.device) for k, v in target.items()}
                )
                for image, target in samples
            ]
            yield [image for image, _ in pairs], [target for _, target in pairs]

    def train_step(
        self, step: int, images: list[Tensor], targets: list[Target]
    ) -> dict[str, Tensor]:
        """The losses of a step, scalars by name; `loss` is their sum."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate(self.config, step)
        losses: dict[str, Tensor] = self.detector(images, targets)
        loss = torch.stack([*losses.values()]).sum()
        if not loss.isfinite():
            raise RunError(
                f"The loss is {loss.item()} at step {step}: lower learning_rate "
                f"({self.config.learning_rate:g}); the last checkpoint is intact."
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return {"loss": loss, **losses}

    @torch.no_grad()
    def average_statistics(self) -> None:
        """Set the BatchNorms' running statistics to plain averages under the final weights."""
        for norm in self.norms:
            norm.reset_running_stats()
            norm.momentum = None  # torch's word for a plain average
        few = min(PRECISE, self.steps.per_epoch)
        for images, targets in self.batches(self.config.iterations, self.config.iterations + few):
            self.detector(images, targets)

    def state(self) -> State:
        tensors = {f"detector.{k}": v for k, v in self.detector.state_dict().items()}
        for name, parameter in self.detector.named_parameters():
            if slot := self.optimizer.state.get(parameter):
                tensors[f"momentum.{name}"] = slot["momentum_buffer"]
        return tensors, {}

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        self.detector.load_state_dict(checkpoints.under("detector.", tensors))
        parameters = dict(self.detector.named_parameters())
        for name, value in checkpoints.under("momentum.", tensors).items():
            self.optimizer.state[parameters[name]]["momentum_buffer"] = value.to(self.device)


def rate(config: DetectionConfig, step: int) -> float:
    """The learning rate of a step: linear warm-up, and a tenth from each of DROPS on."""
    share = min(1.0, step / config.warmup) if config.warmup else 1.0
    drops = sum(step >= round(part * config.iterations) for part in DROPS)
    return config.learning_rate * (WARMUP_FACTOR + (1 - WARMUP_FACTOR) * share) * 0.1**drops


def batch_indices(
    indices: Sequence[int], config: DetectionConfig, steps: Iterable[int]
) -> Iterator[list[int]]:
    """The batches of these steps, from an endless row of permutations of `indices`."""
    n, size = len(indices), config.batch_size

    @functools.lru_cache(2)
    def permutation(epoch: int) -> list[int]:
        return torch.randperm(n, generator=keyed_generator(config.seed, epoch, 0, ORDER)).tolist()

    for step in steps:
        places = range(step * size, (step + 1) * size)
        yield [indices[permutation(place // n)[place % n]] for place in places]

"""The training loop, on Accelerate: one for every method, adversary and device.

Random numbers are keyed by (seed, epoch, step) and never carried along, so a run that was stopped
in the middle of an epoch goes on bit for bit (on the CPU) from what a checkpoint holds: weights,
optimiser, counters, and the sums of the log interval under way.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor

from idaa_lib.adversaries import AttackError, NoAdversary
from idaa_lib.configs import ConfigError, TrainingConfig
from idaa_lib.evaluate.metrics import alignment, embedding_std, uniformity
from idaa_lib.methods import Method
from idaa_lib.methods.base import Batch, Step
from idaa_lib.runs import RunError, Stopped, Writer, checkpoints
from idaa_lib.runs.machine import signals
from idaa_lib.train import samples
from idaa_lib.train.feed import Feed
from idaa_lib.train.graphs import CudaGraph, Recorded
from idaa_lib.train.progress import Progress
from idaa_lib.views import View, keyed_generator

# Streams of random numbers that one step draws from (the last part of the key).
VIEWS, ATTACK, EPOCH = 1, 2, 3
# Seconds between two pictures of what is trained on.
SAMPLES_EVERY = 3.0
# What a line of progress has room for.
_SHOWN = {
    "loss", "adversarial_loss", "reconstruction_val", "rate_nats_val", "knn_top1_val",
    "ema_top1_val",
}  # fmt: skip


class Fit:
    """Training of `method` on uint8 `images` (N, 3, H, W) with `labels` (N,), under `config`.

    Args:
        accelerator: from `accelerator.make_accelerator`.
        adversary: called as in `adversaries`; alpha: weight of the adversarial loss.
        validate: method → figures, called after every `validate_every` epochs and the last.
        keep_every: epochs between two snapshots of the weights (None: there are none).
    Raises:
        ConfigError: a batch that cannot be drawn, before anything is written.

    `writer`, of the run directory, is set by the process that holds its lock.
    """

    writer: Writer | None = None

    def __init__(
        self,
        accelerator: Accelerator,
        method: Method,
        images: Tensor,
        labels: Tensor,
        config: TrainingConfig,
        adversary: Any = None,
        alpha: float = 1.0,
        validate: Callable[[Method], dict[str, float]] = lambda method: {},
        validate_every: int = 1,
        keep_every: int | None = None,
    ) -> None:
        batch, processes = config.batch_size, accelerator.num_processes
        if batch > len(images):
            raise ConfigError(f"batch_size={batch} is more than the {len(images)} training images.")
        if batch % processes:
            raise ConfigError(f"batch_size={batch} cannot be shared by {processes} processes.")
        self.accelerator, self.config = accelerator, config
        self.feed, self.labels = Feed(images, accelerator.device), labels
        self.adversary, self.alpha = adversary or NoAdversary(), alpha
        self.validate, self.validate_every = validate, validate_every
        self.keep_every = keep_every
        self.steps_per_epoch = method.steps_per_epoch(labels, config.batch_size)
        self.total = config.epochs * self.steps_per_epoch
        self.step, self.seconds = 0, 0.0
        self._paused = 0.0  # seconds that the last look for requests waited
        self._shown: dict[str, samples.Row] = {}
        self._sampled = -math.inf  # when the last picture was written
        self.sums: dict[str, Tensor] = {}
        self.count = 0
        self.shard = (accelerator.process_index, accelerator.num_processes)

        self.method = method.to(accelerator.device)
        self.method.to(memory_format=torch.channels_last)
        if config.compile:
            print("compile: the first steps take a minute or two longer.")
            torch.compiler.reset()  # a process may compile so much and no more
            method.compile_parts()
            self.adversary.compile_parts()
            # Of all kernels for a convolution the fastest, found by trying each (CUDA alone).
            torch.backends.cudnn.benchmark = True
        if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
            # Statistics of the global batch, as one process would have them (CUDA alone has this).
            # In place: a target network beside `network` has them too.
            torch.nn.SyncBatchNorm.convert_sync_batchnorm(method)
        self.recorded = Recorded(CudaGraph()) if self._recordable() else None
        groups = method.param_groups(config.epochs, self.steps_per_epoch)
        self.schedules = [(g.pop("lr_scale"), g.pop("schedule")) for g in groups]
        self.optimizer = method.optimizer(groups, config.learning_rate)

    def _recordable(self) -> bool:
        """Whether steps are recorded as a CUDA graph (`compile=True`)."""
        alone = self.accelerator.num_processes == 1
        possible = self.method.recordable and self.adversary.recordable
        return self.config.compile and self.accelerator.device.type == "cuda" and alone and possible

    # --- what a checkpoint holds ------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint of this moment (first process only)."""
        if self.writer is None:
            return
        tensors = self._weights()
        state = self.optimizer.state_dict()
        for index, slots in state["state"].items():
            tensors |= {f"optimizer.{index}.{k}": torch.as_tensor(v) for k, v in slots.items()}
        tensors |= {f"sums.{k}": v for k, v in self.sums.items()}
        counters = {"step": self.step, "count": self.count, "seconds": self.seconds}
        checkpoints.save(
            self.writer.run, self.step, tensors, counters | {"groups": state["param_groups"]}
        )

    def keep(self, epoch: int) -> None:
        """Write a snapshot of the weights after `epoch` epochs (first process only)."""
        if self.writer is not None:
            checkpoints.keep(self.writer.run, epoch, self._weights())

    def _weights(self) -> dict[str, Tensor]:
        self._check_finite()
        with self._unwrapped() as method:
            return {f"method.{k}": v for k, v in method.state_dict().items()}

    def load(self, tensors: dict[str, Tensor], state: dict[str, Any], *, anew: bool) -> None:
        """Take up a checkpoint, before `run`; `anew` keeps the weights and optimiser alone."""
        self.method.load_state_dict(checkpoints.under("method.", tensors))
        slots: dict[int, dict[str, Tensor]] = {}
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        for name, value in checkpoints.under("optimizer.", tensors).items():
            index, _, slot = name.partition(".")
            # Laid out as its parameter (channels_last): the fused optimiser pairs them by memory.
            like = params[int(index)]
            if value.shape == like.shape:
                value = torch.empty_like(like, dtype=value.dtype).copy_(value)
            slots.setdefault(int(index), {})[slot] = value
        # A run of its own keeps its own rates and decays.
        groups = self.optimizer.state_dict()["param_groups"] if anew else state["groups"]
        self.optimizer.load_state_dict({"state": slots, "param_groups": groups})
        if not anew:
            self.step, self.count, self.seconds = state["step"], state["count"], state["seconds"]
            self.sums = {
                k: v.to(self.accelerator.device)
                for k, v in checkpoints.under("sums.", tensors).items()
            }

    @contextmanager
    def _unwrapped(self) -> Iterator[Method]:
        """The method with its network outside Accelerate's wrapper: its names, no exchange."""
        prepared = self.method.network
        self.method.network = self.accelerator.unwrap_model(prepared, keep_fp32_wrapper=True)
        try:
            yield self.method
        finally:
            self.method.network = prepared

    # --- the loop ---------------------------------------------------------------------------

    def run(self) -> dict[str, float]:
        """Train to the end; the figures of the last validation.

        Raises:
            Stopped: Ctrl-C, SIGTERM or a stop request; the state was saved after a whole step.
            RunError: the loss or an attack's gradient is not finite.
        """
        self.method.network = self.accelerator.prepare_model(self.method.network)
        self.optimizer = self.accelerator.prepare_optimizer(self.optimizer)
        name = self.writer.run.stage if self.writer else ""
        images = self.method.images_per_step(self.config.batch_size)
        progress = Progress(name, self.total, self.step, images)
        figures: dict[str, float] = {}
        try:
            with signals() as asked:
                first = self.step // self.steps_per_epoch
                for epoch in range(first, self.config.epochs):
                    self._epoch(epoch, progress, asked)
                    last = epoch + 1 == self.config.epochs
                    if last or (epoch + 1) % self.validate_every == 0:
                        figures = self._validate()
                        self._log(progress, epoch, figures)
                    if not last and self.keep_every and (epoch + 1) % self.keep_every == 0:
                        self.keep(epoch + 1)
                    request = None if last else self._request(asked)
                    if last or request or (epoch + 1) % self.config.checkpoint_every == 0:
                        self.save()
                    self._obey(request)
        finally:
            progress.close()
        # A run killed between its last checkpoint and its summary has nothing left to train.
        return figures or self._validate()

    def _validate(self) -> dict[str, float]:
        self._check_finite()
        with self._unwrapped() as method:
            return self.validate(method)

    def _epoch(self, epoch: int, progress: Progress, asked: list[str]) -> None:
        config = self.config
        done = self.step - epoch * self.steps_per_epoch
        self.method.train()
        if done == 0:
            generator = keyed_generator(config.seed, epoch, 0, EPOCH)
            self.method.on_epoch_start(epoch, self.feed.images, generator)
        batches = self.method.batches(self.labels, config.batch_size, config.seed, epoch)
        mine = map(self._share, itertools.islice(batches, done, None))
        began = time.monotonic()
        for batch, images in self.feed(mine):
            self.train_step(epoch, images, batch)
            self.step += 1
            now = time.monotonic()
            self.seconds, began = self.seconds + now - began, now
            progress.update(self.step)
            logged = self.step % config.log_every == 0 or self.step == self.total
            if logged:
                self._flush(progress, epoch)
            self._sample(logged)
            # After an epoch's last step comes its validation; `run` asks once that is done.
            if self.step % self.steps_per_epoch and (request := self._request(asked)):
                self.save()
                self._obey(request)
            began += self._paused

    def _share(self, batch: Batch) -> Batch:
        """This process's part of a global batch."""
        rank, processes = self.shard
        return {key: index.chunk(processes)[rank] for key, index in batch.items()}

    def train_step(self, epoch: int, images: dict[str, Tensor], batch: dict[str, Tensor]) -> None:
        """One step on this process's part of a batch: uint8 images and their indices, by name."""
        for group, (scale, schedule) in zip(
            self.optimizer.param_groups, self.schedules, strict=True
        ):
            group["lr"] = self.config.learning_rate * scale * schedule(self.step)
        views = self.method.draw(
            images, keyed_generator(self.config.seed, epoch, self.step, VIEWS), self.shard
        )
        noise = keyed_generator(self.config.seed, epoch, self.step, ATTACK)
        work = partial(self._differentiate, noise)
        step, values = self.recorded(work, views, batch) if self.recorded else work(views, batch)
        self.optimizer.step()
        self.method.after_step(step, self.step / self.total)
        # Sums stay on the device: nothing waits for it between two lines of the log.
        for key, value in values.items():
            self.sums[key] = self.sums[key] + value if key in self.sums else value.clone()
        self.count += 1
        self._embeddings, self._shown = step.embeddings, step.shown

    def _differentiate(
        self, noise: torch.Generator, views: tuple[View, ...], batch: Batch
    ) -> tuple[Step, dict[str, Tensor]]:
        """The step that the method makes of views, with gradients in `.grad`, and what is logged.

        All that a step does on the device before the optimiser's: what a graph can record.
        """
        self.optimizer.zero_grad(set_to_none=True)
        with self.accelerator.autocast():  # for networks that Accelerate does not know
            step = self.method.step(views, batch)
        loss, parts = step.loss, dict(step.parts)
        if step.attacked is None and not isinstance(self.adversary, NoAdversary):
            raise ConfigError(
                f"{type(self.method).__name__} has nothing to attack: its Step lacks `attacked`, "
                f"`attack_loss` and `adversarial_loss`."
            )
        try:
            with self.accelerator.autocast():
                attack = self.adversary(
                    step.attacked,
                    step.attack_loss,
                    generator=noise,
                    shard=self.shard,
                )
        except AttackError as error:
            raise RunError(f"At step {self.step}: {error}") from error
        if attack is not None:
            assert step.adversarial_loss is not None
            assert step.attacked is not None
            with self.accelerator.autocast():
                adversarial = step.adversarial_loss(attack.images)
            x_adv = attack.images.detach()
            moved = (x_adv - step.attacked).flatten(1).norm(dim=1).mean()
            parts |= {"clean_loss": step.loss, "adversarial_loss": adversarial, "moved": moved}
            if attack.reconstruction is not None:
                step.shown["G(x)"] = attack.reconstruction
            step.shown |= {"x′": x_adv, "x′ − x": (x_adv, step.attacked)}
            loss = loss + self.alpha * adversarial
        self.accelerator.backward(loss)
        return step, {key: value.detach().float() for key, value in {"loss": loss, **parts}.items()}

    def _flush(self, progress: Progress, epoch: int) -> None:
        """Means over the log interval, and what would tell a collapse, to the log."""
        self._check_finite()
        found = {k: v / self.count for k, v in self.sums.items()}
        self.sums, self.count = {}, 0
        if self._embeddings is not None:
            found["alignment"] = alignment(*self._embeddings)
            found["uniformity"] = uniformity(self._embeddings[0])
            found["embedding_std"] = embedding_std(self._embeddings[0])
        # One wait for the device, not one for each.
        values = torch.stack(list(found.values())).tolist()
        lr = self.optimizer.param_groups[0]["lr"]
        self._log(progress, epoch, dict(zip(found, values, strict=True)) | {"lr": lr})

    def _sample(self, logged: bool) -> None:
        """A picture of the step's images, at the end of an epoch or where a line was logged some
        seconds after the last one. They are let go of: no batch lives on into the next step."""
        due = logged and time.monotonic() - self._sampled >= SAMPLES_EVERY
        due = due or self.step % self.steps_per_epoch == 0
        if due and self._shown and self.writer is not None:
            recipe = self.method.recipe
            samples.write(self.writer.run, self._shown, recipe.mean, recipe.std)
            self._sampled = time.monotonic()
        self._shown = {}

    def _check_finite(self) -> None:
        """Before weights are saved or read: a checkpoint of NaN would be resumed from for ever.

        Raises:
            RunError: the loss or an attack's gradient was not finite in a step since the last line
                of the log.
        """
        try:
            self.adversary.check()
        except AttackError as error:
            raise RunError(
                f"By step {self.step}: {error} The last checkpoint is intact."
            ) from error
        total = self.sums["loss"].item() if self.sums else 0.0
        if not math.isfinite(total):
            raise RunError(
                f"The loss is {total} by step {self.step}: lower learning_rate "
                f"({self.config.learning_rate:g}) or try precision='fp32'; the last checkpoint "
                f"is intact."
            )

    def _log(self, progress: Progress, epoch: int, values: dict[str, float]) -> None:
        if self.writer is None:
            return
        speed = {"images_per_second": progress.images_per_second}
        self.writer.log(step=self.step, epoch=epoch, time=time.time(), **values, **speed)
        self.writer.state(
            state="going",
            step=self.step,
            steps=self.total,
            epoch=epoch,
            seconds_left=progress.seconds_left,
            memory=_memory(self.accelerator.device),
            **speed,
        )
        self.accelerator.log(values, step=self.step)
        shown = {k: v for k, v in values.items() if k in _SHOWN}
        progress.show(f"{epoch + 1}/{self.config.epochs}", shown)

    def _request(self, asked: list[str]) -> str | None:
        """Why to stop now, if so. A pause is waited out here; with several processes all agree."""
        request, self._paused = asked[0] if asked else None, 0.0
        if self.writer is not None and request is None:
            request = self.writer.request()
            began = time.monotonic()
            while request == "pause" and not asked:
                self.writer.state(state="going", paused=True)
                time.sleep(0.2)
                request = self.writer.request()
                self._paused = time.monotonic() - began
            if self._paused:
                self.writer.state(paused=False)
                request = asked[0] if asked else request
        if self.accelerator.num_processes > 1:
            flag = torch.tensor(float(request is not None), device=self.accelerator.device)
            request = "asked" if self.accelerator.reduce(flag, "sum").item() else None
        return request

    def _obey(self, request: str | None) -> None:
        if request:
            raise Stopped(
                f"Stopped ({request}) after step {self.step} of {self.total} and saved: "
                f"start the same run again to go on."
            )


def _memory(device: torch.device) -> dict[str, float]:
    """MiB: what this process holds now, and the most it has held on a CUDA device."""
    held = {"resident": psutil.Process().memory_info().rss / 2**20}
    if device.type == "cuda":
        held["cuda"] = torch.cuda.max_memory_allocated(device) / 2**20
    return held

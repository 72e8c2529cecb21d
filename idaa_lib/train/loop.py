"""The training loop, on Accelerate: one for every method, adversary and device.

Random numbers are keyed by (seed, epoch, step) and never carried along; `Steps` does the rest of
what makes a run that stopped anywhere continue bit for bit (on the CPU).
"""

from __future__ import annotations

import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from idaa_lib.adversaries import Adversary, AttackError, NoAdversary, ascent
from idaa_lib.configs import ConfigError, TrainingConfig
from idaa_lib.data.streamed import Images
from idaa_lib.evaluate.encoders import features
from idaa_lib.evaluate.metrics import alignment, embedding_std, uniformity
from idaa_lib.methods import Method, Moment, Step
from idaa_lib.methods.base import Batch, Loss, Work
from idaa_lib.methods.schedules import build_optimizer, build_schedule, spare_vectors
from idaa_lib.nets.processes import gather, share_statistics
from idaa_lib.runs import Run, RunError, Writer, checkpoints
from idaa_lib.runs.steps import State, Steps
from idaa_lib.train import samples
from idaa_lib.train.feed import Feed
from idaa_lib.train.graphs import CudaGraph, Recorded
from idaa_lib.views import keyed_generator, send

Pulse = Callable[[int], object]  # takes how many images are done
Validation = Callable[[Method, Pulse], dict[str, float]]
# Streams of random numbers that one step draws from (the last part of the key).
VIEWS, ATTACK = 1, 2
# Seconds between two pictures of what is trained on.
PICTURE_EVERY = 3.0


class Fit:
    """Training of `method` on uint8 `images` (N, 3, H, W), a tensor or not, under `config`.

    Args:
        accelerator: from `accelerator.make_accelerator`.
        adversary: None for none; its adversarial loss is weighted by the knob `alpha`.
        validate: method → figures, called after every `knn_every` epochs and the last. Now and
            then it calls its second argument, which raises where the training shall stop.
    Raises:
        ConfigError: a batch that cannot be drawn, before anything is written.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        method: Method,
        images: Tensor | Images,
        config: TrainingConfig,
        adversary: Adversary | None = None,
        validate: Validation = lambda method, pulse: {},
    ) -> None:
        batch, processes = config.batch_size, accelerator.num_processes
        if batch % processes:
            raise ConfigError(f"batch_size={batch} cannot be shared by {processes} processes.")
        self.accelerator, self.config = accelerator, config
        self.device = accelerator.device
        self.rank, self.processes = accelerator.process_index, processes
        self.feed = Feed(images, self.device)
        self.adversary = adversary or NoAdversary()
        self.alpha = getattr(config, "alpha", 1.0)
        self.validate, self.validate_every = validate, getattr(config, "knn_every", 1)
        self.keep_every = getattr(config, "keep_every", None)
        self.per_epoch = method.steps_per_epoch()
        self.total = config.epochs * self.per_epoch
        self.progress = torch.zeros((), device=self.device)
        self.writer: Writer | None = None
        self._last: Step | None = None
        self._figures: dict[str, float] = {}  # of the last validation
        self._pictured = -math.inf  # when the last picture was written

        self.method = method.to(self.device)
        self.method.to(memory_format=torch.channels_last)
        self.adversary.prepare(self.device)
        if config.compile and can_compile():
            torch.compiler.reset()  # a process may compile so much and no more
            method.compile_parts()
        if processes > 1:
            share_statistics(method)
        self.recorded = Recorded(CudaGraph()) if self._recordable() else None
        groups = method.param_groups()
        if config.optimizer == "lars":
            groups = [part for group in groups for part in spare_vectors(group, adapt=False)]
        self.schedules, self.factors = [], [group.pop("rate", 1.0) for group in groups]
        for group in groups:
            group.setdefault("weight_decay", config.weight_decay)
            name, warmup = (group.pop(key, getattr(config, key)) for key in ("schedule", "warmup"))
            self.schedules.append(build_schedule(name, config.epochs, self.per_epoch, warmup))
        self.optimizer: Any = build_optimizer(config.optimizer, groups, config.learning_rate)
        self._hold_rates()

    def _recordable(self) -> bool:
        """Whether steps are recorded as a CUDA graph: on one GPU, where method and adversary say in
        their own class that they can be."""
        kinds = (type(self.method), type(self.adversary))
        possible = all(vars(kind).get("recordable", False) for kind in kinds)
        return self.device.type == "cuda" and self.processes == 1 and possible

    def _hold_rates(self) -> None:
        """In a recorded step the optimiser reads its rates from tensors that stay."""
        cuda = self.device.type == "cuda"
        for group in self.optimizer.param_groups:
            if "capturable" in group:
                group["capturable"] = cuda and self.recorded is not None
            if self.recorded is not None:  # a CUDA kernel reads a float of 32 bits
                dtype = torch.float32 if cuda else torch.float64
                group["lr"] = torch.tensor(float(group["lr"]), dtype=dtype, device=self.device)

    # --- what a checkpoint holds ------------------------------------------------------------------

    def state(self) -> State:
        """Tensors by name and JSON values, from which training continues."""
        tensors, state = self.weights(), self.optimizer.state_dict()
        for index, slots in state["state"].items():
            tensors |= {f"optimizer.{index}.{k}": torch.as_tensor(v) for k, v in slots.items()}
        # Each step sets its rate, which may be a tensor here.
        groups = [g | {"lr": self.config.learning_rate} for g in state["param_groups"]]
        return tensors, {"groups": groups}

    def weights(self) -> dict[str, Tensor]:
        """The method's state, by name."""
        with self._unwrap() as method:
            return {f"method.{k}": v for k, v in method.state_dict().items()}

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any] | None) -> None:
        """Load a checkpoint. Without `state` (another run's weights) the optimiser keeps this run's
        learning rates and weight decays."""
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
        groups = state["groups"] if state else self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": slots, "param_groups": groups})
        self._hold_rates()

    @contextmanager
    def _unwrap(self) -> Iterator[Method]:
        """The method with its network outside Accelerate's wrapper: its names, no exchange."""
        prepared = self.method.network
        self.method.network = self.accelerator.unwrap_model(prepared, keep_fp32_wrapper=True)
        try:
            yield self.method
        finally:
            self.method.network = prepared

    # --- the loop ---------------------------------------------------------------------------------

    def run(self, run: Run, writer: Writer | None) -> dict[str, float]:
        """Train to the end; the figures of the last validation.

        Args:
            writer: of the run, in the first process; None in the others.
        Raises:
            Stopped, RunError: as `Steps`; also where an attack's gradient is not finite.
        """
        self.writer = writer
        self.steps = steps = Steps(
            run,
            writer,
            self.total,
            per_epoch=self.per_epoch,
            images=self.method.images_per_step(),
            state=self.state,
            restore=self.restore,
            log_every=self.config.log_every,
            checkpoint_every=self.config.checkpoint_every * self.per_epoch,
            checkpoint_minutes=self.config.checkpoint_minutes,
            at_log=self._at_log,
            at_epoch_end=self._at_epoch_end,
            check=self.adversary.check,
            batch_of=self._batch_of,
            track=self._track,
        )
        steps.resume()
        with warnings.catch_warnings():  # torch 2.14 has another name for it, and 2.11 has not
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
            self.method.network = self.accelerator.prepare_model(self.method.network)
        batches = self.feed(self._batches(steps.step))
        try:
            with gpu_settings(self.accelerator.mixed_precision):
                for step in steps:
                    self.method.train()
                    if step % self.per_epoch == 0:
                        self._before_epoch(steps)
                    batch, images = next(batches)
                    steps.add(self.train_step(step, images, batch))
        except AttackError as error:
            if not ascent.waits(self.device):  # else the loss was NaN too, and its step is kept
                steps.note(str(error), steps.step + 1)
            raise RunError(f"By step {steps.step}: {error} What was saved is intact.") from error
        # A run killed between its last checkpoint and its summary has nothing left to train.
        return self._figures or self._validate()

    def _batches(self, first: int) -> Iterator[Batch]:
        """This process's part of each batch from step `first` on."""
        sizes = self.feed.images.sizes if self.feed.streamed else None
        for epoch in range(first // self.per_epoch, self.config.epochs):
            start, begin = max(0, first - epoch * self.per_epoch), epoch * self.per_epoch
            batches = itertools.islice(enumerate(self.method.batches(epoch), begin), start, None)
            for step, whole in batches:
                batch = self._mine(whole)
                yield batch if sizes is None else batch | self._cuts(step, batch, sizes)

    def _cuts(self, step: int, batch: Batch, sizes: Tensor) -> Batch:
        """What is cut of streamed photographs of these sizes (N, 2), as `Feed` takes it."""
        numbers = self._draw(step, {name: len(index) for name, index in batch.items()})
        cuts = {}
        for i, (name, recipe) in enumerate(self.method.recipes()):
            cuts[f"cut {i}"] = recipe.cut(numbers[f"view {i}"], sizes[batch[name]])
        return cuts

    def _batch_of(self, step: int) -> dict[str, list[int]]:
        """Indices of all processes' images in a step, by name."""
        epoch, at = divmod(step, self.per_epoch)
        batch = next(itertools.islice(self.method.batches(epoch), at, None))
        return {name: index.tolist() for name, index in batch.items()}

    def _before_epoch(self, steps: Steps) -> None:
        recipe = self.method.recipe

        def pulse(message: str) -> None:
            if steps.saved != steps.step:
                steps.save()  # what a stop inside goes back to
            steps.pulse(message)

        def embed(layer: str = "backbone", **views: Any) -> Tensor:
            units, device = (recipe.size, recipe.mean, recipe.std), self.device
            how = {"device": device, "output_device": device, **views}
            how["originals"] = self.feed.streamed
            how["bf16"] = self.accelerator.mixed_precision == "bf16"
            with self._unwrap() as method:
                return features(method.encoder(layer), self.feed.images, *units, **how)

        work = Work(self.feed.images, embed, pulse, self.accelerator.print)
        self.method.before_epoch(steps.step // self.per_epoch, work)

    def train_step(self, step: int, images: Batch, batch: Batch) -> dict[str, Tensor]:
        """One step on this process's part of a batch, uint8 images and their indices by name; the
        scalars to log, which a recorded step overwrites at the next one."""
        rate, schedules = self.config.learning_rate, zip(self.schedules, self.factors, strict=True)
        self._rates = [rate * factor * schedule(step) for schedule, factor in schedules]
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            held = isinstance(group["lr"], Tensor)  # a recording reads it
            group["lr"] = group["lr"].fill_(rate) if held else rate
        self.progress.fill_(step / self.total)
        numbers = self._numbers(step, {name: len(index) for name, index in batch.items()})
        if self.recorded is None:
            outcome, values = self._work(images, batch, numbers)
        else:
            outcome, values = self.recorded(self._work, images, batch, numbers)
        self.method.after_step(outcome, self._moment(step, numbers))
        self._last = outcome
        return values

    def _moment(self, step: int, numbers: dict[str, Tensor]) -> Moment:
        return Moment(step // self.per_epoch, step, self.total, self.progress, numbers)

    def _numbers(self, step: int, sizes: dict[str, int]) -> dict[str, Tensor]:
        """The step's random numbers on the device."""
        size, n = self.method.recipe.size, sizes.get("images") or max(sizes.values())
        shape = torch.Size((n * self.processes, 3, size, size))
        key = self.config.seed, step // self.per_epoch, step, ATTACK
        attack = self.adversary.numbers(shape, keyed_generator(*key))
        mine = self._mine({f"attack {name}": value for name, value in attack.items()})
        numbers = self._draw(step, sizes) | mine
        return {name: send(value, self.device) for name, value in numbers.items()}

    def _draw(self, step: int, sizes: dict[str, int]) -> dict[str, Tensor]:
        """The method's random numbers: drawn for the global batch on the CPU, of which this process
        keeps its rows, so that n processes draw what one would."""
        whole = {name: n * self.processes for name, n in sizes.items()}
        key = self.config.seed, step // self.per_epoch, step, VIEWS
        return self._mine(self.method.numbers(whole, keyed_generator(*key)))

    def _mine(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.chunk(self.processes)[self.rank] for name, value in values.items()}

    def _work(
        self, images: Batch, batch: Batch, numbers: dict[str, Tensor]
    ) -> tuple[Step, dict[str, Tensor]]:
        """All that a step does on the device before `after_step`: what a graph can record."""
        moment = self._moment(0, numbers)
        self.optimizer.zero_grad(set_to_none=True)
        views = self.method.draw(images, batch, moment)
        with self.accelerator.autocast():  # for networks that Accelerate does not know
            step = self.method.step(views, batch, moment)
        attacked = not isinstance(self.adversary, NoAdversary)
        clean = self._differentiate(step.loss, last=not attacked)
        if clean.ndim:
            raise ConfigError(
                f"The loss of {type(self.method).__name__} has the shape {tuple(clean.shape)}: "
                f"give a scalar, such as its mean."
            )
        values = {"loss": clean, **step.parts}
        if attacked:
            adversarial = self._differentiate(self._attack(step, numbers, values), self.alpha)
            values |= {"clean_loss": clean, "adversarial_loss": adversarial}
            values["loss"] = clean + self.alpha * adversarial
        if values["loss"].requires_grad:
            self.accelerator.backward(values["loss"])
        self.optimizer.step()
        return step, {name: value.detach().float() for name, value in values.items()}

    def _differentiate(self, loss: Loss, weight: float = 1.0, last: bool = True) -> Tensor:
        """The loss: a tensor is returned as it is. Of closures each is computed, multiplied by
        `weight` and differentiated at once; their sum is returned.

        Processes exchange gradients only in the `last` backward pass of a step, because a single
        one may not reach all parameters, such as adversarial norms.
        """
        if isinstance(loss, Tensor):
            return loss
        closures, losses = list(loss), []
        for i, closure in enumerate(closures, 1):
            final = last and i == len(closures)
            network = self.method.network
            with nullcontext() if final else self.accelerator.no_sync(network):
                with self.accelerator.autocast():
                    losses.append(closure())
                self.accelerator.backward(weight * losses[-1])
        return torch.stack(losses).detach().sum()

    def _attack(self, step: Step, numbers: dict[str, Tensor], values: dict[str, Tensor]) -> Loss:
        """The adversarial loss; how far x′ moved is added to `values`, pictures to the step."""
        if step.attacked is None or step.attack_loss is None or step.adversarial_loss is None:
            raise ConfigError(
                f"{type(self.method).__name__} has nothing to attack: its Step lacks `attacked`, "
                f"`attack_loss` and `adversarial_loss`."
            )
        x = step.attacked.images
        mine = checkpoints.under("attack ", numbers)
        with self.accelerator.autocast():
            attack = self.adversary(x, step.attack_loss, numbers=mine)
        with self.accelerator.autocast():
            loss = step.adversarial_loss(attack.images)
        x_adv = attack.images.detach()
        values["moved"] = (x_adv - x).flatten(1).norm(dim=1).mean()
        if attack.reconstruction is not None:
            step.pictures["G(x)"] = attack.reconstruction
        step.pictures |= {"x′": x_adv, "x′ − x": (x_adv, x)}
        return loss

    # --- what Steps asks for ----------------------------------------------------------------------

    def _at_log(self) -> dict[str, Any]:
        """Further values of a line: what would tell a collapse, and the rate."""
        values: dict[str, Any] = {"lr": self._rates[0]}
        if self._last and self._last.embeddings:
            z1, z2 = map(gather, self._last.embeddings)  # of pairs of all processes' images
            values |= {"alignment": alignment(z1, z2), "uniformity": uniformity(z1)}
            values["embedding_std"] = embedding_std(z1)
        return values

    def _track(self, values: Mapping[str, float], step: int) -> None:
        self.accelerator.log(values, step=step)
        if time.monotonic() - self._pictured >= PICTURE_EVERY:
            self._picture()

    def _picture(self) -> None:
        if self._last and self._last.pictures and self.writer:
            recipe = self.method.recipe
            samples.write(self.writer.run, self._last.pictures, recipe.mean, recipe.std)
            self._pictured = time.monotonic()

    def _at_epoch_end(self, epoch: int) -> dict[str, float]:
        epochs = epoch + 1
        last = epochs == self.config.epochs
        self._picture()
        self._last = None  # no batch lives on through validation
        if self.keep_every and epochs % self.keep_every == 0 and self.writer and not last:
            checkpoints.keep(self.writer.run, epochs, self.weights())
        if not last and epochs % self.validate_every:
            return {}
        self._figures = self._validate()
        return self._figures

    def _validate(self) -> dict[str, float]:
        with self._unwrap() as method:
            return self.validate(method, lambda done: self.steps.pulse())


@contextmanager
def gpu_settings(precision: str) -> Iterator[None]:
    """Inside, cuDNN tries each kernel for a convolution and takes the fastest; without mixed
    precision (`no`) no product is in TF32: fp32 is IEEE's. Put back afterwards."""
    backends = torch.backends
    before = backends.cudnn.benchmark, backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32
    backends.cudnn.benchmark = True
    if precision == "no":
        backends.cudnn.allow_tf32 = backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        backends.cudnn.benchmark, backends.cudnn.allow_tf32 = before[:2]
        backends.cuda.matmul.allow_tf32 = before[2]


def can_compile() -> bool:
    """Whether torch.compile works here; where it does not, a sentence says why."""
    try:
        torch.compile(torch.sin)(torch.zeros(1))
    except Exception as error:  # no C++ compiler, or an old one: inductor has its own errors
        reason = str(error).strip().split("\n")[0][:200]
        print(
            f"compile=True is left out: torch.compile does not work on this machine ({reason}); "
            f"install a C++ compiler (apt install g++)."
        )
        return False
    print("compile: the first steps take a minute or two longer.")
    return True

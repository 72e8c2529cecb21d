"""The one resumable loop: it counts, logs, keeps the heartbeat, hears requests, saves and resumes.

SSL, FixMatch, the VAE, the probe on random crops and the detection example are bodies of it:

    for step in steps:
        steps.add({"loss": train_step(step)})

The caller derives all random numbers from (seed, epoch, step) and keeps no generator, so a run that
stopped anywhere continues bit for bit (on the CPU) from what a checkpoint holds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import psutil
import torch
from torch import Tensor

from idaa_lib.nets.processes import average, count_processes, do_once, exchange
from idaa_lib.runs import checkpoints
from idaa_lib.runs.directory import Run, Stopped, Writer
from idaa_lib.runs.files import RunError, write_json
from idaa_lib.runs.machine import signals
from idaa_lib.runs.progress import Lines, brief

State = tuple[dict[str, Tensor], dict[str, Any]]  # tensors by name, JSON values


class Steps:
    """The steps of a run that are left, each as its number; iterate once.

    Args:
        run: whose checkpoints are read, by the first process. writer: of it; None in the others.
        total: steps of the whole run. per_epoch: steps of an epoch. images: seen in a step.
        log_every, checkpoint_every: in steps. A checkpoint is also written at the end, before
            `Stopped`, and `checkpoint_minutes` after the last; a line of the log also at the end.
        state: what a checkpoint holds of the training (the counters here are added to it).
        restore: takes that up again.
        at_log: further values of a line of the log, read when one is due.
        at_epoch_end: epoch → values to log after its last step (validation). A stop that `pulse`
            hears meanwhile saves first; when the run goes on, they are made again.
        check: raises RunError where what would be saved is broken.
        batch_of: step → indices of its images by name, JSON values, kept where its loss is not
            finite.
        track: given each line of the log and its step (experiment trackers, pictures).
    Speed and time left are computed from the steps since the last line of the log: validation,
    checkpoints and pauses do not count.
    On a GPU a line of the log makes nobody wait: it is written after the step by whose end its
    scalars have come, and before the next line, validation, a checkpoint or a pause.
    Raises (while iterating):
        Stopped: a signal (`machine.signals`) or a request, after the state of a whole step was
            saved.
        RunError: `loss`, or what would be saved, is not finite. `not_finite.json` of the run has
            the first such step, its images, and the step of the last checkpoint.
    """

    def __init__(
        self,
        run: Run,
        writer: Writer | None,
        total: int,
        *,
        per_epoch: int,
        images: int,
        state: Callable[[], State],
        restore: Callable[[dict[str, Tensor], dict[str, Any]], None],
        log_every: int = 10,
        checkpoint_every: int = 0,
        checkpoint_minutes: float | None = None,
        at_log: Callable[[], Mapping[str, Any]] = dict,
        at_epoch_end: Callable[[int], Mapping[str, float]] = lambda epoch: {},
        check: Callable[[], None] = lambda: None,
        batch_of: Callable[[int], Mapping[str, list[int]]] = lambda step: {},
        track: Callable[[Mapping[str, float], int], None] = lambda values, step: None,
    ) -> None:
        self.run, self.writer, self.total = run, writer, total
        self.per_epoch, self.images = per_epoch, images
        self.log_every, self.checkpoint_every = log_every, checkpoint_every or per_epoch
        self.checkpoint_seconds = 60 * checkpoint_minutes if checkpoint_minutes else math.inf
        self._state, self._restore, self._check = state, restore, check
        self._at_log, self._at_epoch_end, self._track = at_log, at_epoch_end, track
        self._batch_of = batch_of
        self.step, self.seconds = 0, 0.0  # done so far; spent in steps, without pauses
        self.saved: int | None = None  # the step of the last checkpoint
        self._judged = True  # whether `at_epoch_end` was called for all epochs that ended
        self._saved_at = time.monotonic()
        self.sums: dict[str, Tensor] = {}  # over the `count` steps of the log interval under way
        self.count = 0
        self._finite: Tensor | int = 0  # of the steps since `_since`, how many were finite
        self._since = 0
        self._interval = (0, 0.0)  # steps and seconds at the last line of the log
        self._pace = 0.0  # seconds a step, once there was a line
        self._line: Line | None = None  # of which the scalars are on their way

    def resume(self) -> None:
        """Continue after the run's last checkpoint, if there is one."""
        checkpoint = do_once(lambda: checkpoints.load(self.run))
        if checkpoint is not None:
            tensors, values = checkpoint
            self._restore(tensors, values)
            self.saved = values["step"]
            self.step, self.count, self.seconds = (values[k] for k in ("step", "count", "seconds"))
            self.sums = checkpoints.under("sums.", tensors)
            self._judged = values.get("judged", True)
            if self.writer is not None:
                print(f"{self.run.id}: continues after step {self.step} of {self.total}.")
        self._interval, self._since = (self.step, self.seconds), self.step
        if self.writer is not None:
            # What a killed process logged after its last checkpoint is logged again.
            self.writer.rewind(self.step)

    def __iter__(self) -> Iterator[int]:
        self._lines = Lines()
        if self.writer is not None:
            self.writer.interrupts = False
        with signals() as self._signal:
            if not self._judged:
                self._judge()
                self.save()
            while self.step < self.total:
                start = time.monotonic()
                yield self.step
                self.seconds += time.monotonic() - start
                self.step += 1
                self._finish_step()

    def _finish_step(self) -> None:
        last = self.step == self.total
        epoch = (self.step - 1) // self.per_epoch
        logs, ends = last or self.step % self.log_every == 0, self.step % self.per_epoch == 0
        self._write_line(wait=logs)
        if logs:
            means = {name: value / self.count for name, value in self.sums.items()}
            values = {**means, **self._at_log(), "finite": self._finite}
            self._line = Line(self.step, epoch, values, self._since)
            self.sums, self.count, self._finite, self._since = {}, 0, 0, self.step
            self._write_line(wait=False)
        if ends or last:
            self.check()
        if ends:
            self._judge()
        # Several processes ask where they log: to agree, each waits for the others.
        asks = not last and (logs or ends or count_processes() == 1)
        request = self._request() if asks else None
        due = time.monotonic() - self._saved_at >= self.checkpoint_seconds
        if last or request or due or self.step % self.checkpoint_every == 0:
            self.save()
        if request:
            self._stop(request)

    def _judge(self) -> None:
        epoch, self._judged = (self.step - 1) // self.per_epoch, False
        figures = self._at_epoch_end(epoch)
        self._judged = True
        if figures:
            self._log(self.step, epoch, dict(figures))

    def _stop(self, request: str) -> NoReturn:
        raise Stopped(
            f"Stopped ({request}) after step {self.step} of {self.total} and saved: start the same "
            f"run again to continue."
        )

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add a step's scalars to the means of the log interval. They stay on their device: nothing
        waits for it between two lines of the log."""
        for name, value in values.items():
            value = value.detach().float()
            sum_ = self.sums.get(name)
            self.sums[name] = value.clone() if sum_ is None else sum_.to(value.device) + value
        if "loss" in self.sums:  # a sum stays NaN or infinite once it is
            self._finite = self._finite + self.sums["loss"].isfinite().float()
        self.count += 1

    def pulse(self, message: str = "") -> None:
        """Hear requests in work that lasts long, before a step or at an epoch's end; what it does
        now is said in `state.json`.

        Raises:
            Stopped: asked to. The work starts again from a checkpoint, which there is: the caller
                saves before a step changes any state.
        """
        self._beat(message=message)
        start = time.monotonic()
        request = self._request()
        if self._judged:
            self.seconds -= time.monotonic() - start  # a pause is no time of the step
        elif request:
            self.save()
        if request:
            self._stop(request)

    def save(self) -> None:
        """Write a checkpoint of this moment (first process only)."""
        if self.writer is not None:
            self.check()
            tensors, values = self._state()
            for name, tensor in tensors.items():
                if tensor.is_floating_point() and not tensor.isfinite().all():
                    self._refuse(f"{name} is not finite", self.step)
            tensors |= {f"sums.{name}": value for name, value in self.sums.items()}
            counters = {"step": self.step, "count": self.count, "seconds": self.seconds}
            counters["judged"] = self._judged
            checkpoints.save(self.run, self.step, tensors, values | counters)
        self.saved, self._saved_at = self.step, time.monotonic()

    def check(self) -> None:
        """Before weights are saved or read: a checkpoint of NaN would be resumed for ever.

        Raises:
            RunError: the loss was not finite in a step since the last line of the log, or as
                the caller's own check says.
        """
        self._write_line()
        if not math.isfinite(loss := self.sums["loss"].item() if "loss" in self.sums else 0.0):
            self._refuse(f"The loss is {loss}", self._since + int(self._finite) + 1)
        self._check()

    def _refuse(self, what: str, step: int) -> NoReturn:
        """Keep what is known of the step, counted from 1, whose numbers were not finite. Raises."""
        good = "there is no checkpoint yet"
        if self.saved is not None:
            good = f"the last checkpoint, of step {self.saved}, is intact"
        path = self.note(what, step)
        self._check()
        raise RunError(
            f"{what} at step {step}: lower learning_rate or try precision='fp32'; {good}, and the "
            f"indices of the step's images are in {path}."
        )

    def note(self, what: str, step: int) -> Path:
        """The file that keeps what is known of a step, counted from 1, whose numbers were not
        finite."""
        path = self.run.path / "not_finite.json"
        if self.writer is not None:
            about = {"step": step, "what": what, "checkpoint": self.saved}
            write_json(path, about | {"images": self._batch_of(step - 1)})
        return path

    def _write_line(self, wait: bool = True) -> None:
        """Write the line that is on its way, if there is one; without `wait` only if it has come.
        Raises as `check`, by the line's own step."""
        line = self._line
        if line is None or not (wait or line.event is None or line.event.query()):
            return
        start = time.monotonic()
        values, self._line = line.read(), None
        self.seconds += time.monotonic() - start  # in which the device takes its steps
        finite = values.pop("finite")
        if not math.isfinite(loss := values.get("loss", 0.0)):
            self.step = line.step  # for the caller's sentence
            self._refuse(f"The loss is {loss}", line.since + int(finite) + 1)
        self._log(line.step, line.epoch, values)

    def _log(self, step: int, epoch: int, values: dict[str, float]) -> None:
        if self.writer is None:
            return
        before, seconds = self._interval
        if step > before:
            self._pace = (self.seconds - seconds) / (step - before)
            values = values | {"images_per_second": self.images / max(self._pace, 1e-9)}
            self._interval = step, self.seconds
        seconds_left = (self.total - self.step) * self._pace if self._pace else None
        self.writer.log(step=step, epoch=epoch, time=time.time(), **values)
        self._track(values, step)
        self.writer.state(
            state="going",
            step=step,
            steps=self.total,
            epoch=epoch,
            seconds_left=seconds_left,
            memory=memory(),
        )
        at = f"epoch {epoch + 1}/{-(-self.total // self.per_epoch)} · step {self.step}/{self.total}"
        text = f"{self.run.stage} · {at} · {brief(values, seconds_left)}"
        self._lines.show(self.step / self.total, text, self.step >= self.total)

    def _request(self) -> str | None:
        """Why to stop now, or None. A pause is waited out here, by all processes together."""
        if (request := self._wish()) == "pause":
            self._write_line()
            self._beat(paused=True)
            while request == "pause":
                time.sleep(0.2)
                self._beat()
                request = self._wish()
            self._beat(paused=False)
        return request

    def _wish(self) -> str | None:
        """The most pressing of what all processes want: a signal or `stop`, `pause`, nothing."""
        request = self.run.request if self.writer is not None else None
        wishes = filter(None, exchange(self._signal() or request))
        return min(wishes, key=lambda wish: wish == "pause", default=None)

    def _beat(self, **news: Any) -> None:
        if self.writer is not None:
            self.writer.state(state="going", **news)


class Line:
    """A line of the log, whose scalars on the device come in one copy for which nothing waits; of
    several processes, the means of theirs."""

    def __init__(self, step: int, epoch: int, values: Mapping[str, Any], since: int = 0) -> None:
        self.step, self.epoch, self.values, self.since = step, epoch, dict(values), since
        tensors = {k: v.detach().float() for k, v in values.items() if isinstance(v, Tensor)}
        stacked = average(torch.stack([*tensors.values()])) if tensors else torch.empty(0)
        self.names = [*tensors]
        self.copy = stacked.to("cpu", non_blocking=stacked.is_cuda)  # into pinned memory
        self.event = torch.cuda.current_stream().record_event() if stacked.is_cuda else None

    def read(self) -> dict[str, float]:
        """Its values as numbers; waits for them."""
        if self.event is not None:
            self.event.synchronize()
        return self.values | dict(zip(self.names, self.copy.tolist(), strict=True))


def memory() -> dict[str, float]:
    """MiB that this process holds now, and the most it has held on a CUDA device."""
    held = {"resident": psutil.Process().memory_info().rss / 2**20}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        held["cuda"] = torch.cuda.max_memory_allocated() / 2**20
    return held

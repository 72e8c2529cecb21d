"""A training step recorded as a CUDA graph: one launch in the place of a thousand.

At 32 px and batch 256 a GPU is done with the kernels of a step before Python has launched them
(benchmarks/results, `profile-*` on an H200). A recorded step is launched as a whole. It computes
what it was recorded to compute: tensors that lie where they lay, and nothing that Python decides.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from idaa_lib.configs import ConfigError
from idaa_lib.methods.base import Batch
from idaa_lib.views import View

WARM_UP = 3  # steps that are taken as they are, in which libraries choose their kernels
T = TypeVar("T")


class Recorder(Protocol):
    """What a device offers for it."""

    def aside(self, work: Callable[[], T]) -> T:
        """Do it as it is, but where it will be recorded."""

    def record(self, work: Callable[[], T]) -> T:
        """Only note what `work` does on the device; its results have no values yet."""

    def replay(self) -> None:
        """Do what was noted, on the same tensors."""


class CudaGraph:
    """`Recorder` of a CUDA device. Other streams may go on allocating while it records."""

    def __init__(self) -> None:
        self.graph, self.stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()

    def aside(self, work: Callable[[], T]) -> T:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            made = work()
        torch.cuda.current_stream().wait_stream(self.stream)
        return made

    def record(self, work: Callable[[], T]) -> T:
        gc.collect()  # what an earlier recording left in a cycle holds its whole memory
        here = torch.cuda.current_stream()
        try:
            with torch.cuda.graph(
                self.graph, stream=self.stream, capture_error_mode="thread_local"
            ):
                return work()
        finally:
            torch.cuda.set_stream(here)  # torch leaves another one behind where `work` fails

    def replay(self) -> None:
        self.graph.replay()


class Recorded:
    """`work` on views and batches of equal shapes: a few times as it is, then from a recording.

    What a recording gives is the same object at every call: its tensors hold the values of the last
    one and are overwritten by the next. The gradients that it leaves are overwritten likewise, so
    nobody may set them to None: `work` does that itself, at its start.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder, self.calls = recorder, 0
        self.views: tuple[View, ...] = ()
        self.batch: Batch = {}
        self.made: Any = None

    def __call__(
        self, work: Callable[[tuple[View, ...], Batch], T], views: tuple[View, ...], batch: Batch
    ) -> T:
        """What `work` makes of views and the batch's indices, all on the device.

        Raises:
            ConfigError: `work` does what cannot be recorded.
        """
        self.calls += 1
        if self.calls <= WARM_UP:
            return self.recorder.aside(lambda: work(views, batch))
        if self.made is None:
            # Copies that stay: the recording reads them at every replay.
            self.views = tuple(
                View(v.images.clone(), {k: p.clone() for k, p in v.params.items()}) for v in views
            )
            self.batch = {key: index.clone() for key, index in batch.items()}
            try:
                self.made = self.recorder.record(lambda: work(self.views, self.batch))
            except RuntimeError as error:
                cause = error.__context__ or error  # CUDA's own end of a recording speaks last
                if isinstance(cause, torch.OutOfMemoryError):
                    raise cause from error
                why, _, _ = str(cause).partition("\n")
                raise ConfigError(
                    f"compile=True records a step as a CUDA graph, and this one cannot be "
                    f"({why}). A method whose step reads values or draws on the host says so by "
                    f"recordable = False; or take compile=False. Either in a new process: what a "
                    f"failed recording held stays held in this one."
                ) from error
        for mine, given in zip(
            _tensors(self.views, self.batch), _tensors(views, batch), strict=True
        ):
            mine.copy_(given, non_blocking=True)
        self.recorder.replay()
        return self.made


def _tensors(views: tuple[View, ...], batch: Batch) -> list[Tensor]:
    of_views = [tensor for view in views for tensor in (view.images, *view.params.values())]
    return of_views + list(batch.values())

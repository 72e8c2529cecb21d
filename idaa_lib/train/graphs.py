"""A training step recorded as a CUDA graph: one launch in the place of a thousand.

At 32 px and batch 256 a GPU is done with the kernels of a step before Python has launched them
(benchmarks/results, `profile-*` on an H200). A recorded step is launched as a whole. It runs
the same kernels on the same memory addresses; Python code is not run again.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from idaa_lib.configs import ConfigError

WARM_UP = 3  # steps that are launched one by one, in which libraries choose their kernels
T = TypeVar("T")


class CudaGraph:
    """A recording. Other streams may go on allocating while it is made."""

    def __init__(self) -> None:
        self.graph, self.stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()

    def warm_up(self, work: Callable[[], T]) -> T:
        """Do it as it is, but where it will be recorded."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            results = work()
        torch.cuda.current_stream().wait_stream(self.stream)
        return results

    def record(self, work: Callable[[], T]) -> T:
        """Only note what `work` does on the device; its results have no values yet."""
        gc.collect()  # what an earlier recording left in a cycle holds its whole memory
        here = torch.cuda.current_stream()
        try:
            with (
                # A network that is compiled anew while it is recorded would be recorded compiling.
                torch.compiler.set_stance("fail_on_recompile"),
                torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"),
            ):
                return work()
        finally:
            torch.cuda.set_stream(here)  # torch leaves another one behind where `work` fails

    def replay(self) -> None:
        """Do what was noted, on the same tensors."""
        self.graph.replay()


class Recorded:
    """`work` on inputs of equal shapes: a few times as it is, then from a recording.

    What a recording gives is the same object at every call: its tensors hold the values of the last
    one and are overwritten by the next. The gradients that it leaves are overwritten likewise, so
    nobody may set them to None: `work` does that itself, at its start.
    """

    def __init__(self, recorder: CudaGraph) -> None:
        self.recorder, self.calls = recorder, 0
        self.inputs: Any = None
        self.results: Any = None

    def __call__(self, work: Callable[..., T], *inputs: Any) -> T:
        """What `work(*inputs)` gives; inputs are nested dicts of tensors on the device.

        Raises:
            ConfigError: `work` does what cannot be recorded.
        """
        self.calls += 1
        if self.calls <= WARM_UP:
            return self.recorder.warm_up(lambda: work(*inputs))
        if self.inputs is None:
            # Copies that stay: the recording reads them at every replay.
            self.inputs = tree_map(Tensor.clone, inputs)
            try:
                self.results = self.recorder.record(lambda: work(*self.inputs))
            except RuntimeError as error:
                raise _explain(error) from error
        for held, new in zip(tree_leaves(self.inputs), tree_leaves(inputs), strict=True):
            held.copy_(new, non_blocking=True)
        self.recorder.replay()
        return self.results


def _explain(error: RuntimeError) -> Exception:
    """Why a step could not be recorded, as a sentence that says what to do."""
    cause = error.__context__ or error  # CUDA's own end of a recording speaks last
    if isinstance(cause, torch.OutOfMemoryError):
        return cause
    reason, _, _ = str(cause).partition("\n")
    if "recompil" in reason:
        return ConfigError(
            f"A step is recorded as a CUDA graph, and this one compiled its network anew while it "
            f"was recorded ({reason}): take compile=False, in a new process."
        )
    return ConfigError(
        f"A step is recorded as a CUDA graph, and this one cannot be ({reason}). A method or "
        f"adversary that reads values or draws on the host says so by recordable = False; start "
        f"again in a new process, since what a failed recording held stays held in this one."
    )

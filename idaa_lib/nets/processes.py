"""Several processes as one: what they share, and statistics of the global batch.

Each runs the same program; the first one alone writes. What one does here, all of them do.
"""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

T = TypeVar("T")


class _Gather(torch.autograd.Function):
    """The rows of all processes, concatenated. Backward: a row's gradients of all processes are
    summed."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        parts = [torch.empty_like(z) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, z.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def count_processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process among them, from 0."""
    return dist.get_rank() if count_processes() > 1 else 0


def leave() -> None:
    """Leave the group of processes, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        # A network that was trained keeps the threads of gloo alive. One that lets go of its last
        # tensor while Python ends would abort the process: it has time to do so now.
        time.sleep(0.2)


@atexit.register
def _leave_at_the_end() -> None:
    """As `leave`, of processors; that of GPUs might wait for a process that failed."""
    if dist.is_available() and dist.is_initialized() and dist.get_backend() == "gloo":
        leave()


def exchange(value: T) -> list[T]:
    """The `value` of each process, by rank: anything that can be pickled."""
    values = [value] * count_processes()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def do_once(work: Callable[[], T]) -> T:
    """The result of `work()` in every process, of which the first alone runs it; an exception of it
    is raised in every process."""
    if count_processes() == 1:
        return work()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = work()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def share(rows: range, compute: Callable[[Any], Tensor]) -> Tensor:
    """`compute(index)` of all rows (n, …), of which each process computes equally many: `index` has
    its own, a slice or numbers (m,) int64. Without gradient."""
    if (processes := count_processes()) == 1:
        return compute(slice(rows.start, rows.stop))
    each = -(-len(rows) // processes)  # the last row stands in where they do not come out even
    mine = torch.arange(rank() * each, (rank() + 1) * each) + rows.start
    return gather(compute(mine.clamp(max=rows.stop - 1)))[: len(rows)]


def average(values: Tensor) -> Tensor:
    """The mean of what each process has."""
    if (processes := count_processes()) > 1:
        dist.all_reduce(values)
        values = values / processes
    return values


def agree(values: Tensor) -> Tensor:
    """The first process's values, in all of them: what each has by itself may differ."""
    if count_processes() > 1:
        dist.broadcast(values, 0)
    return values


def gather(z: Tensor) -> Tensor:
    """Embeddings (B, D) of all processes (processes · B, D), with gradient; z itself for one.

    Every process then has the whole loss, and the mean of gradients that DistributedDataParallel
    takes is the gradient of one process with the whole batch.
    """
    return _Gather.apply(z) if count_processes() > 1 else z


def share_statistics(network: nn.Module) -> None:
    """Let each BatchNorm in `network` see the batch of all processes, as one process would."""
    # In place: a target network beside it has them too.
    if next(network.parameters()).is_cuda:
        nn.SyncBatchNorm.convert_sync_batchnorm(network)
        return
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.__class__ = SyncBatchNorm


class SyncBatchNorm(_BatchNorm):
    """A BatchNorm of the batch of all processes; torch's own one is for CUDA alone."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        others, shape = [d for d in range(x.ndim) if d != 1], [1, -1, *[1] * (x.ndim - 2)]
        with torch.autocast(x.device.type, enabled=False):
            wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
            count = wide.new_full((1,), x.numel() / x.shape[1])
            *sums, n = gather(torch.cat([wide.sum(others), count])[None]).sum(0).split(x.shape[1])
            mean = sums[0] / n
            centred = wide - mean.view(shape)
            variance = gather(centred.square().sum(others)[None]).sum(0) / n
            y = centred * torch.rsqrt(variance + self.eps).view(shape)
            if self.affine:
                y = y * self.weight.view(shape) + self.bias.view(shape)
        if self.running_mean is not None and self.running_var is not None:
            batches: Any = self.num_batches_tracked  # with no momentum: the mean of all batches
            batches.add_(1)
            momentum = 1 / float(batches) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.detach(), momentum)
            self.running_var.lerp_((variance * n / (n - 1)).detach(), momentum)
        return y.to(x.dtype)

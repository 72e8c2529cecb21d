"""MoCo v2 (He et al. 2020, arXiv:1911.05722; Chen et al. 2020, arXiv:2003.04297).

No paper describes it with IDAA. Here the query's view is attacked against MoCo's own loss, with the
other view's key and the queue stopped; the adversarial loss is the same with x′ as the query.

On CIFAR the values are those of the authors' CIFAR-10 demo (queue 4096, EMA .99, τ .1), with v2's
projector and views; on ImageNet v2 has 65536, .999 and .2. Between GPUs MoCo shuffles the keys'
samples, so that a part's BatchNorm statistics do not give its positives away, and the demo imitates
that by parts of a batch. Not done here: all keys of a batch are normalised together, of all
processes.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from idaa_lib.configs import ConfigError
from idaa_lib.configs.base import Positive, Rate, Share
from idaa_lib.methods.averages import Targeted, follow
from idaa_lib.methods.base import About, Batch, Moment, Step, register_method, similarity
from idaa_lib.methods.cassle import Conditioned
from idaa_lib.nets.heads import Embedding
from idaa_lib.nets.processes import gather
from idaa_lib.views import View


def info_nce(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """−log softmax of q·k/τ among itself and q·queue/τ (MoCo, Eq. 1), mean over B.

    q, k: (B, D); queue: (K, D); all L2-normalised. k and queue are without gradient.
    """
    positive = (q * k).sum(1, keepdim=True) / temperature  # (B, 1)
    logits = torch.cat([positive, similarity(q, queue, temperature)], 1)  # (B, 1 + K)
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))


@register_method("moco")
class MoCo(Targeted):
    """First view: query; second view: key, of an encoder that follows the query's."""

    class Options(Conditioned.Options):
        """projection_dim: D of the embeddings. temperature: τ of the loss. queue: how many
        embeddings are held. queue_source: which, keys, or queries as CASSLE's and AugSelf's code
        has it (a fault: spec/siblings.md §1.8). momentum: of the moving average, in [0, 1]."""

        projection_dim: Positive = 128
        temperature: Rate = 0.1
        queue: Positive = 4096
        momentum: Share = 0.99
        queue_source: Literal["key", "query"] = "key"

    recordable = True
    queue: Tensor
    oldest: Tensor

    def __init__(self, options: Any, backbone: Any, about: About) -> None:
        super().__init__(options, backbone, about)
        if options.queue < about.batch_size:  # not in `check`: an imported run may have a short one
            raise ConfigError(
                f"queue must hold a batch of {about.batch_size} keys, and is {options.queue}."
            )
        queue = torch.randn(options.queue, options.projection_dim)
        self.register_buffer("queue", F.normalize(queue, dim=1))
        self.register_buffer("oldest", torch.zeros((), dtype=torch.long))  # its place in the queue

    def step(self, views: tuple[View, ...], batch: Batch, moment: Moment) -> Step:
        query, key = self.embed(views[0]), self.aim(views[1])

        def loss_of(e: Embedding, _: Any = None) -> Tensor:
            return info_nce(e.z, key.z, self.queue, self.options.temperature)

        step = self.two_view_step(loss_of(query), views, (query, key), loss_of, loss_of)
        queued = key if self.options.queue_source == "key" else query
        step.carry["queued"] = gather(queued.z.detach())
        return step

    @torch.no_grad()
    def after_step(self, step: Step, moment: Moment) -> None:
        follow(self.target, self.network, self.options.momentum)
        keys = step.carry["queued"]
        places = torch.arange(len(keys), device=keys.device)
        self.queue[(self.oldest + places) % len(self.queue)] = keys.to(self.queue.dtype)
        self.oldest.add_(len(keys)).remainder_(len(self.queue))

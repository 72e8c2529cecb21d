"""LARS (You et al. 2017, arXiv:1708.03888, Eq. 6): steps as long as a share of their parameter."""

from __future__ import annotations

from typing import Any

import torch


class LARS(torch.optim.Optimizer):
    """Momentum on gradients that are scaled parameter by parameter (spec/siblings.md §3.3).

    u = g + weight_decay · p, times trust · ‖p‖/‖u‖ (times 1 where either length is 0, or the group
    has `adapt=False`, as recipes have it for biases and norms);
    μ ← momentum · μ + u; p ← p − lr · μ.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 1e-3,
        adapt: bool = True,
    ) -> None:
        scale = dict(weight_decay=weight_decay, trust=trust, adapt=adapt)
        super().__init__(params, dict(lr=lr, momentum=momentum, **scale))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = p.grad + group["weight_decay"] * p
                if group["adapt"]:
                    ours, theirs = p.norm(), update.norm()
                    share = group["trust"] * ours / theirs
                    update *= share.where((ours > 0) & (theirs > 0), torch.ones_like(share))
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                buffer = state["momentum_buffer"].mul_(group["momentum"]).add_(update)
                p.sub_(group["lr"] * buffer)

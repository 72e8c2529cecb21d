"""Cheaper identity-disentangled attacks, which carry δ of each image from step to step.

Ours, beyond the paper; docs/cheaper-attacks.md measures whether they pay. The attack through the
first stages of an encoder, compared there too, is a matter of the method.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from idaa_lib.adversaries import IDAA, Attack, AttackLoss, Turn
from idaa_lib.configs import UserError
from idaa_lib.nets.vae import VAE


class CarriedIDAA(IDAA):
    """IDAA that attacks every k-th step, and in between uses the δ that each image got last.

    An image that was never attacked has δ = 0. A δ was found for another view of its image: it is
    carried over in the latent as it is.

    Args:
        vae, epsilon: as `IDAA`, of one ℓ∞ or ℓ2 step. memory: how many training images there are.
        every: k.
    """

    recordable = False

    def __init__(
        self, vae: VAE, epsilon: float, memory: int, every: int = 2, **attack: Any
    ) -> None:
        super().__init__(vae, epsilon, **attack)
        self.every = every
        self.deltas = torch.zeros(memory, vae.dim)

    def state_dict(self) -> dict[str, Tensor]:
        return {"deltas": self.deltas}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.deltas.copy_(state["deltas"])

    def _perform(self, x: Tensor, attack_loss: AttackLoss, turn: Turn) -> Attack:
        samples = self._places(turn, x.device)
        if turn.step % self.every == 0:
            attack = super()._perform(x, attack_loss, turn)
            self._carry(samples, attack.delta)
            return attack
        return self._attack(self.anchor(x), self._carried(samples, x))

    def _places(self, turn: Turn, device: torch.device) -> Tensor:
        """Where the δ of these images lie (B,), on `device`, to which the memory comes too."""
        if turn.samples is None:
            raise UserError(
                "This attack carries δ over for each training image: it needs a method that says "
                "which images a step attacks (Step.samples)."
            )
        self.deltas = self.deltas.to(device)
        return turn.samples.to(device)

    def _carried(self, samples: Tensor, x: Tensor) -> Tensor:
        """δ (B, m) that these images got last."""
        return self.deltas[samples].to(x.dtype)

    def _carry(self, samples: Tensor, delta: Tensor) -> None:
        self.deltas[samples] = delta.to(self.deltas.dtype)


class FreeIDAA(CarriedIDAA):
    """IDAA whose gradient is a by-product of training ("free", Shafahi et al. 2019,
    arXiv:1904.12843).

    x′ is made with the δ that its image got at its last visit, and keeps its graph to δ; the
    backward pass of the training loss gives the gradient of the adversarial loss there, from which
    comes the next δ. The attack costs no pass of its own; its loss is that of training, whose
    anchor is z₁ of the main norms. The VAE must be frozen, or that backward pass would leave
    gradients in it.
    """

    _leaf: tuple[Tensor, Tensor] | None = None

    def _perform(self, x: Tensor, attack_loss: AttackLoss, turn: Turn) -> Attack:
        anchor = self.anchor(x)
        samples = self._places(turn, x.device)
        delta = self._carried(samples, x)
        with torch.enable_grad():
            images = self.render(anchor, delta.requires_grad_())
        self._leaf = samples, delta
        z = anchor.point + delta.detach()
        return Attack(images, delta.detach(), z, anchor.reconstruction)

    def after_backward(self) -> None:
        assert self._leaf is not None
        samples, delta = self._leaf
        assert delta.grad is not None
        self._carry(samples, self.epsilon * self._direction(delta.grad))
        self._leaf = None

"""FixMatch (Sohn et al. 2020, arXiv:2001.07685), with IDAA or CLAE on its weak view.

Every step sees B labelled and μ·B unlabelled images. What the network is sure of on a weak view of
an unlabelled image is the label for its strong view. Recipe: docs/spec/idaa.md §5; with an
adversary §2, last paragraph, where the evidence is thin:

- CLAE: the second of the two variants that the authors' repository holds; which one made the table
  is unknown. The weak view is attacked, ε = .5, by InfoNCE (τ = .1) between features of the weak
  view, stopped, and of what stands in its place, both through the adversarial norms; the loss gains
  the same on the images whose pseudo-label is believed, with the weak view through the main norms.
  A feature is the L2-normalised pooled output of the backbone, as in that code's first commit.
- IDAA: no code is known. The pixel step is replaced by the step in the bottleneck and nothing else;
  ε is taken over. Both are inference.
- `contrast="ce"`, cross-entropy against the pseudo-label in place of InfoNCE, in the attack and in
  the loss: inference, by the general rule (x in the place of the view that the loss compares).

The averaged weights are what is evaluated. As in the public recipe BatchNorm's running statistics
are not averaged but copied; in both they move by 1 − decay a step (.001 there).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from idaa_lib.configs import SemiConfig
from idaa_lib.methods.base import Batch, Step, anchored, gathered
from idaa_lib.methods.plain import one_way
from idaa_lib.methods.semi_supervised import SemiSupervised
from idaa_lib.nets import initial_weights
from idaa_lib.views import Recipe, View

# What CIFAR-100 is normalised with here (spec §5); CIFAR-10 as everywhere.
CIFAR100 = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))


class FixMatch(SemiSupervised):
    def step(self, views: tuple[View, ...], batch: Batch) -> Step:
        config = self.config
        labelled, weak, strong = (view.images for view in views)
        sizes = [len(labelled), len(weak), len(strong)]
        # One pass, so that BatchNorm sees all three kinds of view together.
        logits, h = self.network(torch.cat([labelled, weak, strong]))
        of_labelled, of_weak, of_strong = logits.split(sizes)
        _, h_weak, h_strong = h.detach().split(sizes)
        confidence, pseudo = of_weak.detach().softmax(1).max(1)  # (μB,)
        believed = (confidence >= config.threshold).float()

        supervised = F.cross_entropy(of_labelled, self.labels[batch["labelled"]])
        rows = F.cross_entropy(of_strong, pseudo, reduction="none")
        unsupervised = (rows * believed).mean()
        parts = {"supervised_loss": supervised, "unsupervised_loss": unsupervised}
        parts["believed"] = 100 * believed.mean()
        truth = self.labels[batch["images"]]
        if self.all_labelled:  # how good pseudo-labels are: nothing is trained with it
            right = (pseudo == truth).float()
            parts["pseudo_top1"] = 100 * right.mean()
            parts["believed_right"] = 100 * (right * believed).mean()

        start = anchored(lambda: gathered(self.network(weak, adversarial=True)[1]))

        def attack_loss(x: Tensor, at_start: bool = False) -> Tensor:
            logits, h = self.with_fixed_weights(x, adversarial=True)
            if config.contrast == "ce":
                return F.cross_entropy(logits, pseudo)
            h = gathered(h)
            return one_way(start(h, at_start), h, config.temperature)

        def adversarial_loss(x_adv: Tensor) -> Tensor:
            logits, h = self.network(x_adv, adversarial=True)
            if config.contrast == "ce":
                return (F.cross_entropy(logits, pseudo, reduction="none") * believed).mean()
            rows = one_way(gathered(h_weak), gathered(h), config.temperature, "none")
            return (rows * gathered(believed)).mean()

        return Step(
            supervised + config.lambda_u * unsupervised,
            parts=parts,
            attacked=weak,
            attack_loss=attack_loss,
            adversarial_loss=adversarial_loss,
            embeddings=(h_weak, h_strong),
            shown={"weak view": weak, "strong view": strong},
        )

    def param_groups(self, epochs: int, steps_per_epoch: int) -> list[dict[str, Any]]:
        """Biases and BatchNorms (all that is a vector) do not decay."""
        (group,) = super().param_groups(epochs, steps_per_epoch)
        vectors = [p for p in group["params"] if p.ndim == 1]
        others = [p for p in group["params"] if p.ndim > 1]
        return [group | {"params": others}, group | {"params": vectors, "weight_decay": 0.0}]

    def schedule(self, epochs: int, steps_per_epoch: int) -> Callable[[int], float]:
        """cos(7πk / 16K) at step k of K."""
        return lambda step: math.cos(7 * math.pi * step / (16 * epochs * steps_per_epoch))

    def optimizer(self, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True, fused=True)


def build_fixmatch(
    config: SemiConfig, mean: tuple[float, ...], std: tuple[float, ...], classes: int
) -> FixMatch:
    """FixMatch on images normalised with `mean` and `std`, initial weights from `config.seed`.

    A weak view is a mirror image by chance, shifted by at most 4 pixels of 32 and continued by
    reflection.
    """
    weak = Recipe(config.size, mean, std, flip=0.5, shift=1 / 8)
    with initial_weights(config.seed):
        return FixMatch(config, weak, classes)

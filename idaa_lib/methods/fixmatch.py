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

import functools
import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from idaa_lib import configs
from idaa_lib.configs import ConfigError
from idaa_lib.configs.base import NonNegative, Positive, Rate, Share
from idaa_lib.methods.averages import follow, frozen_copy
from idaa_lib.methods.base import About, Batch, Method, Moment, Step, make_anchor, register_method
from idaa_lib.methods.plain import one_way
from idaa_lib.methods.schedules import spare_vectors
from idaa_lib.nets.heads import Embedder, Embedding, Network
from idaa_lib.nets.processes import gather
from idaa_lib.views import Recipe, View, keyed_generator
from idaa_lib.views.randaugment import RandAugment

# Streams of random numbers, the last part of the key, beside those of the training loop.
LABELLED, UNLABELLED, SUBSET = 4, 5, 6


def labelled_subset(labels: Tensor, per_class: int, classes: int, seed: int) -> Tensor:
    """Indices (classes · per_class,), sorted, of the images whose labels (N,) are used.

    Raises:
        ConfigError: a class has fewer images.
    """
    order = torch.randperm(len(labels), generator=keyed_generator(seed, 0, 0, SUBSET))
    parts = []
    for label in range(classes):
        members = order[labels[order] == label]
        if len(members) < per_class:
            raise ConfigError(
                f"labels_per_class={per_class} is more than the {len(members)} training images of "
                f"class {label} (of 0 … {classes - 1})."
            )
        parts.append(members[:per_class])
    return torch.cat(parts).sort().values


def stream(items: Tensor, size: int, first: int, key: tuple[int, int]) -> Iterator[Tensor]:
    """Batches of `size` from an infinite sequence of shuffled passes over `items`, from batch
    `first` on.

    Any batch is known without those before it, and all items come up equally often.
    """
    seed, number = key

    @functools.lru_cache(2)
    def permutation(turn: int) -> Tensor:
        return items[torch.randperm(len(items), generator=keyed_generator(seed, turn, 0, number))]

    for start in itertools.count(first * size, size):
        places = torch.arange(start, start + size)
        turns, offsets = places // len(items), places % len(items)
        yield torch.cat([permutation(t)[offsets[turns == t]] for t in turns.unique().tolist()])


@register_method("fixmatch")
class FixMatch(Method):
    """A weak view is a mirror image by chance, shifted by at most 4 pixels of 32 and continued by
    reflection; a strong one has RandAugment and cutout besides."""

    class Options(configs.Options):
        """labels_per_class: so many training images of each class keep their label, drawn by
        `seed`; every image, these too, is trained on without it. mu: unlabelled images for each
        labelled one. steps_per_epoch: None for one pass over them. threshold: probability from
        which a pseudo-label is believed. lambda_u: weight of the loss of strong views; 0 is
        training on the labels alone. ema_decay: of the averaged weights; BatchNorm's statistics
        move by 1 − ema_decay a step. contrast: what x′ of a weak view is held to: `infonce`, the
        features of its view among those of the batch; `ce`, its pseudo-label. temperature: τ of
        `infonce`."""

        labels_per_class: Positive = 25
        mu: Positive = 7
        steps_per_epoch: Positive | None = None
        threshold: Share = 0.95
        lambda_u: NonNegative = 1.0
        ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
        contrast: Literal["infonce", "ce"] = "infonce"
        temperature: Rate = 0.1

    stage = "semi"
    recordable = True
    labels: Tensor

    def __init__(self, options: Any, backbone: Any, about: About) -> None:
        super().__init__(options, backbone, about)
        head = nn.Linear(backbone.feature_dim, about.classes)
        nn.init.xavier_normal_(head.weight)
        nn.init.zeros_(head.bias)
        self.network = Network(backbone, head=head)
        for name, module in self.network.named_modules():
            if isinstance(module, nn.BatchNorm2d) and not name.endswith("_adv"):
                module.momentum = 1 - options.ema_decay
        self.ema = frozen_copy(self.network)
        self.weak = replace(about.recipe, flip=0.5, shift=1 / 8)
        units = about.recipe.size, about.recipe.mean, about.recipe.std
        self.strong = RandAugment(*units, flip=0.5, shift=1 / 8)
        self.register_buffer("labels", about.labels, persistent=False)
        self.all_labelled = bool((about.labels >= 0).all())

    def steps_per_epoch(self) -> int:
        one_pass = self.about.n // (self.options.mu * self.about.batch_size)
        return self.options.steps_per_epoch or max(1, one_pass)

    def images_per_step(self) -> int:
        return (1 + self.options.mu) * self.about.batch_size

    def batches(self, epoch: int) -> Iterator[Batch]:
        """`labelled` (B,) and, of all images, `images` (μ·B,)."""
        about, options, steps = self.about, self.options, self.steps_per_epoch()
        subset = labelled_subset(about.labels, options.labels_per_class, about.classes, about.seed)
        first = epoch * steps
        labelled = stream(subset, about.batch_size, first, (about.seed, LABELLED))
        size = options.mu * about.batch_size
        images = stream(torch.arange(about.n), size, first, (about.seed, UNLABELLED))
        for _ in range(steps):
            yield {"labelled": next(labelled), "images": next(images)}

    def recipes(self) -> list[tuple[str, Recipe]]:
        """A weak view of the labelled images, a weak and a strong one of the unlabelled."""
        return [("labelled", self.weak), ("images", self.weak), ("images", self.strong)]

    def step(self, views: tuple[View, ...], batch: Batch, moment: Moment) -> Step:
        options, (_, weak, strong) = self.options, views
        sizes = [len(view.images) for view in views]
        # One pass, so that BatchNorm sees all three kinds of view together.
        whole = self.network(torch.cat([view.images for view in views]))
        of_labelled, of_weak, of_strong = whole.logits.split(sizes)
        _, h_weak, h_strong = F.normalize(whole.h, dim=1).detach().split(sizes)
        confidence, pseudo = of_weak.detach().softmax(1).max(1)  # (μB,)
        believed = (confidence >= options.threshold).float()

        supervised = F.cross_entropy(of_labelled, self.labels[batch["labelled"]])
        rows = F.cross_entropy(of_strong, pseudo, reduction="none")
        unsupervised = (rows * believed).mean()
        parts = {"supervised_loss": supervised, "unsupervised_loss": unsupervised}
        parts["believed"] = 100 * believed.mean()
        if self.all_labelled:  # how good pseudo-labels are: nothing is trained with it
            right = (pseudo == self.labels[batch["images"]]).float()
            parts["pseudo_top1"] = 100 * right.mean()
            parts["believed_right"] = 100 * (right * believed).mean()

        def features_of(e: Embedding) -> Tensor:
            return gather(F.normalize(e.h, dim=1))  # (μB, D) of all processes

        anchor = make_anchor(lambda: features_of(self.embed(weak, adversarial=True)))

        def attack_loss(e: Embedding, at_start: bool) -> Tensor:
            if options.contrast == "ce":
                return F.cross_entropy(e.logits, pseudo)
            h = features_of(e)
            return one_way(anchor(h, at_start), h, options.temperature)

        def adversarial_loss(e: Embedding, v_adv: View) -> Tensor:
            if options.contrast == "ce":
                return (F.cross_entropy(e.logits, pseudo, reduction="none") * believed).mean()
            rows = one_way(gather(h_weak), features_of(e), options.temperature, "none")
            return (rows * gather(believed)).mean()

        return Step(
            supervised + options.lambda_u * unsupervised,
            parts=parts,
            embeddings=(h_weak, h_strong),
            pictures={"weak view": weak.images, "strong view": strong.images},
            **self.attack_on(weak, attack_loss, adversarial_loss),
        )

    def after_step(self, step: Step, moment: Moment) -> None:
        follow(self.ema, self.network, self.options.ema_decay)
        torch._foreach_copy_([*self.ema.buffers()], [*self.network.buffers()])

    def param_groups(self) -> list[dict[str, Any]]:
        """Biases and BatchNorms (all that is a vector) do not decay."""
        (group,) = super().param_groups()
        return spare_vectors(group)

    def encoder(self, layer: str) -> nn.Module:
        """Of the averaged weights: `backbone` gives the pooled features, `projector` the same,
        L2-normalised, which InfoNCE compares; `classifier` the logits (B, C)."""
        backbone, head = (self.ema.get_submodule(name) for name in ("backbone", "head"))
        parts: dict[str, nn.Module] = {
            "backbone": backbone,
            "projector": Embedder(backbone, nn.Identity()),
            "classifier": nn.Sequential(backbone, head),
        }
        if layer not in parts:
            raise ValueError(f"layer must be one of {', '.join(parts)}, and is {layer!r}.")
        return parts[layer]

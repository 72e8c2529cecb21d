"""IP-IRM (docs/spec/siblings.md §2): contrast that is invariant over partitions of the data.

Every `maximize_iter` epochs the images are divided into `env_num` subsets so that the frozen
embeddings contrast as differently as can be within them (`fit_partition`, §2.3). In between the
network minimises, over all partitions P that are kept and their subsets k (§2.2),

    L = L_all + mean_{P,k} L_{P,k} + λ₁ mean_{P,k} Ω_{P,k}

with NT-Xent L_{P,k} among the images of a subset and the invariant-risk penalty Ω_{P,k}. With an
adversary the attack ascends L_all, and the adversarial loss is all of L with x′ for view 1.

With `mixup` (§2.4) first views are mixed with one another, anew within each subset, and contrast
with second views in one direction; the partitions are summed and differentiated one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from idaa_lib.configs import ConfigError
from idaa_lib.configs.base import NonNegative, Positive, Rate
from idaa_lib.methods.base import (
    About,
    Batch,
    Moment,
    Step,
    Work,
    anchored,
    register_method,
    similarity,
)
from idaa_lib.methods.partitions import (
    ONLINE_MIXED,
    PLAIN,
    Embedded,
    compact_logits,
    fit_partition,
    mix,
    penalty,
)
from idaa_lib.methods.protocols import Classifier, OfficialProtocol
from idaa_lib.methods.simclr import SimCLR
from idaa_lib.nets.heads import Embedding, mlp
from idaa_lib.nets.processes import agree, count_processes, gather
from idaa_lib.views import View, keyed_generator

VIEWS, START, SHARES = 11, 13, 15  # streams of a maximisation's random numbers


@register_method("ipirm")
class IPIRM(SimCLR):
    class Options(SimCLR.Options):
        """env_num: K, subsets of a partition. maximize_iter: epochs between two partitions.
        penalty_weight: λ₁, of the minimisation. irm_weight_maxim: λ₂ of the maximisation. irm_temp:
        T of both penalties. constrain: balance of the subsets. retain_group: keep `all` partitions,
        `one`, or the last n. keep_cont: add L_all to the loss. random_init: scores start at random,
        not at the partition before. offline: views are embedded once a maximisation, not once an
        epoch of it. nonorm: sums over 2n, not means. dummy: scale of the penalty (§2.2). mixup:
        first views are mixed. mixup_max: in the maximisation too (§2.4). baseline: L_all alone.
        debiased: τ⁺ of DCL's loss for the baseline (§2.6)."""

        own_heads_alone = True
        projection_dim: Positive = 128
        env_num: Annotated[int, Field(ge=2, le=256)] = 2  # a side is a byte
        maximize_iter: Positive = 50
        penalty_weight: NonNegative = 0.2
        irm_weight_maxim: NonNegative = 0.5
        irm_temp: Rate = 0.5
        constrain: Literal["relaxed", "strict", "none"] = "relaxed"
        retain_group: Literal["all", "one"] | Positive = "all"
        keep_cont: bool = True
        random_init: bool = True
        offline: bool = True
        nonorm: bool = False
        dummy: Literal["vector", "scalar"] = "vector"
        mixup: bool = False
        mixup_max: bool = False
        baseline: bool = False
        debiased: Annotated[float, Field(ge=0, lt=1)] = 0.0

    recordable = False  # data decide how large a subset is
    partitions: Tensor  # (capacity, N) uint8, of which the first are kept
    fitted: Tensor  # how many
    scores: Tensor  # (N, K) of the last partition

    @classmethod
    def check(cls, config: Any) -> None:
        super().check(config)
        if config.constrain == "relaxed" and config.env_num != 2:
            raise ConfigError(
                f"env_num={config.env_num} needs constrain='strict' or 'none': the constant of "
                f"'relaxed' is for 2 subsets."
            )
        if config.debiased and not config.baseline:
            raise ConfigError(
                f"debiased={config.debiased:g} is a loss of the baseline alone: give "
                f"baseline=true too, or leave it out."
            )
        if config.mixup_max and not config.mixup:
            raise ConfigError("mixup_max=true needs mixup=true too: give it, or leave both out.")
        others = ("debiased", "condition", "augself")
        if config.mixup and (other := next((k for k in others if getattr(config, k)), None)):
            raise ConfigError(f"{other} is not for mixed images: leave it or mixup out.")
        if config.mixup and config.compile:
            raise ConfigError(
                "compile=true cannot be with mixup=true, whose subsets of any size are forwarded "
                "again: leave one of them out."
            )

    def __init__(self, options: Any, backbone: Any, about: About) -> None:
        super().__init__(options, backbone, about)
        kept = options.retain_group
        most = -(-about.epochs // options.maximize_iter) + 1
        self.capacity = 0 if options.baseline else {"all": most, "one": 1}.get(kept, kept)
        if not options.baseline:
            shape = self.capacity, about.n
            self.register_buffer("partitions", torch.zeros(shape, dtype=torch.uint8))
            self.register_buffer("fitted", torch.zeros((), dtype=torch.long))
            if not options.random_init:
                self.register_buffer("scores", torch.zeros(about.n, options.env_num))
        self._present: Tensor | None = None

    @classmethod
    def official_protocol(cls, config: Any) -> OfficialProtocol:
        """§2.6, of DCL's code: also that of the baseline. Which epoch counts is not published: the
        last one here."""
        classifier = Classifier(
            "adam",
            1e-3,
            "constant",
            epochs=100,
            best=False,
            weight_decay=1e-6,
            augmentation=config.augmentation,
            deviation=None,
            middle=False,
            drifts=True,
        )
        return OfficialProtocol(
            "IP-IRM", "backbone", config.temperature, "backbone", "last", 512, classifier,
            whole=True, knn_note="",
        )  # fmt: skip

    def projector(self, features: int, dim: int) -> nn.Module:
        return self.condition_projector(features, lambda inputs: mlp(inputs, 512, dim, bias=False))

    # --- minimisation -----------------------------------------------------------------------------

    def present(self) -> Tensor:
        """The partitions (P, N) that are kept at present."""
        if self._present is None:
            self._present = self.partitions[: int(self.fitted)]
        return self._present

    def contrast(self, z1: Tensor, z2: Tensor) -> Tensor:
        if self.options.debiased:
            return debiased(z1, z2, self.options.temperature, self.options.debiased)
        return super().contrast(z1, z2)

    def contrast_subsets(
        self, sides: Tensor, contrast: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> list[tuple[Tensor, Tensor]]:
        """L_k and Ω_k of each subset of two images or more, by `contrast` of its rows."""
        subsets = ((sides == k).nonzero(as_tuple=True)[0] for k in range(self.options.env_num))
        return [contrast(rows) for rows in subsets if len(rows) > 1]

    def objective(self, z1: Tensor, z2: Tensor, index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """L of embeddings (B, D) of the images `index` (B,), and its parts to log."""
        own = self.options
        whole = self.contrast(z1, z2)
        if own.baseline:
            return whole, {}

        def contrast(rows: Tensor) -> tuple[Tensor, Tensor]:
            logits, _ = compact_logits(z1[rows], z2[rows])
            s = logits / own.temperature
            loss = (s.logsumexp(1) - s[:, 0]).mean()
            return loss, penalty(logits / own.irm_temp, dummy=own.dummy)

        present = self.present()
        terms = [term for p in present for term in self.contrast_subsets(p[index], contrast)]
        subsets, omega = means(terms, whole.new_zeros(()))
        loss = whole * own.keep_cont + subsets + own.penalty_weight * omega
        small = whole.new_full((), len(present) * own.env_num - len(terms))
        parts = {"contrast": whole, "subsets": subsets, "penalty": omega, "small_subsets": small}
        return loss / max(1.0, own.penalty_weight), parts

    def step(self, views: tuple[View, ...], batch: Batch, moment: Moment) -> Step:
        v1, v2 = views
        index = gather(batch["images"])  # in the order that one process has (§2.2)
        if self.options.mixup:
            return self.mixed_step(v1, v2, index, gather(moment.numbers["mixup"]))
        e1, e2 = self.embed(v1), self.embed(v2)
        z1, z2 = gather(e1.z), gather(e2.z)  # (B, D) of all processes
        loss, parts = self.objective(z1, z2, index)

        def adversarial_loss(e: Embedding, v_adv: View) -> Tensor:
            return self.objective(gather(e.z), z2, index)[0]

        both = e1._replace(z=z1), e2._replace(z=z2)
        step = self.two_view_step(loss, views, both, self.ascent(v1), adversarial_loss)
        step.parts |= {name: value.detach() for name, value in parts.items()}
        return step

    # --- minimisation with mixed images -----------------------------------------------------------

    def numbers(self, sizes: Mapping[str, int], generator: torch.Generator) -> dict[str, Tensor]:
        drawn = super().numbers(sizes, generator)
        if self.options.mixup:  # for the whole batch and within each partition
            shape = sizes["images"], 1 + self.capacity, 2
            drawn["mixup"] = torch.rand(shape, generator=generator)
        return drawn

    def embed_together(self, images: Tensor, adversarial: bool = False) -> Tensor:
        """z (n, D) of images (n, 3, H, W) that every process has, in their order: each embeds a
        part of them, or all where they are too few for batch statistics of a part."""
        processes = count_processes()
        if processes == 1 or len(images) < 2 * processes:
            return self.embed(View(images, {}), adversarial).z
        parts = images.tensor_split(processes)
        most = len(parts[0])
        z = self.embed(View(parts[dist.get_rank()], {}), adversarial).z
        rows = gather(F.pad(z, (0, 0, 0, most - len(z)))).chunk(processes)
        return torch.cat([row[: len(part)] for row, part in zip(rows, parts, strict=True)])

    def contrast_mixed(
        self, images: Tensor, z2: Tensor, draws: Tensor, adversarial: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """z₁ (n, D) of images (n, 3, H, W) that are mixed by draws (n, 2), and their L and Ω."""
        mixed, target = mix(images, draws)
        z1 = self.embed_together(mixed, adversarial)
        s = similarity(z1, z2, self.options.temperature)
        target = target.to(s.dtype)
        loss = F.cross_entropy(s, target)
        return z1, loss, penalty(s, dummy=self.options.dummy, target=target)

    def mixed_step(self, v1: View, v2: View, index: Tensor, draws: Tensor) -> Step:
        """The step of mixed images, by draws (B, 1 + capacity, 2): the attack ascends L_all of the
        first view and itself."""
        anchor = anchored(lambda: gather(self.embed(v1, adversarial=True).z))

        def attack_loss(x: Tensor, at_start: bool = False) -> Tensor:
            with self._fixed_weights():
                z = anchor(x, False)
                return self.contrast_mixed(gather(x), z, draws[:, 0], adversarial=True)[1]

        def adversarial_loss(x: Tensor) -> list[Callable[[], Tensor]]:
            return self.mixed_terms(x, v2, index, draws, adversarial=True)

        step = Step([], {}, v1, attack_loss, adversarial_loss)
        step.pictures |= {"view 1": v1.images, "view 2": v2.images}
        step.loss = self.mixed_terms(v1.images, v2, index, draws, step)
        return step

    def mixed_terms(
        self,
        x: Tensor,
        v2: View,
        index: Tensor,
        draws: Tensor,
        step: Step | None = None,
        adversarial: bool = False,
    ) -> list[Callable[[], Tensor]]:
        """The terms of L: L_all, and each partition, for which x₂ is embedded again; together where
        `one` is kept. λ₁ > 1 divides terms with a partition. `step` gets what is logged."""
        own, images = self.options, gather(x)
        present: Sequence[Tensor] = () if own.baseline else [*self.present()]

        def make(with_all: bool, slot: int | None) -> Tensor:
            z2 = gather(self.embed(v2).z)
            loss = 0 * z2.sum()  # of subsets that are all too small
            values = {}
            if with_all:
                z1, whole, _ = self.contrast_mixed(images, z2, draws[:, 0], adversarial)
                loss, values["contrast"] = loss + whole, whole
                if step is not None:
                    step.embeddings = z1.detach(), z2.detach()
            if slot is not None:

                def contrast(rows: Tensor) -> tuple[Tensor, Tensor]:
                    mine = images[rows], z2[rows], draws[rows, 1 + slot]
                    return self.contrast_mixed(*mine, adversarial)[1:]

                terms = self.contrast_subsets(present[slot][index], contrast)
                subsets, omega = means(terms, loss.new_zeros(()))
                loss = (loss + subsets + own.penalty_weight * omega) / max(1, own.penalty_weight)
                values |= {"subsets": subsets / len(present), "penalty": omega / len(present)}
                values["small_subsets"] = loss.new_full((), own.env_num - len(terms))
            if step is not None:
                for name, value in values.items():
                    step.parts[name] = step.parts.get(name, 0) + value.detach()
            return loss

        if own.retain_group == "one" and present:
            return [partial(make, own.keep_cont, 0)]
        terms: list[Callable[[], Tensor]] = [partial(make, False, p) for p in range(len(present))]
        return [partial(make, True, None), *terms] if own.keep_cont or own.baseline else terms

    # --- maximisation -----------------------------------------------------------------------------

    def before_epoch(self, epoch: int, work: Work) -> None:
        """Before the first epoch and after every `maximize_iter` a partition is fitted (§2.3)."""
        own = self.options
        if own.baseline or epoch % own.maximize_iter:
            return
        key, n = (self.about.seed, epoch), self.about.n
        fitting = ONLINE_MIXED if own.mixup_max and not own.offline else PLAIN
        if epoch == 0 and n < fitting.batch:
            work.say(
                f"partition: {n} images are one batch of the maximisation, not {fitting.batch}."
            )
        embedded: Embedded | None = None

        def embeddings(number: int, batches: Sequence[Tensor]) -> Embedded:
            nonlocal embedded
            if embedded is None or not own.offline:
                work.pulse(f"partition: views of {n} images are embedded")
                mixing = self.draw_partners((*key, number), batches) if own.mixup_max else None
                z1, z2 = (
                    work.embed(
                        "projector",
                        transform=self.recipe,
                        generator=keyed_generator(*key, number, VIEWS + view),
                        mixing=None if view else mixing,
                    )
                    for view in (0, 1)
                )
                embedded = Embedded(z1, z2, *(part.to(z1.device) for part in mixing or ()))
            return embedded

        if own.random_init:
            scores = torch.randn(n, own.env_num, generator=keyed_generator(*key, START))
        else:
            scores = self.scores
        scores = scores.to(self.partitions.device)
        args = embeddings, scores, own, key, fitting, not own.offline, work.pulse
        # Running statistics of BatchNorm may be each process's own, and so the embeddings.
        scores = agree(fit_partition(*args).contiguous())
        if not own.random_init:
            self.scores.copy_(scores)
        self.keep(scores.argmax(1))

    def draw_partners(
        self, key: tuple[int, ...], batches: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """λ of each image and another of its batch, whose order is random: (N,) each."""
        uniform = torch.rand(self.about.n, generator=keyed_generator(*key, SHARES))
        partner = torch.arange(self.about.n)
        for index in batches:
            partner[index.cpu()] = index.cpu().roll(1)
        return torch.maximum(uniform, 1 - uniform), partner

    def keep(self, partition: Tensor) -> None:
        """Add a partition (N,); the oldest goes where there is no place."""
        if int(self.fitted) == len(self.partitions):
            self.partitions.copy_(self.partitions.roll(-1, 0))
            self.fitted -= 1
        self.partitions[int(self.fitted)] = partition
        self.fitted += 1
        self._present = None


def means(terms: Sequence[tuple[Tensor, Tensor]], zero: Tensor) -> tuple[Tensor, Tensor]:
    """The mean loss and the mean penalty of subsets; zeros of none."""
    if not terms:
        return zero, zero
    losses, penalties = zip(*terms, strict=True)
    return torch.stack(losses).mean(), torch.stack(penalties).mean()


def debiased(z1: Tensor, z2: Tensor, temperature: float, prior: float) -> Tensor:
    """DCL's loss (Chuang et al. 2020, arXiv:2007.00224; spec §2.6) of pairs z1, z2 (B, D).

    prior: τ⁺, the share of negatives that are of the anchor's class; 0 gives NT-Xent.
    """
    s = compact_logits(z1, z2)[0] / temperature
    n = s.shape[1] - 1
    positive, negatives = s[:, 0].exp(), s[:, 1:].exp().sum(1)
    others = (negatives - prior * n * positive) / (1 - prior)
    others = others.clamp(min=n * math.exp(-1 / temperature))
    return (torch.log(positive + others) - s[:, 0]).mean()

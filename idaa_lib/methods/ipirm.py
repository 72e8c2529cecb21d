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

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal

import torch
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
    make_anchor,
    register_method,
    similarity,
)
from idaa_lib.methods.partitions import (
    OFFLINE_MIXED,
    ONLINE_MIXED,
    PLAIN,
    Embedded,
    compact_logits,
    debiased_loss,
    embed_together,
    fit_partition,
    mix,
    penalty,
)
from idaa_lib.methods.protocols import Classifier, OfficialProtocol
from idaa_lib.methods.simclr import SimCLR
from idaa_lib.nets.heads import Embedding, mlp
from idaa_lib.nets.processes import agree, count_processes, gather, rank
from idaa_lib.nets.resnet import start_as_torchvision
from idaa_lib.views import View, keyed_generator

VIEWS, START, SHARES = 11, 13, 15  # streams of a maximisation's random numbers
# Of DCL's code (§2.6). Which epoch counts is not published: the last one here.
LINEAR = Classifier(
    "adam", 1e-3, "constant", 100, best=False, weight_decay=1e-6, deviation=None, drifts=True
)


@register_method("ipirm")
class IPIRM(SimCLR):
    class Options(SimCLR.Options):
        """env_num: K, subsets of a partition. maximize_iter: epochs between two partitions.
        penalty_weight: λ₁, of the minimisation. irm_weight_maxim: λ₂ of the maximisation. irm_temp:
        T of both penalties. constrain: balance of the subsets. retain_group: keep `all` partitions,
        `one`, or the last n. keep_cont: add L_all to the loss. random_init: each maximisation's
        scores start at random, not the run's first alone. offline: views are embedded once a
        maximisation, not once an epoch of it. nonorm: sums over 2n, not means. dummy: scale of the
        penalty (§2.2). mixup: first views are mixed. mixup_max: in the maximisation too (§2.4).
        baseline: L_all alone. debiased: τ⁺ of DCL's loss for the baseline (§2.6)."""

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
        start_as_torchvision(backbone)  # §2.1
        super().__init__(options, backbone, about)
        rule = options.retain_group
        most = -(-about.epochs // options.maximize_iter) + 1
        self.capacity = 0 if options.baseline else {"all": most, "one": 1}.get(rule, rule)
        if not options.baseline:
            shape = self.capacity, about.n
            self.register_buffer("partitions", torch.zeros(shape, dtype=torch.uint8))
            self.register_buffer("fitted", torch.zeros((), dtype=torch.long))
            if not options.random_init:
                self.register_buffer("scores", torch.zeros(about.n, options.env_num))
        self._present: Tensor | None = None

    @classmethod
    def official_protocol(cls, config: Any) -> OfficialProtocol:
        """§2.6; also that of the baseline."""
        classifier = LINEAR._replace(augmentation=config.augmentation, middle=False)
        tau = config.temperature
        return OfficialProtocol(
            "IP-IRM", "backbone", tau, "backbone", "last", 512, classifier, whole=True, knn_note=""
        )

    def projector(self, inputs: int, dim: int) -> nn.Module:
        return mlp(inputs, 512, dim, bias=False)

    # --- minimisation -----------------------------------------------------------------------------

    def present(self) -> Tensor:
        """The partitions (P, N) that are kept at present."""
        if self._present is None:  # reading the count waits for a GPU
            self._present = self.partitions[: int(self.fitted)]
        return self._present

    def contrast(self, z1: Tensor, z2: Tensor) -> Tensor:
        if self.options.debiased:
            return debiased_loss(z1, z2, self.options.temperature, self.options.debiased)
        return super().contrast(z1, z2)

    def contrast_subsets(
        self,
        partitions: Iterable[Tensor],
        contrast: Callable[[Tensor], tuple[Tensor, Tensor]],
        zero: Tensor,
    ) -> dict[str, Tensor]:
        """The means of L_{P,k} and Ω_{P,k} over subsets of two images or more, and how many are
        smaller; `zero` without any.

        partitions: each the sides (B,) of a batch. contrast: rows of a subset → its L and Ω.
        """
        sides = range(self.options.env_num)
        subsets = [(p == k).nonzero(as_tuple=True)[0] for p in partitions for k in sides]
        terms = [contrast(rows) for rows in subsets if len(rows) > 1]
        small = zero.new_full((), len(subsets) - len(terms))
        losses, penalties = zip(*terms, strict=True) if terms else ([zero], [zero])
        loss, omega = torch.stack([*losses]).mean(), torch.stack([*penalties]).mean()
        return {"subsets": loss, "penalty": omega, "small_subsets": small}

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

        sides = [partition[index] for partition in self.present()]
        parts = self.contrast_subsets(sides, contrast, whole.new_zeros(()))
        loss = whole * own.keep_cont + parts["subsets"] + own.penalty_weight * parts["penalty"]
        return loss / max(1.0, own.penalty_weight), {"contrast": whole} | parts

    def step(self, views: tuple[View, ...], batch: Batch, moment: Moment) -> Step:
        index = gather(batch["images"])  # in the order that one process has (§2.2)
        if self.options.mixup:
            return self.mixed_step(views[0], views[1], index, gather(moment.numbers["mixup"]))
        e1, e2 = map(self.embed, views)
        z1, z2 = gather(e1.z), gather(e2.z)  # (B, D) of all processes
        loss, parts = self.objective(z1, z2, index)

        def adversarial_loss(e: Embedding, v_adv: View) -> Tensor:
            return self.objective(gather(e.z), z2, index)[0]

        ascent = self.ascent(views[0])
        step = self.two_view_step(loss, views, (e1, e2), ascent, adversarial_loss)
        step.parts |= {name: value.detach() for name, value in parts.items()}
        return step

    # --- minimisation with mixed images -----------------------------------------------------------

    def numbers(self, sizes: Mapping[str, int], generator: torch.Generator) -> dict[str, Tensor]:
        tensors = super().numbers(sizes, generator)
        if self.options.mixup:  # for the whole batch and within each partition
            shape = sizes["images"], 1 + self.capacity, 2
            tensors["mixup"] = torch.rand(shape, generator=generator)
        return tensors

    def contrast_mixed(
        self, images: Tensor, z2: Tensor, draws: Tensor, adversarial: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """L and Ω of images (n, 3, H, W) that are mixed by draws (n, 2), and their z₁ (n, D)."""
        mixed, target = mix(images, draws)
        z1 = embed_together(lambda part: self.embed(View(part, {}), adversarial).z, mixed)
        s = similarity(z1, z2, self.options.temperature)
        target = target.to(s.dtype)
        return F.cross_entropy(s, target), penalty(s, dummy=self.options.dummy, target=target), z1

    def mixed_step(self, v1: View, v2: View, index: Tensor, draws: Tensor) -> Step:
        """The step of mixed images, by draws (B, 1 + capacity, 2): the attack ascends L_all of the
        first view and itself."""
        anchor = make_anchor(lambda: gather(self.embed(v1, adversarial=True).z))

        def attack_loss(x: Tensor, at_start: bool = False) -> Tensor:
            with self.fixed_weights():
                z = anchor(x, False)
                return self.contrast_mixed(gather(x), z, draws[:, 0], adversarial=True)[0]

        def adversarial_loss(x: Tensor) -> list[Callable[[], Tensor]]:
            return self.mixed_terms(Step([]), x, v2, index, draws, adversarial=True)

        step = Step([], {}, v1, attack_loss, adversarial_loss)
        step.pictures |= {"view 1": v1.images, "view 2": v2.images}
        step.loss = self.mixed_terms(step, v1.images, v2, index, draws)
        return step

    def mixed_terms(
        self,
        step: Step,
        x: Tensor,
        v2: View,
        index: Tensor,
        draws: Tensor,
        adversarial: bool = False,
    ) -> list[Callable[[], Tensor]]:
        """The terms of L: L_all, and each partition, for which x₂ is embedded again; together where
        `one` is kept. λ₁ > 1 divides terms with a partition. `step` gets what is logged."""
        own, images = self.options, gather(x)
        sides: Sequence[Tensor] = () if own.baseline else [p[index] for p in self.present()]

        def make(with_all: bool, slot: int | None) -> Tensor:
            z2 = gather(self.embed(v2).z)
            loss, parts = 0 * z2.sum(), {}  # of subsets that are all too small

            def contrast(rows: Tensor) -> tuple[Tensor, Tensor]:
                mine = images[rows], z2[rows], draws[rows, 1 + (slot or 0)]
                return self.contrast_mixed(*mine, adversarial)[:2]

            if with_all:
                whole, _, z1 = self.contrast_mixed(images, z2, draws[:, 0], adversarial)
                loss, parts["contrast"] = loss + whole, whole
                own1, own2 = (z.detach().chunk(count_processes())[rank()] for z in (z1, z2))
                step.embeddings = own1, own2
            if slot is not None:
                parts |= self.contrast_subsets([sides[slot]], contrast, loss.new_zeros(()))
                loss = loss + parts["subsets"] + own.penalty_weight * parts["penalty"]
                loss = loss / max(1, own.penalty_weight)
                for name in ("subsets", "penalty"):  # means over partitions are logged
                    parts[name] = parts[name] / len(sides)
            for name, value in parts.items():
                step.parts[name] = step.parts.get(name, 0) + value.detach()
            return loss

        if own.retain_group == "one" and sides:
            return [partial(make, own.keep_cont, 0)]
        terms: list[Callable[[], Tensor]] = [partial(make, False, p) for p in range(len(sides))]
        return [partial(make, True, None), *terms] if own.keep_cont or own.baseline else terms

    # --- maximisation -----------------------------------------------------------------------------

    def before_epoch(self, epoch: int, work: Work) -> None:
        """Before the first epoch and after every `maximize_iter` a partition is fitted (§2.3)."""
        own = self.options
        if own.baseline or epoch % own.maximize_iter:
            return
        key, n = (self.about.seed, epoch), self.about.n
        fitting = (OFFLINE_MIXED if own.offline else ONLINE_MIXED) if own.mixup_max else PLAIN
        if epoch == 0 and n < fitting.batch:
            work.say(
                f"partition: {n} images are one batch of the maximisation, not {fitting.batch}."
            )
        embedded: Embedded | None = None

        def embeddings(number: int, batches: Sequence[Tensor]) -> Embedded:
            nonlocal embedded
            if embedded is None or not own.offline:
                embedded = self.embed_all(work, (*key, number), batches)
            return embedded

        if own.random_init or not self.fitted:
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

    def embed_all(self, work: Work, key: tuple[int, ...], batches: Sequence[Tensor]) -> Embedded:
        """Two views of all images; with `mixup_max` the first is λ of itself and the rest another
        of its batch, whose order is random."""
        n, mixing = self.about.n, None
        if self.options.mixup_max:
            uniform = torch.rand(n, generator=keyed_generator(*key, SHARES))
            partner = torch.arange(n)
            for index in batches:
                partner[index.cpu()] = index.cpu().roll(1)
            mixing = torch.maximum(uniform, 1 - uniform), partner

        def embed(view: int, mixing: tuple[Tensor, Tensor] | None) -> Tensor:
            how = {"generator": keyed_generator(*key, VIEWS + view), "mixing": mixing}
            at = "partition: {} of {} views are embedded"
            pulse = lambda done: work.pulse(at.format(view * n + done, 2 * n))  # noqa: E731
            return work.embed("projector", transform=self.recipe, pulse=pulse, **how)

        z1, z2 = embed(0, mixing), embed(1, None)
        return Embedded(z1, z2, *(part.to(z1.device) for part in mixing or ()))

    def keep(self, partition: Tensor) -> None:
        """Add a partition (N,); the oldest goes where there is no place."""
        if int(self.fitted) == len(self.partitions):
            self.partitions.copy_(self.partitions.roll(-1, 0))
            self.fitted -= 1
        self.partitions[int(self.fitted)] = partition
        self.fitted += 1
        self._present = None

"""Transfer: frozen features on other data by the protocol of Kornblith et al. 2019
(arXiv:1805.08974), inferred to be the paper's too (docs/spec/idaa.md §5); and few labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from idaa_lib import runs
from idaa_lib.configs import ConfigError, SSLConfig, TransferConfig
from idaa_lib.data.cached import ImageSet
from idaa_lib.evaluate.encoders import (
    Encoder,
    encode_splits,
    judged_on,
    load_encoder,
    open_splits,
    random_encoder,
)
from idaa_lib.evaluate.few_shot import draw_balanced, draw_episodes, few_shot
from idaa_lib.evaluate.metrics import (
    accuracy,
    mean_per_class,
    mean_per_class_interval,
    student_interval,
    top1,
)
from idaa_lib.evaluate.probe import (
    LAMBDAS,
    SIBLINGS,
    TRANSFER,
    Probe,
    linear_probe,
    principal_axes,
)
from idaa_lib.runs import Run, Writer, checkpoints
from idaa_lib.runs.choice import images_of, reading_of
from idaa_lib.runs.machine import describe, resolve_path, torch_device, uses_bf16
from idaa_lib.runs.stage import Plan, perform
from idaa_lib.runs.steps import Steps
from idaa_lib.views import keyed_generator

IMAGENET_SIZE = 224
# By convention judged by the mean of the classes' accuracies, since their classes differ in size.
PER_CLASS = frozenset({"fgvcaircraft", "oxfordiiitpet", "flowers102", "caltech101"})
# The encoders of the rows: the run's own, and the same before training.
ENCODERS: dict[str, Callable[[Run], Encoder]] = {"encoder": load_encoder, "random": random_encoder}


def locate(config: TransferConfig) -> Run:
    """The run directory that `config` leads to, whether it was judged yet or not."""
    return _plan(config).run


def transfer(config: TransferConfig) -> Run:
    """A finished SSL run's encoder judged on other data; a finished transfer is given back as it
    is, an interrupted one continues after the last encoder that was judged on a data set.

    `rows` of the run's `summary.json` hold, for each data set and encoder, accuracies in percent
    with their 95 % interval: `linear` on all labels, one for each share of the labels, one for each
    number of shots. `left_out` says why a data set, or its episodes, have none.

    Raises:
        RunError: the SSL run is missing or unfinished. ConfigError: no data set can be used.
        Stopped: on a request to stop, between two encoders.
    """
    plan = _plan(config)
    for name, reason in plan.left_out.items():
        print(f"{name} is left out: {reason}")
    return perform(plan, plan.judge)


def _plan(config: TransferConfig) -> _Transfer:
    source = runs.get("ssl", config.run)
    datasets = config.datasets or (judged_on(images_of(source, "datasets")),)
    classes = config.classes and resolve_path(config.classes)
    config = config.replace(run=source.reference, datasets=datasets, classes=classes)
    config, size, targets, left_out = open_targets(
        config, source.config, lambda name: reading_of(config, source, name)
    )
    counts = Counter[str]()
    for splits in targets:  # several folders may have one name
        counts[name := splits["test"].name] += 1
        if (number := counts[name]) > 1:
            splits |= {part: replace(s, name=f"{name} ({number})") for part, s in splits.items()}
    fingerprints = " ".join(splits["test"].fingerprint for splits in targets)
    run = runs.run_for(config, fingerprints, encoder=checkpoints.digest(source))
    device = torch_device(config.device)
    bf16 = uses_bf16(config.precision, device)
    machine = {"device": device, "output_device": device, "bf16": bf16}
    about = [describe(device, "bf16" if bf16 else "no", splits["test"]) for splits in targets]
    environment = about[0] | {"datasets": [each["dataset"] for each in about]}
    return _Transfer(config, run, source, size, targets, left_out, machine, environment=environment)


def open_targets(
    config: TransferConfig, training: SSLConfig, reading: Callable[[str], Mapping[str, Any]]
) -> tuple[TransferConfig, int, list[dict[str, ImageSet]], dict[str, str]]:
    """What an encoder of this training is judged on: the configuration with its data sets named,
    pixels a side, the splits of each, and why others are left out.

    reading: how a data set is read, as arguments of `load`.

    Raises:
        ConfigError: none of them can be used.
    """
    size = config.size or (IMAGENET_SIZE if training.stem == "imagenet" else training.size)
    names = tuple(map(resolve_path, config.datasets or (judged_on(training.dataset),)))
    targets, left_out = [], {}
    for name in dict.fromkeys(names):
        try:
            targets.append(open_splits(name, size, config.limit, **reading(name)))
        except ConfigError as error:
            left_out[name] = str(error)
    if not targets:
        first, more = next(iter(left_out.values())), len(left_out) - 1
        others = f" (and neither can {more} more)" if more else ""
        raise ConfigError(f"No data set can be transferred to{others}: {first}")
    return config.replace(datasets=names), size, targets, left_out


@dataclass(frozen=True)
class _Transfer(Plan):
    """source: the run whose encoder is judged. size: pixels a side. targets: the splits of each
    data set. left_out: what has no rows → why. machine: arguments of `features`."""

    source: Run
    size: int
    targets: list[dict[str, ImageSet]]
    left_out: dict[str, str]
    machine: dict[str, Any]

    def judge(self, writer: Writer | None) -> dict[str, Any]:
        """The summary."""
        rows: list[dict[str, Any]] = []
        targets = [(splits, self.episodes(splits["test"])) for splits in self.targets]
        jobs = [*product(targets, list(ENCODERS)[: 2 if self.config.references else 1])]
        steps = Steps(
            self.run,
            writer,
            len(jobs),
            per_epoch=len(jobs),
            images=sum(len(split) for split in self.targets[0].values()),
            checkpoint_every=1,
            state=lambda: ({}, {"rows": rows}),
            restore=lambda _, values: rows.extend(values["rows"]),
        )
        steps.resume()
        for step in steps:
            (splits, episodes), name = jobs[step]
            encoder = ENCODERS[name](self.source)._replace(size=self.size)
            z = encode_splits(encoder.to(self.machine["device"]), splits, **self.machine)
            verdicts = self.rows(z, splits, episodes)
            content = {"fingerprint": splits["test"].fingerprint}  # two may have one name
            rows += [{"features": name, **content, **row} for row in verdicts]
            values = ", ".join(f"{row['probe']} {row['value']:.1f}" for row in verdicts)
            print(f"{splits['test'].name}, {name}: {values} (%)")
        summary = {"rows": rows, "left_out": self.left_out, "size": self.size}
        return summary | {"seconds": steps.seconds}

    def episodes(self, test: ImageSet) -> dict[int, Tensor]:
        """Episodes of each number of shots, the same for every encoder."""
        config, episodes = self.config, {}
        for shots in config.shots:
            numbers = config.ways, shots, config.queries, config.episodes, config.seed
            try:
                episodes[shots] = draw_episodes(test.labels, *numbers)
            except ValueError as error:
                key = f"{test.name}, {config.ways}-way {shots}-shot"
                self.left_out[key] = f"only {error}."
        return episodes

    def rows(
        self, z: dict[str, Tensor], splits: dict[str, ImageSet], episodes: dict[int, Tensor]
    ) -> list[dict[str, Any]]:
        """The rows of one encoder, by its features z of the splits of one data set."""
        config, test = self.config, splits["test"]
        y = {name: split.labels.to(z[name].device) for name, split in splits.items()}
        by_class = test.name in PER_CLASS
        score, metric = (mean_per_class, "mean per class") if by_class else (top1, "top-1")
        if config.penalize_bias:
            base, norm, axes = SIBLINGS, "λ(‖W‖² + ‖b‖²), λ rising (CASSLE's)", None
        else:
            axes = principal_axes(torch.cat([z["train"], z["val"]]))
            base, norm = TRANSFER, "λ‖W‖²"
        protocol = base._replace(iterations=config.iterations, tolerance=config.tolerance)
        size = f"{self.size} px, frozen features"
        words = f"{size} as they are; L-BFGS on Σ cross-entropy + {norm}, one of {len(LAMBDAS)} λ"

        def probe(index: Tensor | slice, refit: bool) -> Probe:
            train, val = (z["train"][index], y["train"][index]), (z["val"], y["val"])
            how: dict[str, Any] = dict(classes=len(test.classes), score=score, axes=axes)
            how["protocol"] = protocol._replace(refit=refit)
            return linear_probe(train, val, z["test"], **how)

        whole = probe(slice(None), True)
        of_images = accuracy(whole.predictions, y["test"])
        of_classes = mean_per_class_interval(whole.predictions, y["test"])
        value, low, high = of_classes if by_class else of_images[:3]
        row: dict[str, Any] = {"probe": "linear", "value": value, "low": low, "high": high}
        row |= {"n": len(test), "of": "test images", "labels": len(y["train"]) + len(y["val"])}
        row |= {"top1": of_images.top1, "mean_per_class": of_classes.value}
        row |= {"penalty": whole.penalty, "score_val": whole.score_val}
        row["protocol"] = f"{words} chosen on val, refit on train + val, test read once"
        rows = [row]
        for fraction in dict.fromkeys(config.fractions):
            scores = []
            for draw in range(config.draws):
                index = draw_balanced(
                    y["train"].cpu(), fraction, keyed_generator(config.seed, draw)
                )
                few = probe(index.to(z["train"].device), False)
                scores.append(score(few.predictions, y["test"]))
            how = "chosen on val (all of it), labels drawn by class, no refit"
            name = f"{100 * fraction:g} % of labels"
            if fraction * len(y["train"]) - len(index) > len(y["train"].unique()):  # rare classes
                name += f" ({len(index)} of {len(y['train'])})"
            row = {"probe": name, **student_interval(scores, "%")._asdict()}
            row |= {"n": len(scores), "of": "draws", "labels": len(index)}
            rows.append(row | {"protocol": f"{words} {how}"})
        for shots, part in episodes.items():
            accuracies = few_shot(z["test"], part, shots, config.few_shot).cpu()
            name, queries = f"{config.ways}-way {shots}-shot", f"{config.queries} queries a class"
            words = f"{size}, L2-normalised; {config.few_shot}, {queries}, all images from test"
            row = {"probe": name, "metric": "top-1", **student_interval(accuracies, "%")._asdict()}
            row |= {"n": len(part), "of": "episodes", "labels": config.ways * shots}
            rows.append(row | {"protocol": words})
        return [{"dataset": test.name, "metric": metric, **row} for row in rows]

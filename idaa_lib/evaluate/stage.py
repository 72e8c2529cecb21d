"""The evaluation stage: an SSL run in, a run directory with accuracies and features out."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from idaa_lib import checkpoints, runs
from idaa_lib.configs import ConfigError, EvalConfig
from idaa_lib.environment import describe, open_images, settled, torch_device, uses_bf16
from idaa_lib.evaluate.encoders import features, load_encoder, pixels, random_encoder
from idaa_lib.evaluate.figures import accuracy, effective_rank, embedding_std
from idaa_lib.evaluate.knn import knn, official_bank
from idaa_lib.evaluate.linear import linear_probe, official_probe
from idaa_lib.images import ImageSet
from idaa_lib.methods import OfficialProtocol, method_class
from idaa_lib.runs import Run

# What stands in one table beside the run's own encoder.
SUBJECTS = ("encoder", "random", "pixels")
LAYERS = {"backbone": "backbone features", "projector": "projected z"}


def locate(config: EvalConfig) -> Run:
    """The run directory that `config` leads to, whether it was evaluated yet or not."""
    return _plan(config).run


def evaluate(config: EvalConfig) -> Run:
    """Evaluate a finished SSL run under `config`; a finished evaluation is given back as it is.

    The run's `summary.json` has, for the trained encoder and (with `references`) for the same
    encoder before training and for raw pixels, kNN and linear top-1 in percent with n, the 95 %
    interval and the protocol.

    Raises:
        RunError: the SSL run is missing or unfinished. ConfigError: the images have no labels.
    """
    plan = _plan(config)
    config, run, source, splits = plan.config, plan.run, plan.source, plan.splits
    if run.finished:
        print(f"{run.id} is finished: showing its result.")
        return run
    device = torch_device(config.device)
    precision = "bf16" if uses_bf16(config.precision, device) else "no"
    with run.writing(config, describe(device, precision, splits["test"])) as writer:
        began = time.monotonic()
        labels = {s: split.labels for s, split in splits.items()}
        classes = len(splits["train"].classes)
        official = None
        if config.protocol == "official":
            official = method_class(source.config.method).official
        looked_at = {"knn": official.knn if official else "backbone"}
        looked_at["linear"] = official.linear if official else "backbone"
        summary: dict[str, Any] = {"protocol": config.protocol}
        kept: dict[str, Tensor] = {"labels": labels["test"]}
        for subject in SUBJECTS if config.references else SUBJECTS[:1]:
            layers = _encode(subject, source, splits, device, config, looked_at)
            of = {
                probe: "raw pixels" if subject == "pixels" else LAYERS[layer]
                for probe, layer in looked_at.items()
            }
            rows, predictions = _judge(layers, labels, classes, config, of, official)
            prefix = "" if subject == "encoder" else f"{subject}_"
            summary |= {f"{prefix}{key}": value for key, value in rows.items()}
            kept |= {f"{subject}.{key}": value for key, value in predictions.items()}
            if subject == "encoder":
                kept["features"] = layers["linear"]["test"]
                summary["embedding_std"] = embedding_std(kept["features"])
                summary["effective_rank"] = effective_rank(kept["features"])
            print(
                f"{subject}: kNN {rows['knn_top1']:.2f} %, linear {rows['linear_top1']:.2f} % "
                f"({config.protocol}, n = {rows['knn_n']:,})"
            )
        save_file({k: v.contiguous() for k, v in kept.items()}, run.path / "results.safetensors")
        writer.finish(summary | {"seconds": time.monotonic() - began})
    return run


class _Plan(NamedTuple):
    config: EvalConfig
    run: Run
    source: Run
    splits: dict[str, ImageSet]


def _plan(config: EvalConfig) -> _Plan:
    source = runs.encoder(config.run)
    if source.stage == "semi" and config.protocol == "official":
        raise ConfigError(
            f"protocol='official' is of self-supervised runs, and run={source.id!r} is "
            f"semi-supervised: take 'clean'."
        )
    trained = source.config
    dataset = settled(config.dataset or trained.dataset)
    config = config.model_copy(update={"run": source.reference, "dataset": dataset})
    splits = {
        split: open_images(dataset, split, trained.size, config.limit)
        for split in ("train", "val", "test")
    }
    if not splits["train"].labelled:
        raise ConfigError(f"dataset={dataset!r} has no labels to evaluate against.")
    run = runs.run_for(config, splits["test"].fingerprint, encoder=checkpoints.digest(source))
    return _Plan(config, run, source, splits)


def results(run: Run) -> dict[str, Tensor]:
    """Tensors of a finished evaluation: `labels` and `features` of the test images, and predictions
    `<subject>.knn`, `<subject>.linear` of encoder, random, pixels."""
    return load_file(run.path / "results.safetensors")


def _encode(
    subject: str,
    source: Run,
    splits: dict[str, ImageSet],
    device: torch.device,
    config: EvalConfig,
    layers: dict[str, str],
) -> dict[str, dict[str, Tensor]]:
    """Features of each split for kNN and for the linear probe, encoded once where they agree."""
    if subject == "pixels":
        found = {s: pixels(split.images) for s, split in splits.items()}
        return {"knn": found, "linear": found}
    load = load_encoder if subject == "encoder" else random_encoder
    bf16, encoded = uses_bf16(config.precision, device), {}
    for layer in set(layers.values()):
        module, size, mean, std = load(source, layer)
        module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        encoded[layer] = {
            s: features(module, split.images, size, mean, std, device=device, bf16=bf16)
            for s, split in splits.items()
        }
    return {probe: encoded[layer] for probe, layer in layers.items()}


def _judge(
    layers: dict[str, dict[str, Tensor]],
    labels: dict[str, Tensor],
    classes: int,
    config: EvalConfig,
    of: dict[str, str],
    official: OfficialProtocol | None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Accuracies and predictions. The bank and the final fit use train and val together."""
    bank, linear = layers["knn"], layers["linear"]
    both = torch.cat([labels["train"], labels["val"]])
    vectors = torch.cat([bank["train"], bank["val"]])
    temperature = official.temperature if official else config.temperature
    if official and official.bank:
        vectors = official_bank(torch.nn.functional.normalize(vectors, dim=1), official.bank)
        of = of | {"knn": f"{of['knn']}, official bank"}
    guess = knn(vectors, both, bank["test"], classes=classes, k=config.k, temperature=temperature)
    rows: dict[str, Any] = {
        f"knn_{k}": v for k, v in accuracy(guess, labels["test"])._asdict().items()
    }
    name = f"official of {official.of}" if official else config.protocol
    rows["knn_protocol"] = (
        f"{name}: {of['knn']}, k={min(config.k, len(vectors))}, τ={temperature:g}, final epoch"
    )
    if official:
        train = (torch.cat([linear["train"], linear["val"]]), both)
        test = (linear["test"], labels["test"])
        probe = official_probe(
            train, test, classes=classes, batch_size=official.batch_size, seed=config.seed
        )
        found, count = probe.predictions, probe.n
        rows["linear_top1_last"] = probe.top1_last
        rows["linear_protocol"] = (
            f"{name}: {of['linear']}, Adam, 1000 epochs, best test epoch, partial batch dropped"
        )
    else:
        fit = linear_probe(
            (linear["train"], labels["train"]),
            (linear["val"], labels["val"]),
            linear["test"],
            classes=classes,
        )
        found, count = fit.predictions, len(labels["test"])
        rows["linear_penalty"], rows["linear_top1_val"] = fit.penalty, fit.top1_val
        rows["linear_protocol"] = "clean: L-BFGS, penalty chosen on val, refit, test read once"
    judged = accuracy(found, labels["test"][:count])._asdict()
    return rows | {f"linear_{k}": v for k, v in judged.items()}, {"knn": guess, "linear": found}

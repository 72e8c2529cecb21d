"""How published code judges an encoder: data that a method's `official_protocol` gives."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Classifier(NamedTuple):
    """A published linear classifier that sees another view of each image in each epoch."""

    optimizer: str  # as `schedule`, a name of `methods.schedules`
    rate: float  # the learning rate at its highest; of 256 images where `scaled` by the batch
    schedule: str
    epochs: int
    best: bool = True  # judged after the epoch that is best on test; else after the last
    scaled: bool = False
    weight_decay: float = 0.0
    augmentation: str | None = None  # None: crops of 8 % and more, and flips
    deviation: float | None = 0.01  # of first weights, with biases at 0; None: torch's own start
    # Features are L2-normalised, then standardised by the training images without augmentation.
    standardise: bool = False
    drop_last: bool = False  # leave out batches that are not full
    middle: bool = True  # tested on the middle of the images, as large as a view; else on all
    # The published code leaves the encoder's BatchNorm in training mode; here it is in eval mode,
    # and the label says so.
    drifts: bool = False


class OfficialProtocol(NamedTuple):
    """How the official code judges a method's encoder (docs/spec/idaa.md §5, siblings.md §2.6,
    §3.4)."""

    of: str  # whose protocol it is
    knn: str  # the layer that kNN looks at, and its temperature
    temperature: float
    linear: str  # the layer that the linear classifier looks at
    linear_epoch: Literal["best", "last"]  # which counts: `best` on test, as for kNN, or the last
    batch_size: int  # of the linear classifier
    classifier: Classifier | None = None  # on fresh views; None: on features that were made once
    whole: bool = False  # images are those that the training's crops were cut of, not resized
    # What our kNN has other than the published one: IDAA's bank is faulty, and SimSiam's authors
    # have another.
    knn_note: str = " (bank without the release's fault)"

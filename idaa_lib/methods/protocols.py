"""How published code judges an encoder: data that a method's `official_protocol` gives."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Classifier(NamedTuple):
    """A published linear classifier that sees another view of each image in each epoch.

    Fields:
        optimizer, schedule: names of `methods.schedules`. rate: the learning rate at its highest,
            of 256 images and scaled by the batch where `scaled`.
        epochs: how many. best: it is judged after the one that is best on test; else the last.
        augmentation: the recipe of its views; None for crops of 8 % and more, and flips.
        deviation: of its first weights, and its biases start at 0; None for torch's own start.
        standardise: features are L2-normalised, and then standardised by mean and variance of the
            training images without augmentation.
        drop_last: batches that are not full are left out.
        middle: tested on the middle of the images, as large as a view; else on all of them.
        drifts: the published code leaves the encoder's BatchNorm in training mode; here it is in
            eval mode, and the label says so.
    """

    optimizer: str
    rate: float
    schedule: str
    epochs: int
    best: bool = True
    scaled: bool = False
    weight_decay: float = 0.0
    augmentation: str | None = None
    deviation: float | None = 0.01
    standardise: bool = False
    drop_last: bool = False
    middle: bool = True
    drifts: bool = False


class OfficialProtocol(NamedTuple):
    """How the official code judges a method's encoder (docs/spec/idaa.md §5, siblings.md §2.6,
    §3.4).

    Fields:
        of: whose protocol it is. knn, linear: the layer that each of the two looks at.
        temperature: of kNN, which is that of the best epoch on test.
        linear_epoch: the epoch that the linear classifier is of, that one (`best`) or the `last`.
        batch_size: of the linear classifier.
        classifier: on fresh views; None for the one on features that were made once.
        whole: images are those that the training's crops were cut of, not resized to its size.
        knn_note: what our kNN has other than the published one.
    """

    of: str
    knn: str
    temperature: float
    linear: str
    linear_epoch: Literal["best", "last"]
    batch_size: int
    classifier: Classifier | None = None
    whole: bool = False
    # IDAA's bank is faulty, and SimSiam's authors have another.
    knn_note: str = " (bank without the release's fault)"

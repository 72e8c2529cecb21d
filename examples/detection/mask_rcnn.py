"""Mask R-CNN (He et al. 2017, arXiv:1703.06870) from torchvision's parts on a ResNet of ours.

`c4` is what MoCo (arXiv:1911.05722, §4.2) and SimSiam judge transfer by: Detectron2's R50-C4 with
tuned BatchNorms and an extra one after layer 4 (`Res5ROIHeadsExtraNorm`). That the paper does too
is inferred: its SimSiam row is SimSiam's own (docs/spec/idaa.md §5). Layers 1 to 3 make one feature
map of stride 16; layer 4 is the head of every region, shared by classes, boxes and masks. `fpn` is
torchvision's own Mask R-CNN on a feature pyramid.

Against Detectron2: the box losses are torchvision's smooth L1 (β = 1/9) where Detectron2 has L1,
and images are shrunk without antialiasing.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.models.detection.roi_heads import (
    RoIHeads,
    fastrcnn_loss,
    maskrcnn_inference,
    maskrcnn_loss,
)
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import RoIAlign

from idaa_lib.nets.resnet import ResNet

# Sides of training images as shares of `size`: Detectron2's 640, 672, …, 800 and at most 1333.
SHARES, LONGEST = (0.8, 0.84, 0.88, 0.92, 0.96, 1.0), 5 / 3
STRIDES = {"cifar": 4, "mini": 8, "imagenet": 16}  # of layer 3, by stem
STRIDE = STRIDES["imagenet"]
ANCHORS, RATIOS = (32, 64, 128, 256, 512), (0.5, 1.0, 2.0)  # pixels of the resized image


def mask_rcnn(
    backbone: ResNet,
    classes: int,
    *,
    architecture: str,
    size: int,
    rois: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    masks: bool = True,
) -> GeneralizedRCNN:
    """A detector whose layers up to 4 are `backbone`'s own modules, called as torchvision's.

    Args:
        backbone: with an ImageNet stem and without adversarial norms.
        classes: without the background; labels are 1…classes.
        architecture: `c4` or `fpn`.
        size: pixels of the shorter side. rois: regions sampled of each training image.
        mean, std: that the backbone's images were normalised with.
        masks: with a mask head.
    """
    sides = tuple(round(size * share) for share in SHARES)
    longest = round(size * LONGEST)
    # Channels double from layer to layer.
    widths = [backbone.feature_dim // 2 ** (4 - i) for i in range(1, 5)]
    if architecture == "fpn":
        stages = {f"layer{i}": str(i - 1) for i in range(1, 5)}
        kind: Any = MaskRCNN if masks else FasterRCNN
        pyramid = BackboneWithFPN(_layers(backbone, 4), stages, widths, 256)
        return kind(
            pyramid,
            classes + 1,
            min_size=sides,
            max_size=longest,
            image_mean=mean,
            image_std=std,
            box_batch_size_per_image=rois,
        )
    features = _layers(backbone, 3)
    anchors = AnchorGenerator((ANCHORS,), (RATIOS,))
    rpn = RegionProposalNetwork(
        anchors,
        RPNHead(widths[2], anchors.num_anchors_per_location()[0]),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n=dict(training=12000, testing=6000),
        post_nms_top_n=dict(training=2000, testing=1000),
        nms_thresh=0.7,
    )
    transform = GeneralizedRCNNTransform(sides, longest, mean, std)
    return GeneralizedRCNN(features, rpn, C4Heads(backbone, classes, rois, masks), transform)


def _layers(backbone: ResNet, last: int) -> nn.Sequential:
    """The stem and layers 1…last: normalised images (B, 3, H, W) → the last layer's map."""
    conv1, bn1, maxpool = map(backbone.get_submodule, ("conv1", "bn1", "maxpool"))
    layers = {"stem": nn.Sequential(conv1, bn1, nn.ReLU(inplace=True), maxpool)}
    for i in range(1, last + 1):
        layers[f"layer{i}"] = nn.Sequential(*backbone.get_submodule(f"layer{i}").children())
    return nn.Sequential(OrderedDict(layers))


class C4Heads(RoIHeads):
    """Detectron2's `Res5ROIHeadsExtraNorm`: one pass through layer 4 for classes, boxes and masks.

    torchvision's own would run layer 4 a second time on the positive regions, and its BatchNorms
    would see those alone.
    """

    def __init__(self, backbone: ResNet, classes: int, rois: int, masks: bool) -> None:
        width = backbone.feature_dim
        layer4 = nn.Sequential(*backbone.get_submodule("layer4").children())
        predictor = FastRCNNPredictor(width, classes + 1)
        for layer, std in ((predictor.cls_score, 0.01), (predictor.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)
        super().__init__(
            RoIAlign(14, 1 / STRIDE, sampling_ratio=0, aligned=True),
            nn.Sequential(OrderedDict(layer4=layer4, norm=nn.BatchNorm2d(width))),
            predictor,
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=rois,
            positive_fraction=0.25,
            bbox_reg_weights=None,
            score_thresh=0.05,
            nms_thresh=0.5,
            detections_per_img=100,
            mask_predictor=MaskRCNNPredictor(width, 256, classes + 1) if masks else None,
        )

    def regions(self, features: dict[str, Tensor], boxes: list[Tensor]) -> Tensor:
        """The regions of all images after layer 4, (R, feature_dim, 7, 7)."""
        return self.box_head(self.box_roi_pool(features["0"], boxes))

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """As RoIHeads.forward: no detections and losses in training, detections and no losses in
        evaluation."""
        if self.training:
            assert targets is not None
            proposals, matched, labels, moves_true = self.select_training_samples(
                proposals, targets
            )
            pooled = self.regions(features, proposals)
            logits, moves = self.box_predictor(pooled.mean((2, 3)))
            names = ("loss_classifier", "loss_box_reg")
            losses = dict(zip(names, fastrcnn_loss(logits, moves, labels, moves_true), strict=True))
            if self.mask_predictor is not None:
                is_object = [of_image > 0 for of_image in labels]
                losses["loss_mask"] = maskrcnn_loss(
                    self.mask_predictor(pooled[torch.cat(is_object)]),
                    [boxes[keep] for boxes, keep in zip(proposals, is_object, strict=True)],
                    [target["masks"] for target in targets],
                    [target["labels"] for target in targets],
                    [index[keep] for index, keep in zip(matched, is_object, strict=True)],
                )
            return [], losses
        logits, moves = self.box_predictor(self.regions(features, proposals).mean((2, 3)))
        boxes, scores, classes = self.postprocess_detections(logits, moves, proposals, image_shapes)
        detections = [
            {"boxes": b, "scores": s, "labels": c}
            for b, s, c in zip(boxes, scores, classes, strict=True)
        ]
        if self.mask_predictor is not None:
            logits = self.mask_predictor(self.regions(features, boxes))
            for each, masks in zip(detections, maskrcnn_inference(logits, classes), strict=True):
                each["masks"] = masks
        return detections, {}

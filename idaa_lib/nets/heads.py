"""Projection heads, one function per paper (docs/spec/idaa.md §4)."""

from torch import nn


def simclr_projector(features: int, dim: int) -> nn.Sequential:
    """Linear-ReLU-Linear (Chen et al. 2020, arXiv:2002.05709, §2.1): (B, features) → (B, dim)."""
    return nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, dim))

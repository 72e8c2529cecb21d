"""Adversaries: from (x, a loss of x) to x′; they know no method (contract: architecture.md)."""

from idaa_lib.adversaries.ascent import CLAE, IDAA, Direction, GradientAscent, RandomSign
from idaa_lib.adversaries.base import (
    Adversary,
    Attack,
    AttackError,
    AttackLoss,
    NoAdversary,
    Numbers,
    VAEOptions,
    build_adversary,
    register_adversary,
)

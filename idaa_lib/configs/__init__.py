"""What a run is asked to do: one frozen, validated configuration per stage.

A notebook's `parameters` cell has exactly these names, so `papermill -p epsilon 0.1` sets
`SSLConfig.epsilon`. Fields that a preset governs may be left out or None ("the preset's value");
the object itself, and the `config.json` made from it, hold resolved values only.

Constants: docs/architecture.md, docs/spec/idaa.md §1 (VAE), §2 (ε), §4 (SimCLR), §5 (evaluation).
"""

from idaa_lib.configs.base import PRESET, PRESETS, Config, ConfigError, UserError
from idaa_lib.configs.stages import (
    CompareConfig,
    DecomposeConfig,
    EvalConfig,
    SweepConfig,
    TheoryConfig,
    TransferConfig,
)
from idaa_lib.configs.training import (
    EncoderConfig,
    SemiConfig,
    SSLConfig,
    TrainingConfig,
    VAEConfig,
)

__all__ = [
    "PRESET",
    "PRESETS",
    "CompareConfig",
    "Config",
    "ConfigError",
    "DecomposeConfig",
    "EncoderConfig",
    "EvalConfig",
    "SSLConfig",
    "SemiConfig",
    "SweepConfig",
    "TheoryConfig",
    "TrainingConfig",
    "TransferConfig",
    "UserError",
    "VAEConfig",
]

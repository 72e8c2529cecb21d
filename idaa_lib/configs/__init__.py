"""What a run is asked to do: one frozen, validated configuration per stage.

A notebook's parameters are these names, in its `parameters` cell or not, so `papermill -p epsilon
0.1` sets `SSLConfig.epsilon`. Fields that a recipe governs may be left out or None ("the recipe's
value"); the object itself, and the `config.json` written from it, hold resolved values only.
"""

from idaa_lib.configs.base import (
    OFFICIAL,
    UNKNOWN,
    Config,
    ImagesConfig,
    Options,
)
from idaa_lib.configs.reading import ConfigError, UserError
from idaa_lib.configs.stages import (
    CompareConfig,
    DecomposeConfig,
    EvalConfig,
    SweepConfig,
    SystemsConfig,
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

"""Training: `train_vae`, `train_ssl`, `train_semi`: a configuration in, the finished run out."""

from idaa_lib.train.stages import (
    check_start,
    check_vae,
    locate,
    train,
    train_semi,
    train_ssl,
    train_vae,
)

"""Training: `train_vae` and `train_ssl` take a configuration and give back the finished run."""

from idaa_lib.train.stages import locate, train, train_ssl, train_vae

__all__ = ["locate", "train", "train_ssl", "train_vae"]

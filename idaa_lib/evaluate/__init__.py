"""Evaluation of frozen encoders: features, kNN, linear probes, and a run's encoder back.

`stage` is the evaluation as a run of its own; the others work on any module and tensors.
"""

from idaa_lib.evaluate.encoders import load_encoder, load_vae

__all__ = ["load_encoder", "load_vae"]

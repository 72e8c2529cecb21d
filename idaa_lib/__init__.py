"""IDAA workbench: identity-disentangled adversarial augmentation for self-supervised learning.

import idaa_lib
run = idaa_lib.train_ssl(idaa_lib.SSLConfig(adversary="idaa", epsilon=0.1))
module, size, mean, std = idaa_lib.load_encoder(run)
"""

import contextlib
import sys

from idaa_lib import results
from idaa_lib.adversaries import IDAA, Adversary, Attack, VAEOptions, register_adversary
from idaa_lib.configs import ConfigError, EvalConfig, Options, SemiConfig, SSLConfig, VAEConfig
from idaa_lib.data.cached import load
from idaa_lib.evaluate import load_encoder, load_vae
from idaa_lib.evaluate.stage import evaluate
from idaa_lib.interop import export, import_run, load_official
from idaa_lib.methods import Method, Step, register_method
from idaa_lib.methods.contrastive import Contrastive
from idaa_lib.nets import register_backbone
from idaa_lib.nets.heads import Network
from idaa_lib.runs import Run, RunError, Stopped, find
from idaa_lib.train import train_semi, train_ssl, train_vae

__all__ = [
    "IDAA",
    "Adversary",
    "Attack",
    "ConfigError",
    "Contrastive",
    "EvalConfig",
    "Method",
    "Network",
    "Options",
    "Run",
    "RunError",
    "SSLConfig",
    "SemiConfig",
    "Step",
    "Stopped",
    "VAEConfig",
    "VAEOptions",
    "evaluate",
    "export",
    "find",
    "import_run",
    "load",
    "load_encoder",
    "load_official",
    "load_vae",
    "register_adversary",
    "register_backbone",
    "register_method",
    "results",
    "train_semi",
    "train_ssl",
    "train_vae",
]

# A console in another encoding than UTF-8 shows τ as \u03c4, where it would end a training.
with contextlib.suppress(AttributeError):  # a notebook's output has every sign
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]

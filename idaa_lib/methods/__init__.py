"""Self-supervised methods by name, one file each; the contract is in `base`."""

from idaa_lib.methods import simclr, vae  # noqa: F401 - they register themselves
from idaa_lib.methods.base import METHODS, Method, Step, build_method, register_method

__all__ = ["METHODS", "Method", "Step", "build_method", "register_method"]

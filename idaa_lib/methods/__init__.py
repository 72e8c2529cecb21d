"""Self-supervised methods by name, one file each; the contract is in `base`."""

from idaa_lib.methods import byol, moco, plain, simclr, simsiam, uel, vae
from idaa_lib.methods.base import (
    METHODS,
    Method,
    OfficialProtocol,
    Step,
    build_method,
    method_class,
    register_method,
)

__all__ = [
    "METHODS",
    "Method",
    "OfficialProtocol",
    "Step",
    "build_method",
    "method_class",
    "register_method",
]

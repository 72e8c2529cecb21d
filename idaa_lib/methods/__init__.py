"""Methods by name, one file each; the contract is in `base`."""

from idaa_lib.methods import barlow, byol, fixmatch, ipirm, moco, plain, rsa, simclr, simsiam, uel
from idaa_lib.methods.base import (
    METHODS,
    About,
    Method,
    Moment,
    Step,
    build_method,
    register_method,
)
from idaa_lib.methods.protocols import Classifier, OfficialProtocol

__all__ = [
    "METHODS",
    "About",
    "Classifier",
    "Method",
    "Moment",
    "OfficialProtocol",
    "Step",
    "build_method",
    "register_method",
]

"""Methods by name, one file each; the contract is in `base`."""

from idaa_lib.methods import barlow, byol, fixmatch, ipirm, moco, plain, rsa, simclr, simsiam, uel
from idaa_lib.methods.base import (
    METHODS,
    About,
    Method,
    Moment,
    OfficialProtocol,
    Step,
    build_method,
    register_method,
)

__all__ = [
    "METHODS",
    "About",
    "Method",
    "Moment",
    "OfficialProtocol",
    "Step",
    "build_method",
    "register_method",
]

"""What is left of an image's identity: the theory from tensors, and the study."""

from idaa_lib.identity.stage import study

__all__ = ["study"]

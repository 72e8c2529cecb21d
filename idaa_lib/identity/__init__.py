"""What is left of an image's identity: the theory from tensors, and the study."""

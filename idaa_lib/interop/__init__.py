"""Weights from elsewhere and to elsewhere: published checkpoints in, encoders out.

`load_official` reads what IDAA and its baselines published, `import_run` makes a finished run of
it, for every notebook; `export` writes an encoder for torchvision, safetensors, ONNX or Detectron2.
"""

from idaa_lib.interop.imported import import_run
from idaa_lib.interop.official import Official, load_official
from idaa_lib.interop.writers import export

__all__ = ["Official", "export", "import_run", "load_official"]

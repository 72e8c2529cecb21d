"""How many files a reader opens: what a training calls, and how one step goes from file to file.

    python benchmarks/hops.py

Counted on a tiny SimCLR + IDAA training on the CPU: the files and functions of `idaa_lib` that
`train_ssl` calls, and the hops of a step, the calls that are in another file than the call before.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import idaa_lib
from idaa_lib.configs import SSLConfig, VAEConfig
from idaa_lib.train import train_ssl, train_vae
from idaa_lib.train.loop import Fit

ROOT = str(Path(idaa_lib.__file__).parent)
SMALL: dict[str, Any] = {
    "dataset": "photos",
    "limit": 64,
    "batch_size": 32,
    "width": 4,
    "epochs": 1,
    "device": "cpu",
}


class Calls:
    """The functions of `idaa_lib` that were called, and their files in order."""

    def __init__(self) -> None:
        self.functions: set[tuple[str, str]] = set()
        self.files: list[str] = []  # of the calls, each as often as it changes

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(ROOT):
            self.functions.add((code.co_filename, code.co_qualname))
            if self.files[-1:] != [code.co_filename]:
                self.files.append(code.co_filename)

    def watch(self, work: Callable[[], Any]) -> Any:
        """The result of `work`, watched."""
        sys.setprofile(self)
        try:
            return work()
        finally:
            sys.setprofile(None)


def main() -> None:
    whole, step = Calls(), Calls()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["IDAA_OUTPUTS"] = folder
        vae = train_vae(VAEConfig(**SMALL, dim=8))
        attack: dict[str, Any] = {"adversary": "idaa", "vae": vae.id}
        config = SSLConfig(**SMALL, **attack)
        whole.watch(lambda: train_ssl(config.model_copy(update={"seed": 1})))
        train_step = Fit.train_step

        def watch_step(*args: Any) -> Any:
            step.files.clear()
            return step.watch(lambda: train_step(*args))

        Fit.train_step = watch_step  # type: ignore
        train_ssl(config)
    files = {file for file, _ in whole.functions}
    print(f"train_ssl: {len(files)} files, {len(whole.functions)} functions")
    print(f"one SimCLR + IDAA step: {len(step.files) - 1} hops")


if __name__ == "__main__":
    main()

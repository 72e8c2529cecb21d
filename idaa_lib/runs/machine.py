"""The machine that makes a run: its device, versions and data, its processes and their signals."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch

from idaa_lib.configs import ConfigError, ImagesConfig
from idaa_lib.configs.lookups import once
from idaa_lib.configs.reading import expand, quote
from idaa_lib.data.cached import ImageSet, load
from idaa_lib.data.sources import NAMES

Reader = TypeVar("Reader", bound=ImagesConfig)
PACKAGES = ("idaa_lib", "torch", "torchvision", "accelerate", "numpy", "scikit-learn", "pillow")


def open_images(dataset: str, split: str, size: int, limit: int | None, **reading: Any) -> ImageSet:
    """The images of a source; `reading` as `load` takes it.

    Raises:
        ConfigError: the source or the file is missing, unreadable, or lacks what it is asked for.
    """

    def look() -> ImageSet:
        try:
            return load(dataset, split, size, limit, **reading)
        except (OSError, ValueError) as error:
            raise ConfigError(f"dataset={quote(dataset)}: {error}.") from error

    return once((dataset, split, size, limit, *reading.items()), look)


def drop_unlabelled(images: ImageSet) -> ImageSet:
    """Those of the images that have a class; how many have none is printed where some have."""
    labelled = images.with_labels()
    if 0 < len(labelled) < len(images):
        print(
            f"{images.name}, {images.split}: {len(images) - len(labelled):,} of {len(images):,} "
            f"images have no label, and are left out of kNN and of what else needs labels."
        )
    return labelled


def resolve_path(dataset: str) -> str:
    """An existing path made absolute: later stages may run in another folder."""
    path = expand(dataset)
    return str(path.resolve()) if dataset not in NAMES and os.path.exists(path) else dataset


def resolve_paths(config: Reader) -> Reader:
    """The configuration with what it reads by path (images, `classes`, a recipe of the user's own,
    runs) as `resolve_path` has it."""
    names = {"dataset", "classes"} & type(config).model_fields.keys()
    paths: dict[str, Any] = {n: resolve_path(path) for n in names if (path := getattr(config, n))}
    if several := getattr(config, "datasets", ()):
        paths["datasets"] = tuple(map(resolve_path, several))
    if not (config.recipes / f"{config.preset}.toml").is_file():
        paths["preset"] = resolve_path(config.preset)
    for name in ("vae", "run", "witness", "continue_from"):
        if os.sep in (value := getattr(config, name, None) or ""):
            paths[name] = os.path.abspath(expand(value))
    return config.replace(**paths)


def torch_device(name: str) -> torch.device:
    """The device that a configuration names; `auto` is a CUDA GPU where there is one, else the CPU.

    Raises:
        ConfigError: this machine lacks it.
    """
    available = ["auto", "cpu"] + ["cuda"] * torch.cuda.is_available()
    available += ["mps"] * torch.backends.mps.is_available()
    if name not in available:
        raise ConfigError(f"device must be one of {', '.join(available)}, and is {quote(name)}.")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def meet(config: Any) -> None:
    """Wait for the other processes that the launcher started (torchrun), if there are any.

    Raises:
        ConfigError: there are not as many as `accelerate launch` or the configuration asks for.
    """
    started = int(os.environ.get("WORLD_SIZE", 1))
    # Without GPUs `accelerate launch --num_processes n` starts one process, and says nothing.
    if {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys() and not any(
        name.endswith(("WORLD_SIZE", "PMI_SIZE")) for name in os.environ
    ):
        raise ConfigError(
            "num_processes of accelerate launch is more than 1, and it started 1 process: on "
            "processors write torchrun --nproc_per_node=2 in place of accelerate launch."
        )
    if getattr(config, "processes", 1) not in (1, started):
        raise ConfigError(
            f"processes={config.processes}, but this is 1 of {started}: leave it out, or run "
            f"`python -m idaa_lib.train {config.stage} processes={config.processes} …`, which "
            f"starts them."
        )
    if started == 1:
        return
    device, here = torch_device(config.device), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device.type == "cuda" and here > (gpus := torch.cuda.device_count()):
        raise ConfigError(
            f"{here} processes need a GPU each, and this machine has {gpus}: start fewer."
        )
    from accelerate import PartialState  # takes a moment to import

    PartialState(cpu=device.type == "cpu")


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Whether `fp32`, `bf16` or `auto` (bf16 where it is native) means bf16 on this device."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    # Emulated bf16 is slower than fp32: only CPUs that multiply it natively gain.
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type == "cpu" and bool(native)


def describe(
    device: torch.device, precision: str, images: ImageSet | None = None
) -> dict[str, Any]:
    """What a run is made with, as JSON values for the record: versions, hardware, commit, data."""
    about: dict[str, Any] = {
        "versions": versions(),
        "hardware": hardware(device),
        "device": str(device),
        "precision": precision,
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        "commit": _commit(),
    }
    if images is not None:
        names = ("name", "split", "n", "size", "fingerprint", "mean", "std", "skipped", "notes")
        about["dataset"] = {name: getattr(images, name) for name in names}
        about["dataset"]["classes"] = len(images.classes)
    return about


@functools.cache
def versions() -> dict[str, str]:
    """Python's version and those of the packages that results depend on, by name."""
    by_name = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            by_name[name] = version(name)
        except PackageNotFoundError:
            by_name[name] = "not installed"
    return by_name


def hardware(device: torch.device | None = None) -> str:
    """The GPU in use, else the processor and the cores that this process may use.

    With family and model where Linux tells: virtual machines of one name can differ in them.
    """
    if (device or torch_device("auto")).type == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        first = info.read_text(encoding="utf-8").partition("\n\n")[0]  # a paragraph for each
        facts = dict(re.findall(r"(\S.*?)\s*: (.*)", first))
        name = facts.get("model name", name)
        if "cpu family" in facts:
            name += f" (family {facts['cpu family']}, model {facts['model']})"
    return f"{name}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"


@functools.cache
def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        output = subprocess.check_output(
            command, cwd=Path(__file__).parent, stderr=subprocess.DEVNULL, timeout=10
        )
        return output.decode().strip()
    return None


def birth(pid: int) -> float | None:
    """When the process began, in seconds since 1970; None where there is none, or a zombie."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except (psutil.Error, ValueError, OverflowError):
        return None


def is_alive(pid: int, since: float | None) -> bool:
    """Whether the process `pid` that began at `since` lives: a later one may have its number."""
    start = birth(pid)
    # The system's clock may have been set meanwhile, which moves these times a little.
    return start is not None and (since is None or abs(start - since) < 5)


def lacks_memory(error: BaseException) -> bool:
    """Whether the error says that the memory of the machine, or of a GPU, did not suffice."""
    words = r"out of memory|can.t allocate memory|cannot allocate memory|bad_alloc"
    kinds = MemoryError, torch.OutOfMemoryError
    by_words = isinstance(error, RuntimeError | OSError) and re.search(words, str(error), re.I)
    return isinstance(error, kinds) or bool(by_words)


@contextlib.contextmanager
def repeat(seconds: float, work: Callable[[], object]) -> Iterator[None]:
    """Inside, `work` is done every so many seconds, by a thread."""
    over = threading.Event()

    def tick() -> None:
        while not over.wait(seconds):
            work()

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class AnyProcess:
    """A process number that differs from none. ipykernel ends a kernel at once where its parent is
    no longer the process that started it (papermill, JupyterLab); a training saves first."""

    def __ne__(self, other: object) -> bool:
        return False


@contextlib.contextmanager
def signals() -> Iterator[Callable[[], str | None]]:
    """A function that names the first signal that came, None while there is none: Ctrl-C, SIGTERM,
    SIGHUP and the end of a kernel's driver are noted, not raised; a second Ctrl-C raises."""
    names: list[str] = []
    parent, driver = None, os.getppid()

    def note(number: int, frame: Any) -> None:
        if names and number == signal.SIGINT:
            raise KeyboardInterrupt
        names.append(signal.Signals(number).name)

    def first() -> str | None:
        if parent is not None and os.getppid() != driver:
            names.append("the process that ran this notebook ended")
        return names[0] if names else None

    if threading.current_thread() is not threading.main_thread():
        yield first  # Python delivers signals to the main thread only
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
        numbers.append(signal.SIGHUP)
    handlers = {number: signal.signal(number, note) for number in numbers}
    kernel = sys.modules.get("ipykernel.kernelapp")
    poller: Any = getattr(kernel.IPKernelApp._instance, "poller", None) if kernel else None
    parent = getattr(poller, "parent_pid", None)
    if parent is not None:
        poller.parent_pid = AnyProcess()
    try:
        yield first
    finally:
        if parent is not None:
            poller.parent_pid = parent
        for number, handler in handlers.items():
            signal.signal(number, handler)

"""A notebook under papermill, in a kernel of its own: over local sockets, on GPUs of its own.

Of kernels over TCP two that start together may take one port; a socket in a folder is nobody
else's. The kernel's standard error goes to a file, so that what a crash leaves there is kept.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import re
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from idaa_lib.runs import Run, RunError
from idaa_lib.runs.directory import STARTED_BY
from idaa_lib.runs.files import clear_drafts
from idaa_lib.runs.machine import describe, torch_device

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
# Where a kernel was when a signal ended it goes to a file of its own: standard error goes through a
# thread of the kernel, which ends with it.
TRACE = "--IPKernelApp.exec_lines=__import__('faulthandler').enable(open({path!r}, 'a'))"
# Seconds that a kernel may take to start, where many start at once from a slow disk.
PATIENCE = 300
# Characters that a temporary folder's path may have: a socket's has at most 107 (macOS: 103), and
# `/idaa-1234567890/.abcdefgh.1234567/kernel-ipc-5` follows.
SHORT = 50


def execute(notebook: str, parameters: Mapping[str, Any], output: Path) -> Path:
    """Run `notebooks/<notebook>.ipynb` under papermill; `output` appears when it has succeeded.

    Until then `<name>.running.ipynb` stands there, and if it fails `<name>.failed.ipynb`.
    `parameters` are JSON values. A kernel that dies or does not start is tried once again.

    Raises:
        RunError: a failing cell, or a name that the notebook's configuration lacks.
    """
    import papermill
    from papermill.exceptions import PapermillExecutionError

    # It warns of each knob, which the notebook itself accepts or refuses; what it reports as an
    # error is raised besides.
    logging.getLogger("papermill").setLevel(logging.CRITICAL)
    source, device = FOLDER / f"{notebook}.ipynb", str(parameters.get("device", "auto"))
    processes = parameters.get("processes")
    output.parent.mkdir(parents=True, exist_ok=True)
    running, failed = find_leftovers(output)
    trace = output.with_name(f"{output.stem}.trace.txt")
    for attempt in (1, 2):
        with (
            _gpu(device, processes if isinstance(processes, int) else 1) as variables,
            trace.open("wb") as stderr,
        ):
            try:
                with _kernel(stderr, variables) as kernel:
                    papermill.execute_notebook(
                        str(source), str(running), dict(parameters), kernel_name="python3",
                        progress_bar=False, km=kernel, start_timeout=PATIENCE,
                    )  # fmt: skip
                break
            except PapermillExecutionError as error:
                running.replace(failed)
                trace.unlink()
                raise RunError(f"{source.name} failed: {error.evalue} (see {failed})") from None
            except Exception as error:
                # The kernel, not the notebook: killed for memory, a crash in compiled code.
                if attempt == 2:
                    with contextlib.suppress(FileNotFoundError):
                        running.replace(failed)
                    raise RunError(
                        f"The kernel of {source.name} {_describe_end(error, trace)}, 2 times; "
                        f"what it had saved is kept in {output.parent}."
                    ) from error
    _record(running)
    running.replace(output)
    for path in (failed, trace):
        path.unlink(missing_ok=True)
    return output


def find_leftovers(output: Path) -> tuple[Path, Path]:
    """Where a notebook stands that has not come to its end, and one that failed."""
    return output.with_name(f"{output.stem}.running.ipynb"), output.with_suffix(".failed.ipynb")


class _Death(RuntimeError):
    """A kernel ended by itself; its argument is the status that its process gave."""


@contextlib.contextmanager
def _kernel(stderr: Any, variables: Mapping[str, str]) -> Iterator[Any]:
    """A kernel that has started; at the end it is shut down.

    Raises:
        _Death: it ended by itself.
    """
    from jupyter_client.manager import AsyncKernelManager
    from jupyter_core.utils import run_sync

    environment = {**os.environ, STARTED_BY: "sweep", **variables}
    place = _folder("idaa")
    clear_drafts(place)  # of processes that were killed
    with tempfile.TemporaryDirectory(f".{os.getpid()}", ".", place) as folder:
        file = os.path.join(folder, "kernel.json")
        kernel = AsyncKernelManager(kernel_name="python3", transport="ipc", connection_file=file)
        arguments = [TRACE.format(path=stderr.name), "--HistoryManager.hist_file=:memory:"]
        run_sync(kernel.start_kernel)(
            cwd=str(FOLDER), env=environment, stderr=stderr, extra_arguments=arguments
        )
        provisioner: Any = kernel.provisioner
        process = provisioner.process
        try:
            yield kernel
        except Exception as error:
            if (status := process.poll()) is not None:
                raise _Death(status) from error
            raise
        finally:
            run_sync(kernel.shutdown_kernel)(now=process.poll() is not None)


def _describe_end(error: Exception, trace: Path) -> str:
    """How a kernel ended, and where it was then, where its last words say it."""
    if not isinstance(error, _Death):
        return f"did not answer ({type(error).__name__}: {error})"
    (status,) = error.args
    how = f"ended with status {status}"
    if status < 0:
        how = f"was killed by {signal.Signals(-status).name}"
        how += " (as the system does where memory runs out)" * (status == -signal.SIGKILL)
    words = trace.read_text(encoding="utf-8", errors="replace")
    place = re.search(r'Current thread.*\n  File "(.*)", line (\d+) in (\S+)', words)
    return how + (f" in {place[3]} ({place[1]}:{place[2]}; see {trace})" if place else "")


def _folder(name: str) -> Path:
    """A folder of this user for temporary files, made: under /tmp where a job's own temporary
    folder has too long a path for a socket."""
    root = tempfile.gettempdir()
    folder = Path(root if len(os.fsencode(root)) <= SHORT else "/tmp") / f"{name}-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


@contextlib.contextmanager
def _gpu(device: str, processes: int = 1) -> Iterator[dict[str, str]]:
    """CUDA_VISIBLE_DEVICES of GPUs that no other kernel of this user has on this machine, one for
    each of `processes`, where there are several; where too few are free this waits for them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = range(torch.cuda.device_count()) if visible is None else visible.split(",")
    names = [name for gpu in gpus if (name := str(gpu).strip())]
    if device not in ("auto", "cuda") or len(names) < 2:
        yield {}
        return
    folder, count = _folder("idaa-gpus"), min(processes, len(names))
    while True:
        with contextlib.ExitStack() as stack:
            own: list[str] = []
            for name in names:
                lock = FileLock(folder / re.sub(r"\W", "_", name))
                with contextlib.suppress(Timeout):
                    stack.enter_context(lock.acquire(timeout=0))
                    own.append(name)
                if len(own) == count:
                    yield {"CUDA_VISIBLE_DEVICES": ",".join(own)}
                    return
        # All are given back, so that two that want several do not wait for one another.
        time.sleep(random.uniform(0.05, 0.2))


def describe_software(about: Mapping[str, Any]) -> dict[str, Any]:
    """The rows of what made a notebook, of what `describe` gives: versions, hardware, commit."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return {"software": versions} | {key: about.get(key) for key in ("hardware", "commit")}


def _record(notebook: Path) -> None:
    """Add a cell to an executed notebook: what made it."""
    import nbformat

    about = Run(notebook.parent).environment or describe(torch_device("auto"), "no")
    rows = describe_software(about)
    for data in [about[key] for key in ("dataset",) if key in about] + about.get("datasets", []):
        rows[f"images of {data['name']}"] = data["fingerprint"]
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    content = nbformat.read(notebook, as_version=4)
    text = "\n".join(["## Made with", "", "| | |", "|---|---|", *lines])
    content.cells.append(nbformat.v4.new_markdown_cell(text, id="made-with"))
    nbformat.write(content, notebook)

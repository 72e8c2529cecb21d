"""The runs that a notebook uses; a run's own notebook, and where JupyterLab opens it."""

from __future__ import annotations

import contextlib
import html
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from idaa_lib import kernels, runs
from idaa_lib.configs import Config, TrainingConfig
from idaa_lib.identity.networks import STARTER_NOTE, UNTRAINED, name_runs
from idaa_lib.lab.kernel import is_attended
from idaa_lib.results import full_name
from idaa_lib.runs import Run, RunError
from idaa_lib.runs.files import replace
from idaa_lib.runs.machine import describe, torch_device
from idaa_lib.train import stages

C = TypeVar("C", bound=Config)
# Fields that name a run → how it is found.
USES: dict[str, Callable[[str], Run]] = {
    "run": runs.encoder, "witness": runs.encoder, "vae": lambda name: runs.get("vae", name),
}  # fmt: skip


def choose(config: C, **needs: Any) -> C:
    """The configuration with the runs that it uses named; prints what they are, how to choose
    others, and which ones cannot be used; where no person sits in front of the kernel, also
    versions, hardware and commit.

    Args:
        needs: values that an encoder must have where None chooses it.
    Raises:
        RunError: there is no such run. ConfigError: the images of a training cannot be read.
    """
    values: Any = config
    lines, left_out = dict[str, str](), list[str]()
    if isinstance(values, TrainingConfig):
        values, own = stages.settle(values)
        lines["this run"] = f"{full_name(own, values)} ({own.state['state']})"
    elif "vae" in type(values).model_fields:
        values = name_runs(values)
    else:
        run = runs.encoder(values.run) if values.run else runs.get("ssl", None, **needs)
        values = values.replace(run=run.reference)
    names = {field: name for field in USES if (name := getattr(values, field, None))}
    for field, name in names.items():
        if name == UNTRAINED:
            lines[field] = "a ResNet-18 before training"
            continue
        run = USES[field](name)
        lines[field] = full_name(run)
        runs.usable(run.stage, left_out)
        if field == "run" and "vae" not in names and (vae := getattr(run.config, "vae", None)):
            with contextlib.suppress(RunError):  # it is gone, and nothing here needs it
                lines["its vae"] = full_name(runs.get("vae", vae))
    text = [f"{field}: {line}" for field, line in lines.items()]
    text += [STARTER_NOTE] * ("starter" in names.values())
    if names:
        field, name = next(iter(names.items()))
        text.append(
            f"To use another one, write the last eight characters of its id into the parameters, "
            f'as in {field} = "{name[-8:]}"; notebook 00 lists all runs.'
        )
    if not is_attended():  # the record of a copy that papermill or nbconvert executes
        about = kernels.describe_software(describe(torch_device("auto"), "no"))
        text.append("; ".join(f"{name}: {value}" for name, value in about.items()))
    print(*text, *runs.report_left_out(left_out), sep="\n")
    return values


def notebook_of(run: Run) -> Path:
    """The run's notebook; where none was executed for it, its stage's with the run's parameters.

    Raises:
        RunError: the run's configuration is damaged.
    """
    import nbformat
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    path = run.path / "notebook.ipynb"
    if not path.exists():
        stage = load_notebook_node(str(kernels.FOLDER / f"{runs.NOTEBOOKS[run.stage]}.ipynb"))
        filled = parameterize_notebook(stage, runs.parameters(run.config))
        replace(path, nbformat.writes(filled).encode())
    return path


def link(run: Run, path: Path) -> str:
    """HTML that opens `path`; where this kernel's server cannot, it says where the file lies."""
    from jupyter_server.serverapp import list_running_servers

    # The kernel's own server: a page has no right to the others'. Voilà's has no JupyterLab.
    parent = os.environ.get("JPY_PARENT_PID")
    voila = os.environ.get("SERVER_SOFTWARE", "").startswith("voila")
    for server in () if voila else list_running_servers():
        root = Path(server["root_dir"]).resolve()
        if str(server["pid"]) == parent and path.resolve().is_relative_to(root):
            inside = path.resolve().relative_to(root).as_posix()
            address = html.escape(f"{server['base_url']}lab/tree/{quote(inside)}")
            return f'<a href="{address}" target="_blank">{html.escape(run.id)} ↗</a>'
    return f"<code>{html.escape(str(path))}</code>"

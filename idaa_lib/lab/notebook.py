"""A run's notebook, and where JupyterLab opens it."""

from __future__ import annotations

import html
import os
from pathlib import Path
from urllib.parse import quote

from idaa_lib import runs, sweeps
from idaa_lib.runs import Run


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
        stage = load_notebook_node(str(sweeps.FOLDER / f"{runs.NOTEBOOKS[run.stage]}.ipynb"))
        filled = parameterize_notebook(stage, runs.parameters(run.config))
        draft = path.with_suffix(f".{os.getpid()}")
        nbformat.write(filled, draft)
        os.replace(draft, path)
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

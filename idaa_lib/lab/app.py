"""`make app`: the ε explorer and the runs page as web pages, for people who write no code.

Voilà runs the cells tagged `app` of notebooks 02 and 00, in a kernel for each visitor, and shows
what they make, never their code. It listens on this machine only, asks for a token that is new at
each start (it is in the address that is printed, and on no command line), and needs no network.

    python -m idaa_lib.lab.app --port 8866     # the next free port where that one is taken
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import secrets
import shutil
import sys
from pathlib import Path
from typing import Any

# The kernel is this environment's, also where the user has a python3 of their own at home. Read
# when Jupyter is imported.
os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")

from voila.app import Voila
from voila.paths import collect_template_paths

from idaa_lib import sweeps
from idaa_lib.configs import UserError
from idaa_lib.runs import outputs_root, write_json

# Page → its notebook, its name and what it is for.
PAGES = {
    "01_explorer": (
        "02_decompose",
        "ε explorer",
        "drag ε and watch the augmented images, and how much of their identity is left",
    ),
    "00_runs": (
        "00_start_here",
        "Runs",
        "what was trained here, with its curves, side by side",
    ),
}
# Seconds without a page after which a kernel ends: a browser that crashed closes nothing.
IDLE = 600


def build(folder: Path) -> Path:
    """Write the pages and Voilà's templates; the folder of pages, which is what is served.

    Raises:
        UserError: a notebook has no cell for the app.
    """
    shutil.rmtree(folder, ignore_errors=True)
    served = folder / "pages"
    served.mkdir(parents=True)
    for page, (notebook, name, _) in PAGES.items():
        content = json.loads((sweeps.FOLDER / f"{notebook}.ipynb").read_text())
        write_json(served / f"{page}.ipynb", _page(content, notebook, name))
    _templates(folder / "templates")
    return served


def _page(content: dict[str, Any], notebook: str, name: str) -> dict[str, Any]:
    """A notebook's cells for the app, below links to all pages."""
    cells = [c for c in content["cells"] if "app" in c["metadata"].get("tags", [])]
    if not cells:
        raise UserError(f"No cell of notebooks/{notebook}.ipynb is tagged 'app'.")
    links = " · ".join(f"[{told}]({page}.ipynb)" for page, (_, told, _) in PAGES.items())
    top = {"cell_type": "markdown", "id": "app-links", "metadata": {}, "source": links}
    for cell in cells:
        if cell["cell_type"] == "markdown":
            cell["source"] = _links("".join(cell["source"]))
    metadata = content["metadata"] | {"title": f"{name} · IDAA workbench"}
    return content | {"cells": [top, *cells], "metadata": metadata}


def _links(markdown: str) -> str:
    """A link to a notebook leads to its page, or is plain text where it has none."""
    pages = {notebook: page for page, (notebook, _, _) in PAGES.items()}

    def link(found: re.Match[str]) -> str:
        text, notebook = found.groups()
        return f"[{text}]({pages[notebook]}.ipynb)" if notebook in pages else text

    return re.sub(r"\[([^]]*)\]\((\w+)\.ipynb\)", link, markdown)


def _templates(folder: Path) -> None:
    """Voilà's own templates without their links to a CDN, which a closed network would wait for,
    and a list of the pages with their names."""
    roots = [Path(path) for path in collect_template_paths(["voila"], "lab")]
    copied = {"index.html.j2": "index.html.j2", "page.html": "voila/templates/base/page.html"}
    for name, target in copied.items():
        found = [root / name for root in roots if (root / name).exists()]
        # The last is the base that the others extend by this path.
        source = found[-1] if "/" in target else found[0]
        text = "".join(line for line in source.open() if "//cdn." not in line)
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        (folder / target).write_text(text)
    rows = "".join(
        f'<li><a href="{{{{ base_url }}}}voila/render/{page}.ipynb">{name}</a>: {what}</li>'
        for page, (_, name, what) in PAGES.items()
    )
    (folder / "tree.html").write_text(
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>IDAA workbench</title>'
        '<link rel="icon" href="data:;base64,="></head>'
        '<body style="font:16px/1.6 system-ui,sans-serif;max-width:46em;margin:4em auto">'
        f"<h1>IDAA workbench</h1><ul>{rows}</ul></body></html>\n"
    )


class App(Voila):
    """Voilà with what must not depend on a user's own configuration files."""

    def serve(self, served: Path, port: int) -> None:
        """Until Ctrl-C or SIGTERM, which end the kernels too."""
        self.initialize([])  # reads configuration files; what follows has the last word
        self.log.setLevel(logging.WARNING)
        self.root_dir, self.ip, self.port = str(served), "127.0.0.1", port
        self.token = secrets.token_urlsafe(24)
        self.open_browser = True  # so that `launch_browser` is called, which only prints
        self.template_paths.insert(0, str(served.parent / "templates"))
        shown = self.voila_configuration
        shown.strip_sources, shown.classic_tree = True, True
        shown.allow_template_override = "NO"
        shown.show_tracebacks = True  # a user's mistake is one sentence here, and worth reading
        self.config.MappingKernelManager.cull_idle_timeout = IDLE
        self.start()

    def launch_browser(self) -> None:
        """Voilà calls it once it listens, and the port is known."""
        address = f"http://{self.ip}:{self.port}{self.base_url}?token={self.token}"
        print(f"The IDAA workbench is at\n\n    {address}\n\nCtrl-C ends it.", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m idaa_lib.lab.app", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--port", type=int, default=8866, help="the first one tried (%(default)s)")
    port = parser.parse_args().port
    try:
        App().serve(build(outputs_root() / "app"), port)
    except UserError as error:
        print(f"The app did not start: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

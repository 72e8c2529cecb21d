"""What this kernel knows of the pages in front of it, how a cell that waits stays answerable, where
errors of callbacks are shown, and what visitors do not see.

A kernel runs one request after another, so while a cell waits it hears nothing else; ipykernel 7
has threads beside it (subshells), which JupyterLab uses for widgets. Elsewhere, and where a later
ipykernel has other insides, all here does nothing: a cell that waits is then interrupted by hand.
"""

from __future__ import annotations

import contextlib
import contextvars
import html
import os
import re
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qs

import ipywidgets as widgets
import traitlets
from IPython import get_ipython

from idaa_lib.configs import UserError
from idaa_lib.data.cached import data_root
from idaa_lib.runs import Stopped, outputs_root

T = TypeVar("T")
# The styles of all our widgets, for the page that shows one.
_CSS = (Path(__file__).parent / "lab.css").read_text(encoding="utf-8")
SHEET = f'<style class="idaa-sheet">{_CSS}</style>'


def _kernel() -> Any:
    """None outside of Jupyter."""
    return getattr(get_ipython(), "kernel", None)


def _request() -> dict[str, Any]:
    """The message that the running cell answers to."""
    kernel = _kernel()
    return (kernel.get_parent("shell") if kernel is not None else None) or {}


def is_attended() -> bool:
    """Whether a person sits in front of this kernel: the page that runs the cell can be asked for
    input, as JupyterLab's can, and papermill's, nbclient's and Voilà's cannot.

    There a `Stopped` is from now on a line of plain text, for no error happened; the cells below do
    not run all the same. (Papermill's exit status needs the error.)
    """
    if person := bool(_request().get("content", {}).get("allow_stdin")):
        get_ipython().set_custom_exc((Stopped,), lambda shell, kind, stop, *_, **__: print(stop))
    return person


def query() -> dict[str, str] | None:
    """What the address of Voilà's page asks for; None where this kernel serves no such page."""
    text = os.environ.get("QUERY_STRING")
    return None if text is None else {name: last for name, (*_, last) in parse_qs(text).items()}


def apart(act: Callable[[], T]) -> T:
    """Call `act` so that the widgets it makes and changes can be answered while a cell runs.

    JupyterLab sends what is done to a widget to a subshell; but ipykernel 7.4 redirects it to
    wherever the widget was last changed in answer to a request, which is the cell that waits. What
    is changed in answer to no request it leaves alone.
    """
    context = contextvars.copy_context()
    parent = getattr(_kernel(), "_shell_parent", None)
    if isinstance(parent, contextvars.ContextVar):
        context.run(parent.set, {})
    return context.run(act)


@contextlib.contextmanager
def newcomer() -> Iterator[threading.Event]:
    """An event that is set when a page connects that is not the one which runs this cell: the same
    one after a reload, or another tab. Until the cell ends it will get no answer."""
    came = threading.Event()
    mine = _request().get("header", {}).get("session")
    session = getattr(_kernel(), "session", None)
    if session is None:
        yield came
        return
    plain = session.deserialize

    def deserialize(*args: Any, **kwargs: Any) -> dict[str, Any]:
        message = plain(*args, **kwargs)  # ipykernel reads all requests in a thread of their own
        header = message["header"]
        if header["msg_type"] == "kernel_info_request" and header.get("session") != mine:
            came.set()
        return message

    session.deserialize = deserialize
    try:
        yield came
    finally:
        del session.deserialize


@contextlib.contextmanager
def guard(status: widgets.HTML) -> Iterator[None]:
    """A context, and a decorator of callbacks, whose errors no notebook shows: they are written
    into `status`, a `UserError` as its sentence, any other as its traceback; None comes back."""
    try:
        yield
    except UserError as error:
        status.value = f"<b>{html.escape(str(error))}</b>"
    except Exception:
        status.value = f"<pre>{html.escape(traceback.format_exc())}</pre>"


# A path from a root of this machine, but for its last part. A part may have spaces between quotes
# and where a \ follows, which is rare in prose.
_PATH = re.compile(
    r"""(?:^|(?<=[\s'"(\[{=>,;]))(?:
        (?:[A-Za-z]:|\\)\\(?:[^<>:"'/\\]+\\)*
      | (?:(?<=['"])|(?<=&\#x27;|&quot;))/{1,2}(?:[^<>"'&/]+/)*
      | (?:…|file://|~[\w.-]*|[A-Za-z]:)?/{1,2}(?:[^\s<>"'/\\]+[/\\])*
    )(?=[^\s<>"'/\\])""",
    re.VERBOSE,
)


def hide_paths(text: str) -> str:
    """The text with the last part alone of each path from the root of this machine."""
    # Known places first: their names may have spaces.
    places = {str(place) for place in (outputs_root(), data_root(), Path.home(), Path.cwd())}
    for place in sorted(places | {*map(html.escape, places)}, key=len, reverse=True):
        if len(place) > 1:
            text = re.sub(rf"{re.escape(place)}(?!\w)", "…", text)
    return _PATH.sub("…/", text)


class VisitorsText(widgets.HTML):
    """HTML in which no path of this machine stands."""

    @traitlets.validate("value")
    def _hide(self, proposal: Any) -> str:
        return hide_paths(proposal["value"])

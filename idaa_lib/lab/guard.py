"""Errors in a widget's callback are invisible in a notebook: this shows them where they happen."""

from __future__ import annotations

import functools
import html
import traceback
from collections.abc import Callable
from typing import Any

import ipywidgets as widgets

from idaa_lib.configs import UserError


def guarded(status: widgets.HTML) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator of callbacks: what they raise is written into `status`, and None comes back.

    A `UserError` shows as its sentence, anything else as its traceback.
    """

    def decorate(act: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(act)
        def safe(*args: Any, **kwargs: Any) -> Any:
            try:
                return act(*args, **kwargs)
            except UserError as error:
                status.value = f"<b>{html.escape(str(error))}</b>"
            except Exception:
                status.value = f"<pre>{html.escape(traceback.format_exc())}</pre>"
            return None

        return safe

    return decorate

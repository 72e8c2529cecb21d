"""Classes by the name that configurations call them: methods, adversaries, backbones.

A class of the user's own is known by the file, or the notebook cell, that registers it: its text
then is part of the identity of every run that uses the class.
"""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# What is chosen → its classes by name.
CHOICES: dict[str, dict[str, Any]] = {"method": {}, "adversary": {}, "backbone": {}}
# Of a class that is not ours: the file or cell that registered it, and the text that it had.
SOURCES: dict[Any, tuple[str, str]] = {}
_LIBRARY = Path(__file__).parent


def register(
    choice: str, name: str, base: type | None = None, options: type = object
) -> Callable[[Any], Any]:
    """A decorator that makes a class available as `choice=name` in every configuration.

    Args:
        base, options: what the class and its `Options` must be subclasses of.
    Raises:
        TypeError: they are not, or a knob has no default.
        ValueError: the name is that of a class of the library.
    """

    def enter(kind: Any) -> Any:
        own, classes = getattr(kind, "Options", object), (base or object, options)
        if base and not (isinstance(kind, type) and all(map(issubclass, (kind, own), classes))):
            raise TypeError(
                f"{choice}={name!r} must be a subclass of idaa_lib.{base.__name__}, and its class "
                f"Options, if it has its own, one of idaa_lib.{options.__name__}."
            )
        for knob, field in getattr(own, "model_fields", {}).items():
            if field.is_required():
                raise TypeError(f"{choice}={name!r} has a knob {knob!r} without a default.")
        file = sys._getframe(1).f_code.co_filename
        if not Path(file).is_relative_to(_LIBRARY):
            old = CHOICES[choice].get(name)
            if old is not None and old not in SOURCES:
                raise ValueError(f"{choice}={name!r} is the library's own: choose another name.")
            SOURCES[kind] = file, _text(file)
        CHOICES[choice][name] = kind
        return kind

    return enter


def source(kind: Any) -> str | None:
    """The text of the file or cell that registered a class of the user's own; None for ours.

    Raises:
        ValueError: the file was edited since: the class does what the text said before.
    """
    if kind not in SOURCES:
        return None
    file, text = SOURCES[kind]
    if _text(file) != text:
        raise ValueError(
            f"{file} was edited since {kind.__name__} was imported from it: restart the kernel, or "
            f"importlib.reload its module, so that what runs is what the file says."
        )
    return text


def _text(file: str) -> str:
    linecache.checkcache(file)
    return "".join(linecache.getlines(file))

"""What many runs share is looked at once while they are looked for: images, configurations."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

T = TypeVar("T")
# What `remember` has seen; None outside of it.
_values: ContextVar[dict[Any, Any] | None] = ContextVar("values", default=None)


@contextlib.contextmanager
def remember() -> Iterator[None]:
    """Inside, what `once` is asked for is looked at once. One inside another shares its values."""
    values = _values.get()
    token = _values.set({} if values is None else values)
    try:
        yield
    finally:
        _values.reset(token)


def once(key: Any, look: Callable[[], T]) -> T:
    """What `look` gives; inside of `remember` what it gave first, by a key that can be hashed."""
    values = _values.get()
    if values is None:
        return look()
    if key not in values:
        values[key] = look()
    return values[key]

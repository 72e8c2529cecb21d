"""Work that must not hold up a slider: the newest request of each kind, in one thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Background:
    """Runs the newest request of each kind, in the order of `kinds`.

    A newer request of a kind takes the place of one that waits. Work that returns True has more to
    do and is called again, after whatever is more urgent. Before `rest` seconds have passed since
    the last `disturb()` nothing starts: two threads of tensor arithmetic on the same cores slow
    each other down many times over, and the picture comes first.
    """

    def __init__(self, *kinds: str, rest: float = 0.08) -> None:
        self._waiting: dict[str, Callable[[], object] | None] = dict.fromkeys(kinds)
        self._rest, self._quiet_from = rest, 0.0
        self._change = threading.Condition()
        self._current: str | None = None
        self._thread: threading.Thread | None = None

    def request(self, kind: str, work: Callable[[], object]) -> None:
        """Have `work` done, which handles its own errors."""
        with self._change:
            self._waiting[kind] = work
            if self._thread is None:
                # No daemon: one that the interpreter ends inside torch would abort the process.
                self._thread = threading.Thread(target=self._serve)
                self._thread.start()

    def disturb(self) -> None:
        """A person moves something now."""
        self._quiet_from = time.monotonic() + self._rest

    def settle(self, *kinds: str, timeout: float = 60.0) -> bool:
        """Wait until all requests of these kinds (of all) are done; False: it took too long."""
        kinds = kinds or tuple(self._waiting)

        def idle() -> bool:
            return self._current not in kinds and not any(self._waiting[kind] for kind in kinds)

        with self._change:
            return self._change.wait_for(idle, timeout)

    def _serve(self) -> None:
        while True:
            while (seconds := self._quiet_from - time.monotonic()) > 0:
                time.sleep(seconds)
            with self._change:
                kind, work = next(((k, w) for k, w in self._waiting.items() if w), ("", None))
                # Without work the thread ends, and its team of OpenMP threads with it: a team that
                # only exists makes every parallel loop of the main thread half as fast again.
                if work is None or not threading.main_thread().is_alive():
                    self._thread = None
                    return
                self._waiting[kind], self._current = None, kind
            more = work()
            with self._change:
                if more and self._waiting[kind] is None:
                    self._waiting[kind] = work
                self._current = None
                self._change.notify_all()

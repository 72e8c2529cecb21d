"""Work that must not hold up a slider: the newest request of each kind, in one thread."""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections.abc import Callable


class Background:
    """Runs what it was last asked for, kind by kind, in the order of `kinds`.

    A newer request of a kind takes the place of one that waits. Work that returns True has more to
    do and is called again, after whatever is more urgent. Before `rest` seconds have passed since
    the last `disturb()` nothing starts: two threads of tensor arithmetic on the same cores slow
    each other down many times over, and the picture comes first.
    """

    def __init__(self, *kinds: str, rest: float = 0.08) -> None:
        self._waiting: dict[str, Callable[[], object] | None] = dict.fromkeys(kinds)
        self._rest, self._quiet_from = rest, 0.0
        self._news = threading.Condition()
        self._doing: str | None = None
        self._thread: threading.Thread | None = None
        self._ended = False
        # A thread that the interpreter ends inside torch would abort the whole process.
        atexit.register(_end, weakref.ref(self))

    def ask(self, kind: str, work: Callable[[], object]) -> None:
        """Have `work` done, which handles its own errors."""
        with self._news:
            self._waiting[kind] = work
            self._news.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, daemon=True)
                self._thread.start()

    def disturb(self) -> None:
        """A person moves something now."""
        self._quiet_from = time.monotonic() + self._rest

    def settle(self, *kinds: str, timeout: float = 60.0) -> bool:
        """Wait until what was asked of these kinds (of all) is done; False: it took too long."""
        kinds = kinds or tuple(self._waiting)

        def done() -> bool:
            return self._doing not in kinds and not any(self._waiting[kind] for kind in kinds)

        with self._news:
            return self._news.wait_for(done, timeout)

    def _asked(self) -> bool:
        return any(self._waiting.values())

    def _serve(self) -> None:
        while True:
            with self._news:
                self._doing = None
                self._news.notify_all()
                # Without work the thread ends, and its team of OpenMP threads with it: a team that
                # only exists makes every parallel loop of the main thread half as fast again.
                if not self._asked():
                    self._thread = None
                    return
            while (left := self._quiet_from - time.monotonic()) > 0:
                time.sleep(left)
            with self._news:
                if not self._asked():
                    continue
                kind, work = next((k, w) for k, w in self._waiting.items() if w)
                self._waiting[kind], self._doing = None, kind
            more = work()
            with self._news:
                if more and self._waiting[kind] is None and not self._ended:
                    self._waiting[kind] = work


def _end(background: weakref.ref[Background]) -> None:
    """At the end of the process: finish what is being done, and begin nothing."""
    if (found := background()) is not None and (thread := found._thread) is not None:
        with found._news:
            found._ended = True
            found._waiting = dict.fromkeys(found._waiting)
            found._news.notify_all()
        thread.join(10)

"""The skeleton of a stage: a plan (configuration → run), a body, a summary."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from idaa_lib.nets.processes import do_once
from idaa_lib.runs.directory import Run
from idaa_lib.runs.machine import meet


@dataclass(frozen=True)
class Plan:
    """What a run depends on, resolved before any work starts.

    Fields:
        config: with paths and runs named in full, as it will be stored.
        run: the directory that the configuration leads to.
        environment: what made the run, for the record (`machine.describe`).
        model: what rebuilds its network (`Run.model`); None where it has none.
    """

    config: Any
    run: Run
    environment: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    model: Mapping[str, Any] | None = field(default=None, kw_only=True)


def perform(plan: Plan, body: Callable[[Any], Mapping[str, Any]]) -> Run:
    """The finished run of `plan`: shown if it is there, else made by `body` under the run's lock.

    Args:
        body: writes into the run directory and returns the summary; `seconds` is added where it
            says none. Of several processes, all that are not the first get None for the writer.
    Raises:
        RunError: another process writes this run now. And what `body` raises: the run then counts
            as interrupted or failed.
    """
    run, config = plan.run, plan.config
    writer: Any = None
    with contextlib.ExitStack() as stack:

        def begin() -> bool:
            """Take the lock; whether there is nothing left to do."""
            nonlocal writer
            if run.finished:
                run.note_start(config)
                print(f"{run.id} is finished: showing its result.")
                return True
            writer = stack.enter_context(run.writing(config, plan.environment, plan.model))
            return run.finished  # another process was faster between the look and the lock

        meet(config)
        if do_once(begin):
            return run
        start = time.monotonic()
        summary = body(writer)
        seconds = time.monotonic() - start
        do_once(lambda: writer.finish({"seconds": seconds, **summary}))
    return run

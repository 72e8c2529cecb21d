"""The skeleton of a stage: a plan (configuration → run), a body, a summary."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from idaa_lib.configs import Config
from idaa_lib.runs.directory import Run, Writer


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


def perform(plan: Plan, body: Callable[[Writer], Mapping[str, Any]]) -> Run:
    """The finished run of `plan`: shown if it is there, else made by `body` under the run's lock.

    Args:
        body: writes into the run directory and returns the summary; `seconds` is added where it
            says none.
    Raises:
        RunError: another process writes this run now. And what `body` raises: the run then counts
            as interrupted or failed.
    """
    run = plan.run
    config: Config = plan.config
    if run.finished:
        run.note_start(config)
        print(f"{run.id} is finished: showing its result.")
        return run
    with run.writing(config, plan.environment, plan.model) as writer:
        if run.finished:  # another process was faster between the look and the lock
            return run
        start = time.monotonic()
        summary = body(writer)
        writer.finish({"seconds": time.monotonic() - start, **summary})
    return run

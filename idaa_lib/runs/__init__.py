"""Run directories, what is saved in them, and the machine that made them."""

from idaa_lib.runs.choice import encoder, find, get, report_left_out, usable
from idaa_lib.runs.directory import (
    CONFIGS,
    NOTEBOOKS,
    RESULTS_VERSION,
    Run,
    RunError,
    Stopped,
    Writer,
    command,
    every,
    list_runs,
    outputs_root,
    parameters,
    read_json,
    run_for,
    write_json,
)

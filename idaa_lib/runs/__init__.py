"""Run directories, what is saved in them, and the machine that made them."""

from idaa_lib.runs.directory import (
    CONFIGS,
    NOTEBOOKS,
    RESULTS_VERSION,
    Run,
    RunError,
    Stopped,
    Writer,
    command,
    encoder,
    every,
    find,
    get,
    outputs_root,
    parameters,
    read_json,
    run_for,
    write_json,
)

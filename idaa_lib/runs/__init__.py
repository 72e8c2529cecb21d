"""Run directories, what is saved in them, and the machine that made them."""

from idaa_lib.runs.choice import encoder, find, get, report_left_out, usable
from idaa_lib.runs.directory import (
    CONFIGS,
    NOTEBOOKS,
    RESULTS_VERSION,
    Run,
    Stopped,
    Writer,
    list_runs,
    outputs_root,
)
from idaa_lib.runs.files import RunError, read_json, write_json
from idaa_lib.runs.identity import command, parameters, run_for

"""Where a run computes and who follows it: its Accelerator, and the trackers that it logs to."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs

from idaa_lib.configs import ConfigError, TrainingConfig
from idaa_lib.runs import Run
from idaa_lib.runs.machine import meet, torch_device, uses_bf16

# What helps where a tracker does not start.
HELP = {
    "wandb": "run `wandb login` once, set WANDB_MODE=offline, ",
    "mlflow": "look at MLFLOW_TRACKING_URI, ",
}


def check_tracker(config: TrainingConfig) -> None:
    """Raises a ConfigError where the tracker is not installed."""
    if config.tracker not in ("none", *map(str, get_available_trackers())):
        name = config.tracker
        raise ConfigError(f"tracker={name!r} is not installed: pip install {name}.")


def make_accelerator(config: TrainingConfig, folder: Path) -> Accelerator:
    """Devices, precision and tracker of a run, as `config` and the launcher have them.

    Raises:
        ConfigError: the device or the tracker is not there, or not the processes.
    """
    device = torch_device(config.device)
    check_tracker(config)
    meet(config)
    # One kernel may train several runs, with settings of their own; Accelerate shares its state.
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="bf16" if uses_bf16(config.precision, device) else "no",
        log_with=None if config.tracker == "none" else config.tracker,
        project_dir=str(folder),
        # A step runs the network several times before one backward pass: buffers broadcast in
        # between would change what autograd saved.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )


def start_trackers(accelerator: Accelerator, config: TrainingConfig, run: Run) -> None:
    """Name the run and its configuration to the tracker, and keep its files in the run directory.

    Offline: WANDB_MODE=offline; MLflow writes below the run unless MLFLOW_TRACKING_URI says else.

    Raises:
        ConfigError: the tracker does not start: no login, no server.
    """
    if config.tracker == "none":
        return
    values = {k: v if isinstance(v, int | float | str) else str(v) for k, v in config}
    own = {
        "wandb": {"dir": str(run.path), "name": run.id},
        "mlflow": {"logging_dir": str(run.path / "mlruns"), "run_name": run.id},
    }
    try:
        accelerator.init_trackers("idaa", values, {config.tracker: own.get(config.tracker, {})})
    except Exception as error:  # each tracker has its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ConfigError(
            f"tracker={config.tracker!r} does not start ({reason}): {HELP.get(config.tracker, '')}"
            f"or leave tracker at 'none'; metrics.jsonl has the same figures."
        ) from error

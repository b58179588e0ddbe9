"""What of a run can be looked at before it waits in a queue: all of `task=preflight` without GPU and servers."""

import json
from collections.abc import Sequence
from typing import Any

from opd_trainer.config import Config
from opd_trainer.demo.prepare import folder_of, with_real_paths
from opd_trainer.run_record import plain
from opd_trainer.slurm.submit import ToRun
from opd_trainer.task.config import TrainTask
from opd_trainer.task.preflight import check_inputs, tell_placement

SEEN_BY_PREFLIGHT = (
    "cluster",
    "demo",
    "model",
    "teacher",
    "teachers",
    "opd",
    "data",
    "eval",
    "rollout",
    "megatron",
    "critic",
    "estimator",
)


def look_at(runs: Sequence[ToRun]) -> None:
    """Reads data, tokenizers and shapes of all runs, those that runs share once.

    Raises:
        UserError: something would keep a run from starting.
    """
    seen: set[str] = set()
    for run in runs:
        config = run.config
        key = json.dumps([plain(getattr(config, name)) for name in SEEN_BY_PREFLIGHT], sort_keys=True)
        if key in seen or not isinstance(config.task, TrainTask):
            continue
        seen.add(key)
        tell_placement(config)
        real = _with_files(config)
        if real is None:
            print("the demo's models are not there yet: the job makes them, and looks at them then", flush=True)
        else:
            print(f"ready: {check_inputs(real)}", flush=True)


def _with_files(config: Config) -> Any:
    """`config` with real paths; None where the demo has not been built."""
    if config.demo is None:
        return config
    folder = folder_of(config.demo)
    return with_real_paths(config, folder) if folder.is_dir() else None

"""Runs one job: prepares what it needs, keeps its record, and hands over to its task."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from opd_trainer.config import Config
from opd_trainer.demo.prepare import prepared
from opd_trainer.files import write_atomically
from opd_trainer.run_record import RunStatus, config_hash, plain, write_record
from opd_trainer.task.config import EvaluateTask, SftTask, TaskConfig, TrainTask
from opd_trainer.task.evaluate import evaluate
from opd_trainer.task.sft import sft
from opd_trainer.task.train import train
from opd_trainer.tracking.build import build_tracker
from opd_trainer.tracking.summary import Evaluated, Summary
from opd_trainer.tracking.tracker import Tracker

Task = Callable[[Config, Path, Tracker], Coroutine[Any, Any, None]]

TASKS: dict[type[TaskConfig], Task] = {TrainTask: train, SftTask: sft, EvaluateTask: evaluate}


def run(config: Config, output_dir: Path) -> float | None:
    """Runs the job in `output_dir` and returns what a sweep compares: mean held-out accuracy at the end, if measured.

    Raises:
        UserError: something that the user can fix.
    """
    # Megatron lists every parameter of every bucket at this level.
    logging.getLogger("megatron").setLevel(logging.WARNING)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(output_dir / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(config)))
    write_record(output_dir, config, RunStatus.running)
    try:
        summary = _run_task(config, prepared(config, run), output_dir)
    except BaseException:
        write_record(output_dir, config, RunStatus.failed)
        raise
    write_record(output_dir, config, RunStatus.finished)
    accuracies = summary.results.evaluation.get(Evaluated.after, {}).values()
    return sum(accuracies) / len(accuracies) if accuracies else None


def _run_task(asked: Config, config: Config, output_dir: Path) -> Summary:
    """Runs the task of `config`, which is `asked` with real paths."""
    tracker = build_tracker(
        config.tracking,
        output_dir,
        total_steps=config.steps,
        config_hash=config_hash(asked),
        run_config=plain(asked),
        title=config.name,
    )
    with tracker:
        asyncio.run(TASKS[type(config.task)](config, output_dir, tracker))
        return tracker.finish()

"""Runs one job: prepares what it needs, keeps its record, and hands over to its task."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from opd_trainer.config import Config
from opd_trainer.demo.prepare import prepared
from opd_trainer.errors import Interrupted
from opd_trainer.files import write_atomically
from opd_trainer.run_record import RunStatus, alone_in, config_hash, plain, write_record
from opd_trainer.task.config import (
    ConvertTask,
    DoctorTask,
    EvaluateTask,
    PreflightTask,
    ServeTask,
    ServeTeacherTask,
    SftTask,
    SummarizeTask,
    TaskConfig,
    TrainTask,
)
from opd_trainer.task.convert import convert
from opd_trainer.task.doctor import doctor
from opd_trainer.task.evaluate import evaluate
from opd_trainer.task.preflight import preflight
from opd_trainer.task.serve import serve, serve_teacher
from opd_trainer.task.sft import sft
from opd_trainer.task.summarize import summarize
from opd_trainer.task.train import train
from opd_trainer.tracking.build import build_tracker
from opd_trainer.tracking.summary import Evaluated, Summary
from opd_trainer.tracking.tracker import Tracker

Task = Callable[[Config, Path, Tracker], Coroutine[Any, Any, None]]

TASKS: dict[type[TaskConfig], Task] = {TrainTask: train, SftTask: sft, EvaluateTask: evaluate}

Tool = Callable[[Config, Path], Coroutine[Any, Any, None]]

TOOLS: dict[type[TaskConfig], Tool] = {
    ConvertTask: convert,
    DoctorTask: doctor,
    PreflightTask: preflight,
    SummarizeTask: summarize,
    ServeTeacherTask: serve_teacher,
    ServeTask: serve,
}
"""Tasks that measure nothing."""


def run(config: Config, output_dir: Path) -> float | None:
    """Runs the job in `output_dir` and returns what a sweep compares: mean held-out accuracy at the end, if measured.

    Raises:
        UserError: something that the user can fix.
    """
    # Megatron lists every parameter of every bucket at this level.
    logging.getLogger("megatron").setLevel(logging.WARNING)
    output_dir.mkdir(parents=True, exist_ok=True)
    with alone_in(output_dir):
        write_atomically(output_dir / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(config)))
        write_record(output_dir, config, RunStatus.running)
        try:
            with cpu_threads(config.cluster.threads):
                accuracy = _run_task(config, prepared(config, run), output_dir)
        except BaseException as error:
            status = RunStatus.interrupted if isinstance(error, Interrupted) else RunStatus.failed
            write_record(output_dir, config, status, error)
            raise
        write_record(output_dir, config, RunStatus.finished)
        return accuracy


@contextlib.contextmanager
def cpu_threads(number: int | None) -> Iterator[None]:
    """Limits torch to `number` CPU threads inside; None changes nothing."""
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run_task(asked: Config, config: Config, output_dir: Path) -> float | None:
    """Runs the task of `config`, which is `asked` with real paths; mean held-out accuracy at the end, if measured."""
    tool = TOOLS.get(type(config.task))
    if tool is not None:
        asyncio.run(tool(config, output_dir))
        return None
    accuracies = _track(asked, config, output_dir).results.evaluation.get(Evaluated.after, {}).values()
    return sum(accuracies) / len(accuracies) if accuracies else None


def _track(asked: Config, config: Config, output_dir: Path) -> Summary:
    """Runs a task that measures something."""
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

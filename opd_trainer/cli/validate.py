"""What a configuration as a whole must satisfy; all problems are reported together.

A rule sees the configuration and what the user named (the demo's own settings do not count as named). A module of
`rules` lists its rules by the tasks for which they hold: `ALWAYS` for every task that runs a model, `TRAINING` for
task=train, `CONVERTING` for task=convert, `SERVING` for task=serve and task=serve_teacher, `SUMMARIZING` for
task=summarize. A doctor sees whoever comes.
"""

from opd_trainer.cli.named import Named
from opd_trainer.cli.rules import (
    algorithms,
    clusters,
    filters,
    grading,
    inputs,
    layouts,
    ranges,
    rollouts,
    serving,
    sweeps,
    teaching,
    unused,
)
from opd_trainer.cli.rules.common import Rule
from opd_trainer.config import Config
from opd_trainer.errors import Problem
from opd_trainer.task.config import ConvertTask, DoctorTask, ServeTask, ServeTeacherTask, SummarizeTask, TrainTask

ALWAYS: tuple[Rule, ...] = (
    *inputs.ALWAYS,
    *clusters.ALWAYS,
    *layouts.ALWAYS,
    *ranges.ALWAYS,
    *serving.ALWAYS,
    *grading.ALWAYS,
)
CONVERTING: tuple[Rule, ...] = (*inputs.CONVERTING, *layouts.CONVERTING, *ranges.CONVERTING)
TRAINING: tuple[Rule, ...] = (
    *teaching.TRAINING,
    *algorithms.TRAINING,
    *filters.TRAINING,
    *rollouts.TRAINING,
    *unused.TRAINING,
)


def validate(config: Config, named: Named) -> list[Problem]:
    """Every problem that the rules find."""
    if isinstance(config.task, DoctorTask):
        return []
    # Every comparison with one of them is false, so that no other rule would mean anything.
    unknown = list(ranges.numbers_are_numbers(config, named))
    if unknown:
        return unknown
    if isinstance(config.task, ConvertTask):
        return [problem for rule in CONVERTING for problem in rule(config, named)]
    if isinstance(config.task, SummarizeTask):
        return [problem for rule in sweeps.SUMMARIZING for problem in rule(config, named)]
    if isinstance(config.task, ServeTask | ServeTeacherTask):
        return [problem for rule in serving.SERVING for problem in rule(config, named)]
    training = isinstance(config.task, TrainTask)
    rules = (*TRAINING, *ALWAYS) if training else ALWAYS
    return [problem for rule in rules for problem in rule(config, named)]

"""Servers of ours: what `task=serve_teacher` and `task=serve` need, and settings of servers that cannot work."""

from collections.abc import Iterator

from opd_trainer.cli.named import Named
from opd_trainer.cli.rules.common import DEMO_PREFIX, Rule, teachers
from opd_trainer.cli.rules.inputs import demo_paths
from opd_trainer.config import Config
from opd_trainer.errors import CheckpointError, Problem
from opd_trainer.model.folder import CheckpointKind, inspect
from opd_trainer.rollout.config import RolloutMode, SglangRollout
from opd_trainer.sglang.config import LaunchConfig
from opd_trainer.task.config import ServeTask, ServeTeacherTask
from opd_trainer.teacher.config import SglangManagedTeacher


def served_teacher(config: Config, named: Named) -> Iterator[Problem]:
    """task=serve_teacher without a managed teacher, or without something to serve."""
    if not isinstance(config.task, ServeTeacherTask):
        return
    if not isinstance(config.teacher, SglangManagedTeacher):
        why, fix = "its servers are launched as teacher.launch says", "Set teacher=sglang_managed"
        yield Problem("teacher", "not managed, with task=serve_teacher", why, fix)
    yield from _servable("teacher.load", config.teacher.load, config.teacher.ckpt_step)


def served_student(config: Config, named: Named) -> Iterator[Problem]:
    """task=serve without server settings, or without something to serve."""
    if not isinstance(config.task, ServeTask):
        return
    if not isinstance(config.rollout, SglangRollout):
        why, fix = "its servers are launched as rollout.launch says", "Set rollout=sglang"
        yield Problem("rollout", "not on servers, with task=serve", why, fix)
    elif config.rollout.urls:
        why, fix = "servers that run already need nobody to launch them", "Set rollout.urls=[]"
        yield Problem("rollout.urls", f"{list(config.rollout.urls)} with task=serve", why, fix)
    yield from _servable("model.load", config.model.load, config.model.ckpt_step)


def launches(config: Config, named: Named) -> Iterator[Problem]:
    """Numbers of server settings that have a smallest sensible value."""
    for key, launch in _launched(config):
        least: tuple[tuple[str, float, float], ...] = (
            ("servers", launch.servers, 1),
            ("tensor_parallel", launch.tensor_parallel, 1),
            ("max_restarts", launch.max_restarts, 0),
        )
        for name, value, smallest in least:
            if value < smallest:
                why = f"the smallest value that makes sense is {smallest}"
                yield Problem(f"{key}.{name}", str(value), why, f"Set {key}.{name}={smallest} or more")
        if not launch.hang_after_s > 0:
            why, fix = "a server needs time to answer", f"Set {key}.hang_after_s=300"
            yield Problem(f"{key}.hang_after_s", f"{launch.hang_after_s:g}", why, fix)
        needed = launch.servers * launch.tensor_parallel
        if launch.devices and len(launch.devices) < needed:
            why = f"{launch.servers} servers of {launch.tensor_parallel} GPUs each need {needed}"
            fix = f"Name {needed} GPUs, or set {key}.devices=[] to let SGLang choose"
            yield Problem(f"{key}.devices", str(list(launch.devices)), why, fix)


def shared_memory(config: Config, named: Named) -> Iterator[Problem]:
    """Servers that sleep while the student trains, and generate at the same time."""
    rollout = config.rollout
    if not isinstance(rollout, SglangRollout):
        return
    if rollout.release_memory and rollout.mode is RolloutMode.one_step_off:
        why = "the servers generate the next step's samples while the student trains"
        yield Problem("rollout.release_memory", "true with rollout.mode=one_step_off", why, "Set one of them back")
    if rollout.max_parity_gap is not None and not rollout.max_parity_gap > 0:
        why = "two engines are never equal to the last bit"
        fix = "Set rollout.max_parity_gap=0.2, or null not to look"
        yield Problem("rollout.max_parity_gap", f"{rollout.max_parity_gap:g}", why, fix)


def _launched(config: Config) -> Iterator[tuple[str, LaunchConfig]]:
    if isinstance(config.rollout, SglangRollout) and not config.rollout.urls:
        yield "rollout.launch", config.rollout.launch
    for key, teacher in teachers(config):
        if isinstance(teacher, SglangManagedTeacher):
            yield f"{key}.launch", teacher.launch


def _servable(key: str, load: str | None, ckpt_step: int | None) -> Iterator[Problem]:
    """What keeps SGLang from serving a path."""
    if load is None:
        yield Problem(key, "null", "there is nothing to serve", f"Set {key}=DIR, a Hugging Face folder or a run's")
        return
    if load.startswith(DEMO_PREFIX):
        return
    try:
        found = inspect(load, ckpt_step)
    except CheckpointError as error:
        yield Problem(key, load, str(error), f"Set {key}=DIR, a Hugging Face folder or a run's directory")
        return
    if found.kind is not CheckpointKind.huggingface:
        fix = f"First: launch.py task=convert task.format=huggingface task.source={found.path} task.target=DIR"
        yield Problem(key, f"{found.path}, a {found.kind} checkpoint", "SGLang serves Hugging Face folders", fix)


ALWAYS: tuple[Rule, ...] = (launches, shared_memory)
SERVING: tuple[Rule, ...] = (served_teacher, served_student, launches, demo_paths)

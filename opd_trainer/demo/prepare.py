"""Builds what `demo:` paths name, once per recipe: data, tokenizer, a teacher, and its early snapshot as student."""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

from opd_trainer.config import CheckpointConfig, Config
from opd_trainer.data.config import DataConfig
from opd_trainer.demo import arithmetic
from opd_trainer.demo.config import DemoConfig
from opd_trainer.errors import UserError
from opd_trainer.estimator.none import NoEstimator
from opd_trainer.eval.config import EvalConfig
from opd_trainer.model.config import ModelConfig
from opd_trainer.opd.config import OpdConfig, OpdType
from opd_trainer.reward.config import ExactReward
from opd_trainer.rollout.config import EmbeddedRollout
from opd_trainer.task.config import ConvertTask, DoctorTask, ServeTask, ServeTeacherTask, SftTask, SummarizeTask
from opd_trainer.tracking.config import WandbMode

SCHEME = "demo:"
RECIPE_VERSION = 1
"""Raised when the code behind a recipe changes what it builds."""

MODELS = {"teacher": "teacher", "student": "student"}
DATASETS = {"train": "data/train.jsonl", "heldout": "data/heldout.jsonl"}
FILES = MODELS | DATASETS
"""What a `demo:` path may name, and where it lies below the recipe's folder."""

ROLLOUT = EmbeddedRollout(max_prompt_tokens=16, max_response_tokens=48)
"""How the teacher is asked while it is trained. Like its reward it belongs to the recipe, whose models all runs share:
what the run that happens to build them asks for must not be in them. The engine is the one in this process: of a model
without weights there is nothing to serve."""

Node = TypeVar("Node")


def folder_of(demo: DemoConfig) -> Path:
    """Where everything of a recipe lies; its name changes with the recipe."""
    recipe = dataclasses.asdict(demo) | {"cache": "", "version": RECIPE_VERSION}
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    return Path(demo.cache) / f"arithmetic-{digest[:8]}"


def prepared(config: Config, train: Callable[[Config, Path], float | None]) -> Config:
    """`config` with every `demo:` path replaced by the real one, after building what is missing.

    Args:
        config: of the run; returned unchanged where it has no demo, or its task uses no model of the demo.
        train: runs a supervised job: (its configuration, its run directory).
    """
    if config.demo is None or not _is_asked_for(config):
        return config
    folder = folder_of(config.demo)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Several jobs of a sweep may want the same models at the same moment.
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if not folder.is_dir():
            print(
                f"demo: making {folder}, once: problems, a teacher trained on them, and its early snapshot as the "
                "student. What follows is the teacher's training",
                flush=True,
            )
            build(config, folder, train)
            print(f"demo: {folder} is made; now the run itself", flush=True)
    return with_real_paths(config, folder)


def _is_asked_for(config: Config) -> bool:
    """Whether the task reads anything of the demo; tasks that read one model may read another one."""
    match config.task:
        case ConvertTask():
            read = config.task.source
        case ServeTeacherTask():
            read = config.teacher.load
        case ServeTask():
            read = config.model.load
        case DoctorTask() | SummarizeTask():
            return False
        case _:
            return True
    return read is not None and read.startswith(SCHEME)


def build(config: Config, folder: Path, train: Callable[[Config, Path], float | None]) -> None:
    """Builds a recipe in a hidden folder and moves it into place once it is complete."""
    assert config.demo is not None
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    arithmetic.write_dataset(partial / "data", config.demo)
    arithmetic.save_tokenizer(partial / "tokenizer")
    accuracy = train(supervised(config, config.demo, partial), partial / "run")
    if accuracy is None or accuracy < config.demo.teacher_accuracy:
        raise UserError(
            f"the demo's teacher reached {accuracy} instead of {config.demo.teacher_accuracy} on held-out problems "
            f"within {config.demo.max_steps} steps (see {partial / 'run' / 'curves.png'}): raise demo.max_steps"
        )
    shutil.rmtree(partial / "run" / "checkpoints")
    os.replace(partial / "run" / "model", partial / "teacher")
    os.replace(partial / "run" / "snapshot", partial / "student")
    os.replace(partial, folder)


def supervised(config: Config, demo: DemoConfig, folder: Path) -> Config:
    """The supervised job that trains the teacher and, on the way, takes the student's snapshot."""
    return dataclasses.replace(
        config,
        name="demo",
        task=SftTask(
            batch_size=demo.batch_size,
            stop_accuracy=demo.teacher_accuracy,
            snapshot_accuracy=demo.student_accuracy,
        ),
        seed=demo.seed,
        steps=demo.max_steps,
        checkpoint=CheckpointConfig(every=0, keep=1),
        estimator=NoEstimator(),
        opd=OpdConfig(type=OpdType.off),
        teachers={},
        model=ModelConfig(huggingface=str(folder / "tokenizer"), architecture=demo.architecture),
        megatron=demo.megatron,
        data=DataConfig(path=str(folder / "data" / "train.jsonl")),
        reward=ExactReward(),
        rollout=ROLLOUT,
        eval=EvalConfig(
            every=demo.eval_every, datasets={"heldout": DataConfig(path=str(folder / "data" / "heldout.jsonl"))}
        ),
        tracking=dataclasses.replace(
            config.tracking, console_every=demo.eval_every, plot_every=0, wandb=WandbMode.disabled
        ),
        demo=None,
    )


def with_real_paths(node: Node, folder: Path) -> Node:
    """A copy of a configuration, with `demo:` paths replaced at every depth."""
    if isinstance(node, str) and node.startswith(SCHEME) and node.removeprefix(SCHEME) in FILES:
        return str(folder / FILES[node.removeprefix(SCHEME)])  # type: ignore[return-value]
    if isinstance(node, dict):
        return {key: with_real_paths(value, folder) for key, value in node.items()}  # type: ignore[return-value]
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        fields = {f.name: with_real_paths(getattr(node, f.name), folder) for f in dataclasses.fields(node) if f.init}
        return dataclasses.replace(node, **fields)
    return node

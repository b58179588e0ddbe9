"""Data, rewards and checkpoints that a run reads."""

from collections.abc import Iterator
from pathlib import Path

from opd_trainer.cli.named import Named
from opd_trainer.cli.rules.common import DEMO_PREFIX, Rule, files, teachers
from opd_trainer.config import Config
from opd_trainer.data.config import DataConfig, MixtureData
from opd_trainer.data.problems import data_problems
from opd_trainer.demo.prepare import DATASETS, MODELS
from opd_trainer.errors import CheckpointError, Problem
from opd_trainer.model.folder import inspect
from opd_trainer.opd.config import OpdType
from opd_trainer.reward.problems import reward_problems
from opd_trainer.task.config import ConvertTask, SftTask, TrainTask


def training_data(config: Config, named: Named) -> Iterator[Problem]:
    """There are prompts to train on."""
    if not isinstance(config.task, TrainTask | SftTask):
        return
    found = list(files("data", config.data))
    if not found:
        yield Problem(
            "data.datasets", "empty", "a mixture needs datasets to draw from", "Set data.datasets.NAME.path=FILE"
        )
    for key, data in found:
        yield from _file(key, data, "train")


def evaluation_data(config: Config, named: Named) -> Iterator[Problem]:
    """Every evaluation set has a file."""
    for name, dataset in config.eval.datasets.items():
        key = f"eval.datasets.{name}"
        if isinstance(dataset, MixtureData):
            why = "each held-out dataset has figures of its own"
            yield Problem(key, "a mixture", why, "Name its datasets one by one: eval.datasets.NAME.path=FILE")
        else:
            yield from _file(key, dataset, "evaluate")


def _file(key: str, data: DataConfig, purpose: str) -> Iterator[Problem]:
    if data.path is None:
        yield Problem(f"{key}.path", "null", f"there are no prompts to {purpose} on", f"Set {key}.path=FILE")
    elif not data.path.startswith(DEMO_PREFIX) and not Path(data.path).expanduser().exists():
        yield Problem(f"{key}.path", data.path, "there is no such file", f"Set {key}.path to a file that exists")


def datasets_can_work(config: Config, named: Named) -> Iterator[Problem]:
    """What datasets themselves know to be wrong."""
    if isinstance(config.task, TrainTask | SftTask):
        yield from data_problems(config.data, "data")
    for name, dataset in config.eval.datasets.items():
        yield from data_problems(dataset, f"eval.datasets.{name}")


def reward_can_work(config: Config, named: Named) -> Iterator[Problem]:
    """What rewards themselves know to be missing or wrong."""
    yield from reward_problems(config.reward)


def demo_paths(config: Config, named: Named) -> Iterator[Problem]:
    """`demo:` paths exist only where the demo's recipe is, and name what it builds."""
    paths = {f"{key}.load": getattr(config, key).load for key in ("model", "reference", "critic")}
    paths |= {f"{key}.load": teacher.load for key, teacher in teachers(config)}
    if isinstance(config.task, ConvertTask):
        paths["task.source"] = config.task.source
    datasets = [
        ("data", config.data),
        *((f"eval.datasets.{name}", data) for name, data in config.eval.datasets.items()),
    ]
    paths |= {f"{key}.path": data.path for whole, dataset in datasets for key, data in files(whole, dataset)}
    for key, path in paths.items():
        if path is None or not path.startswith(DEMO_PREFIX):
            continue
        if config.demo is None:
            yield Problem(
                key, repr(path), "only the demo's experiment builds it", "Set experiment=arithmetic, or a path"
            )
            continue
        built = [DEMO_PREFIX + name for name in (DATASETS if key.endswith(".path") else MODELS)]
        if path not in built:
            yield Problem(key, repr(path), "the demo builds no such thing", f"Set {key}={' or '.join(built)}")


def conversion(config: Config, named: Named) -> Iterator[Problem]:
    """A conversion needs a checkpoint to read, and a name for what it writes."""
    task = config.task
    if not isinstance(task, ConvertTask):
        return
    if task.source is None:
        yield Problem("task.source", "null", "there is nothing to convert", "Set task.source=DIR")
    else:
        yield from loadable("task.source", task.source, config.model.ckpt_step)
    if task.target is None:
        yield Problem("task.target", "null", "there is no place to write to", "Set task.target=DIR")
    elif Path(task.target).expanduser().exists():
        yield Problem("task.target", task.target, "it exists, and a conversion overwrites nothing", "Set a new folder")
    if config.model.load is not None and "model.load" in named:
        yield Problem("model.load", config.model.load, "a conversion reads task.source", "Set task.source instead")


def loadable(key: str, path: str | None, ckpt_step: int | None) -> Iterator[Problem]:
    """What keeps a model from being loaded from a path."""
    if path is None or path.startswith(DEMO_PREFIX):
        return
    try:
        inspect(path, ckpt_step)
    except CheckpointError as error:
        what, _, rest = str(error).removeprefix(f"{path}: ").partition(": ")
        why, _, fix = rest.rpartition(". ")
        yield Problem(key, f"{path}: {what}", why, fix)


def checkpoints_exist(config: Config, named: Named) -> Iterator[Problem]:
    """Every path that a model is to be loaded from holds a checkpoint."""
    loads: list[tuple[str, str | None, int | None]] = [("model", config.model.load, config.model.ckpt_step)]
    if isinstance(config.task, TrainTask):
        if config.opd.type is OpdType.megatron:
            loads += [(key, teacher.load, teacher.ckpt_step) for key, teacher in teachers(config)]
        if config.reference.used:
            loads.append(("reference", config.reference.load, config.reference.ckpt_step))
        if config.estimator.critic_loss is not None:
            loads.append(("critic", config.critic.load, None))
    for key, path, ckpt_step in loads:
        yield from loadable(f"{key}.load", path, ckpt_step)


def student_has_tokenizer(config: Config, named: Named) -> Iterator[Problem]:
    """Text needs a tokenizer, which comes from the model's folder."""
    if config.model.load is None and config.model.huggingface is None:
        yield Problem(
            "model.load",
            "null",
            "there are no weights and no tokenizer",
            "Set model.load=DIR, or model.huggingface=DIR to train from scratch with the tokenizer in there",
        )


ALWAYS: tuple[Rule, ...] = (
    training_data,
    evaluation_data,
    datasets_can_work,
    reward_can_work,
    demo_paths,
    checkpoints_exist,
    student_has_tokenizer,
)
CONVERTING: tuple[Rule, ...] = (conversion, demo_paths)

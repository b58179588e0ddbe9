"""`task=convert`: rewrites a model in another format, checks the result, and only then gives it its name."""

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path

from opd_trainer.build.workers import Workers
from opd_trainer.config import Config
from opd_trainer.errors import CheckpointError, OpdError
from opd_trainer.files import publish, write_atomically
from opd_trainer.megatron.conversion import Comparison, ConversionSpec
from opd_trainer.megatron.source import lossless_dtype
from opd_trainer.model.config import Dtype, ModelConfig
from opd_trainer.model.folder import LATEST, RELEASE, CheckpointKind, inspect
from opd_trainer.task.config import ConvertFormat, ConvertTask

REPORT = "conversion.json"


async def convert(config: Config, output_dir: Path) -> None:
    """Writes `task.target` from `task.source`, and the comparison of the two to `output_dir`/conversion.json.

    Raises:
        CheckpointError: the source cannot be read, or the target exists.
        OpdError: the target, read back, is not the source.
    """
    assert isinstance(config.task, ConvertTask)
    task = config.task
    assert task.source is not None, "checked with the configuration"
    assert task.target is not None, "checked with the configuration"
    target = Path(task.target).expanduser().absolute()
    refuse_existing(target)
    model = ModelConfig(
        load=task.source,
        ckpt_step=config.model.ckpt_step,
        huggingface=config.model.huggingface,
        attention_backend=config.model.attention_backend,
        dtype=task.dtype or lossless_dtype(inspect(task.source, config.model.ckpt_step)),
    )
    spec = ConversionSpec(model=model, megatron=config.megatron, format=CheckpointKind(task.format))
    partial = target.with_name(f".partial_{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    weights = weights_folder(partial, task.format)
    weights.mkdir(parents=True)
    workers = Workers(config).training(spec.make_worker)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(workers.close)
        await workers.start()
        await workers.call("write", weights)
        comparison: Comparison = (await workers.call("compare", weights))[0]
    write_atomically(output_dir / REPORT, report(comparison, model.dtype, task))
    if comparison.wrong:
        shutil.rmtree(partial)
        raise OpdError(
            f"{target}: not written: read back, {len(comparison.wrong)} of {comparison.tensors} tensors are not those "
            f"of {task.source}: {', '.join(comparison.wrong[:5])}. This is a defect of the conversion: please report it"
        )
    refuse_existing(target)
    publish(partial, target)
    print(told(comparison, model.dtype, task))


def refuse_existing(target: Path) -> None:
    """A conversion overwrites nothing.

    Raises:
        CheckpointError: the target exists.
    """
    if target.exists():
        raise CheckpointError(
            f"{target}: exists already: a conversion overwrites nothing. Set task.target to a new folder"
        )


def weights_folder(target: Path, target_format: ConvertFormat) -> Path:
    """Where in the target the weights go: by Megatron-LM's conventions below a marker, which this writes."""
    if target_format is ConvertFormat.huggingface:
        return target
    target.mkdir(parents=True)
    write_atomically(target / LATEST, RELEASE)
    return target / RELEASE


def report(comparison: Comparison, dtype: Dtype, task: ConvertTask) -> str:
    """What was converted and how equal it is, as JSON."""
    settings = {"source": task.source, "target": task.target, "format": task.format, "dtype": dtype}
    return json.dumps(settings | dataclasses.asdict(comparison), indent=2) + "\n"


def told(comparison: Comparison, dtype: Dtype, task: ConvertTask) -> str:
    """The same for the user."""
    equal = "all equal bit for bit, read back"
    if comparison.changed:
        equal = (
            f"{comparison.changed} of them rounded from {', '.join(comparison.dtypes)} to {dtype}, "
            f"max abs difference {comparison.max_abs_difference:.3g}"
        )
    return f"{task.target}: {task.format}, {comparison.tensors} tensors, {comparison.parameters:,} parameters: {equal}"

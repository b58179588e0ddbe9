"""Converts weights between formats and layouts, and proves it: what was written is read back and compared.

A plain class, like the training worker: nothing in here knows what runs it, and every method is collective.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from opd_trainer.errors import OpdError
from opd_trainer.megatron.build import MegatronModel, build_model
from opd_trainer.megatron.checkpoint import save_weights
from opd_trainer.megatron.config import MegatronConfig
from opd_trainer.megatron.families.base import weight_rules
from opd_trainer.megatron.huggingface import (
    SafetensorsReader,
    describe,
    export_hf_weights,
    save_hf_folder,
    tensor_files,
)
from opd_trainer.megatron.runtime import MegatronRuntime
from opd_trainer.megatron.source import architecture_of, config_folder, fill_model
from opd_trainer.model.config import ModelConfig
from opd_trainer.model.folder import Checkpoint, CheckpointKind, inspect


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionSpec:
    """What a conversion worker is told; picklable.

    Attributes:
        model: the source, with the dtype to write.
        megatron: the layout of the workers.
        format: to write: huggingface or torch_dist.
    """

    model: ModelConfig
    megatron: MegatronConfig
    format: CheckpointKind

    def make_worker(self, rank: int, world_size: int, rendezvous: str) -> "ConversionWorker":
        """The worker of `rank`."""
        return ConversionWorker(self, rank, world_size, rendezvous)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A source against what was written of it, under Hugging Face names.

    Attributes:
        tensors: how many there are.
        parameters: numbers in them.
        dtypes: of the source's tensors.
        changed: tensors with a number that the dtype that was written cannot hold; 0 unless it is a narrower one.
        wrong: names of tensors that differ from the source in the dtype that was written, in a single bit or more.
        max_abs_difference: between source and target, over all tensors.
    """

    tensors: int
    parameters: int
    dtypes: tuple[str, ...]
    changed: int
    wrong: tuple[str, ...]
    max_abs_difference: float


@dataclass(slots=True)
class _Comparing:
    """Builds a `Comparison` tensor by tensor."""

    tensors: int = 0
    parameters: int = 0
    dtypes: set[str] = field(default_factory=set)
    changed: int = 0
    wrong: list[str] = field(default_factory=list)
    max_abs_difference: float = 0.0

    def add(self, name: str, source: Tensor, written: Tensor) -> None:
        """Compares one tensor."""
        self.tensors += 1
        self.parameters += source.numel()
        self.dtypes.add(str(source.dtype).removeprefix("torch."))
        if not torch.equal(source.to(written.dtype), written):
            self.wrong.append(name)
        elif not torch.equal(source.float(), written.float()):
            self.changed += 1
            difference = (source.float() - written.float()).abs().max()
            self.max_abs_difference = max(self.max_abs_difference, float(difference))

    def result(self) -> Comparison:
        """What was found."""
        return Comparison(
            tensors=self.tensors,
            parameters=self.parameters,
            dtypes=tuple(sorted(self.dtypes)),
            changed=self.changed,
            wrong=tuple(self.wrong),
            max_abs_difference=self.max_abs_difference,
        )


class ConversionWorker:
    """See the module.

    Args:
        spec: what to convert.
        rank: of this worker.
        world_size: number of workers.
        rendezvous: where they meet (a torch.distributed init method).
    """

    def __init__(self, spec: ConversionSpec, rank: int, world_size: int, rendezvous: str) -> None:
        self._spec = spec
        self._runtime = MegatronRuntime(rank, world_size, rendezvous, spec.megatron, seed=0)
        self._model: MegatronModel | None = None

    def start(self) -> None:
        """Joins the other workers and reads the source.

        Raises:
            UserError: it cannot be read.
        """
        self._runtime.start()
        self._model = self._filled(self._source)

    def close(self) -> None:
        """Frees everything. Safe to call twice, or before `start`."""
        self._model = None
        self._runtime.close()

    @property
    def _source(self) -> Checkpoint:
        assert self._spec.model.load is not None, "a conversion has a source"
        return inspect(self._spec.model.load, self._spec.model.ckpt_step)

    def _filled(self, checkpoint: Checkpoint) -> MegatronModel:
        """The source's model with the weights of `checkpoint`; NaN where those give nothing."""
        spec = self._spec
        model = build_model(
            self._runtime, architecture_of(spec.model, None), spec.model, spec.megatron, trainable=False
        )
        with torch.no_grad():
            for _, parameter in model.parameters():
                parameter.fill_(torch.nan)
        fill_model(model, checkpoint)
        return model

    def write(self, directory: Path) -> None:
        """Writes the model into `directory`, which exists and is empty."""
        model, folder = self._started(), config_folder(self._spec.model)
        if self._spec.format is CheckpointKind.huggingface:
            save_hf_folder(model, directory, folder)
            return
        save_weights(directory, model)
        if self._runtime.rank == 0:
            describe(model, directory, folder)

    def compare(self, directory: Path) -> Comparison | None:
        """Reads back what `write` has written and compares it with the source; the result is rank 0's."""
        written = self._filled(inspect(directory))
        comparing = _Comparing()
        with ExitStack() as stack:
            source = self._source_tensors(stack)
            # Every rank exports, because exporting is collective; only rank 0 compares.
            for (name, ours), (_, theirs) in zip(source, export_hf_weights(written), strict=True):
                if self._runtime.rank == 0:
                    comparing.add(name, ours.to(theirs.device), theirs)
        return comparing.result() if self._runtime.rank == 0 else None

    def _source_tensors(self, stack: ExitStack) -> Iterator[tuple[str, Tensor]]:
        """The source: of a Hugging Face folder its own tensors, not what the model has made of them."""
        model, source = self._started(), self._source
        if source.kind is not CheckpointKind.huggingface:
            return export_hf_weights(model)
        reader = stack.enter_context(SafetensorsReader(tensor_files(source.path)))
        return ((name, reader.read(name)) for rule in weight_rules(model.architecture) for name in rule.huggingface)

    def _started(self) -> MegatronModel:
        if self._model is None:
            raise OpdError("the conversion worker is not started, or is closed")
        return self._model

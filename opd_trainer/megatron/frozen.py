"""Models that are never trained and score beside the student, teachers and the reference, by where their weights live.

resident: on the device. offload: on the host, and on the device while they score. swap: on the host, and in the
student's own module while they score.
"""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from opd_trainer.errors import ShapeMismatch
from opd_trainer.megatron.build import MegatronModel
from opd_trainer.megatron.config import Placement
from opd_trainer.megatron.host_weights import HostWeights
from opd_trainer.megatron.huggingface import export_hf_weights
from opd_trainer.megatron.live_weights import LiveWeights, interchangeable
from opd_trainer.megatron.micro_batch import MicroBatch, Scoring, score
from opd_trainer.megatron.offload import OffloadedWeights
from opd_trainer.megatron.optimizer import has_gradient_buffers
from opd_trainer.megatron.runtime import MegatronRuntime
from opd_trainer.megatron.source import load_model
from opd_trainer.model.config import ModelConfig


class FrozenModel(Protocol):
    """A model that scores, wherever its weights are between uses."""

    @property
    def model(self) -> MegatronModel:
        """What computes; its parameters are its own inside of `ready` only."""
        ...

    def ready(self) -> AbstractContextManager[None]:
        """Its weights are where they can compute inside; not to be entered twice at once."""
        ...

    @property
    def scoring(self) -> Scoring:
        """How log-probs are computed."""
        ...

    def require_ready(self) -> None:
        """Nothing, inside of `ready`.

        Raises:
            OpdError: outside of `ready`.
        """
        ...

    def score(self, micro_batch: MicroBatch) -> Tensor:
        """Log-probs f32[T] of a micro-batch, NaN where the mask is False; see `micro_batch.score`. Inside of `ready`.

        Raises:
            OpdError: outside of `ready`.
        """
        ...

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """Its weights as (Hugging Face name, full tensor); collective. Needs no `ready`, and never enters it."""
        ...


@dataclass(frozen=True, slots=True)
class ResidentModel:
    """A `FrozenModel` whose weights stay on the device.

    Attributes:
        model: its weights.
        scoring: how log-probs are computed.
    """

    model: MegatronModel
    scoring: Scoring

    def ready(self) -> AbstractContextManager[None]:
        """Always."""
        return contextlib.nullcontext()

    def require_ready(self) -> None:
        """See `FrozenModel`."""

    def score(self, micro_batch: MicroBatch) -> Tensor:
        """See `FrozenModel`."""
        return score(self.model, micro_batch, self.scoring)

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """See `FrozenModel`."""
        return export_hf_weights(self.model)


@dataclass(frozen=True, slots=True)
class OffloadedModel:
    """A `FrozenModel` whose weights are on the host between uses.

    Attributes:
        model: without weights outside of `ready`.
        scoring: how log-probs are computed.
        weights: bring them to the device.
    """

    model: MegatronModel
    scoring: Scoring
    weights: OffloadedWeights

    def ready(self) -> AbstractContextManager[None]:
        """See `FrozenModel`."""
        return self.weights.on_device()

    def require_ready(self) -> None:
        """See `FrozenModel`."""
        self.weights.require_on_device()

    def score(self, micro_batch: MicroBatch) -> Tensor:
        """See `FrozenModel`."""
        self.require_ready()
        return score(self.model, micro_batch, self.scoring)

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """See `FrozenModel`."""
        return _export_from_host(self.model, self.weights.host)


@dataclass(frozen=True, slots=True)
class SwappedModel:
    """A `FrozenModel` that borrows the student's module.

    Attributes:
        name: as owner of the live weights.
        live: the student's module.
        scoring: how log-probs are computed.
        host: its weights while the student's are live, and the student's while its own are.
    """

    name: str
    live: LiveWeights
    scoring: Scoring
    host: HostWeights

    @property
    def model(self) -> MegatronModel:
        """The student's."""
        return self.live.model

    def ready(self) -> AbstractContextManager[None]:
        """See `FrozenModel`."""
        return self.live.lent(self.name, self.host)

    def require_ready(self) -> None:
        """See `FrozenModel`."""
        self.live.require(self.name, "scoring")

    def score(self, micro_batch: MicroBatch) -> Tensor:
        """See `FrozenModel`."""
        self.require_ready()
        return score(self.model, micro_batch, self.scoring)

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """See `FrozenModel`."""
        return _export_from_host(self.model, self.host)


def load_frozen(
    placement: Placement,
    name: str,
    live: LiveWeights,
    settings: ModelConfig,
    scoring: Scoring,
) -> FrozenModel:
    """Loads a model with the architecture of its own checkpoint, without gradient or optimizer buffers.

    Args:
        placement: where its weights live.
        name: of the model, "reference" or "teacher:<name>".
        live: the student's module.
        settings: of the model.
        scoring: how log-probs are computed.

    Raises:
        UserError: it cannot be loaded, or does not fit the student's module that it is to borrow.
    """
    resident = load_resident(live.model.runtime, settings, scoring)
    match placement:
        case Placement.resident:
            return resident
        case Placement.offload:
            return OffloadedModel(resident.model, scoring, OffloadedWeights(resident.model))
        case Placement.swap:
            _check_interchangeable(name, live.model, resident.model)
            host = HostWeights.of(resident.model).under(resident.model, live.model)
            return SwappedModel(name, live, scoring, host)


def load_resident(runtime: MegatronRuntime, settings: ModelConfig, scoring: Scoring) -> ResidentModel:
    """Loads a model that stays on the device, in the parallel layout of `runtime`.

    Raises:
        UserError: it cannot be loaded.
    """
    model = load_model(runtime, settings, runtime.settings, vocab_size=None, trainable=False).model
    assert not any(has_gradient_buffers(module) for module in model.modules), "a frozen model has no gradients"
    return ResidentModel(model, scoring)


def _check_interchangeable(name: str, student: MegatronModel, other: MegatronModel) -> None:
    """Two models may share a module when they compute the same function of their parameters."""
    if not interchangeable(student.architecture, other.architecture) or student.dtype is not other.dtype:
        raise ShapeMismatch(
            f"{name}: {other.architecture} in {other.dtype} cannot take the place of the student's "
            f"{student.architecture} in {student.dtype}: one module serves both. Choose the placement offload"
        )


def _export_from_host(model: MegatronModel, host: HostWeights) -> Iterator[tuple[str, Tensor]]:
    device = model.runtime.device
    return export_hf_weights(model, lambda parameter: host[parameter].to(device))

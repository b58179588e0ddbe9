"""The weights that the student's module holds, and whose they are."""

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from opd_trainer.errors import OpdError
from opd_trainer.megatron.build import MegatronModel
from opd_trainer.megatron.families.base import Architecture
from opd_trainer.megatron.host_weights import HostWeights

STUDENT = "student"


class LiveWeights:
    """The student's module and its owner of the moment: "student", or the model that it is lent to.

    Args:
        model: the student's; its optimizer and gradient buffers are never touched here.
    """

    def __init__(self, model: MegatronModel) -> None:
        self.model = model
        self._owner = STUDENT

    @property
    def owner(self) -> str:
        """Whose weights the module holds."""
        return self._owner

    def require(self, owner: str, purpose: str) -> None:
        """Refuses to go on with the wrong weights.

        Args:
            owner: whose weights are needed.
            purpose: what for, for the message.

        Raises:
            OpdError: the module holds those of another one.
        """
        if self._owner != owner:
            raise OpdError(
                f"{purpose} needs the weights of {owner}, and the module holds those of {self._owner}: a swap goes on"
            )

    @contextlib.contextmanager
    def lent(self, owner: str, weights: HostWeights) -> Iterator[None]:
        """Exchanges the student's weights for those of `owner`; the student's are back afterwards whatever happens.

        While they are away the student's weights are in the tensors of `weights`. Extra memory on the device: one
        parameter. Values are copied, so that both come back bit for bit.

        Raises:
            OpdError: the module is lent already.
        """
        self.require(STUDENT, f"lending the module to {owner}")
        exchanged: list[tuple[Tensor, Tensor]] = []
        halfway: tuple[Tensor, Tensor] | None = None
        self._owner = owner
        try:
            for parameter, host in weights.tensors.items():
                halfway = (parameter, parameter.detach().clone())
                _exchange(parameter, host, halfway[1])
                exchanged.append((parameter, host))
                halfway = None
            yield
        finally:
            for parameter, host in exchanged:
                _exchange(parameter, host, parameter.detach().clone())
            if halfway is not None:
                _copy(halfway[0], halfway[1])
            if self.model.runtime.device.type == "cuda":
                # What is on the host may be read only when the copies have arrived.
                torch.cuda.current_stream(self.model.runtime.device).synchronize()
            self._owner = STUDENT


def _exchange(parameter: Tensor, host: Tensor, own: Tensor) -> None:
    """Exchanges values; `own` is a copy of the parameter's."""
    _copy(parameter, host)
    _copy(host, own)


@torch.no_grad()
def _copy(target: Tensor, source: Tensor) -> None:
    target.copy_(source, non_blocking=True)


def interchangeable(ours: Architecture, theirs: Architecture) -> bool:
    """Whether two models compute the same function of their parameters, so that one module can serve both."""
    return dataclasses.replace(ours, max_length=theirs.max_length) == theirs

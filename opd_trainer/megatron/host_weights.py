"""A model's weights in host memory: pinned where there is a GPU, so that copies run beside computation."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from opd_trainer.megatron.build import MegatronModel


@dataclass(frozen=True, slots=True)
class HostWeights:
    """Tensors on the host, by the parameter whose values they are."""

    tensors: Mapping[Tensor, Tensor]

    @classmethod
    def of(cls, model: MegatronModel) -> Self:
        """Copies of a model's parameters."""
        on_gpu = model.runtime.device.type == "cuda"
        parameters = [parameter for module in model.modules for parameter in module.parameters()]
        copies = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
        return cls(dict(zip(parameters, [t.pin_memory() if on_gpu else t for t in copies], strict=True)))

    def under(self, names_from: MegatronModel, model: MegatronModel) -> Self:
        """The same tensors for the parameters of `model` that have the names of those of `names_from`."""
        pairs = zip(names_from.modules, model.modules, strict=True)
        return type(self)(
            {
                ours.get_parameter(name): self.tensors[p]
                for theirs, ours in pairs
                for name, p in theirs.named_parameters()
            }
        )

    def __getitem__(self, parameter: Tensor) -> Tensor:
        """The host tensor of a parameter."""
        return self.tensors[parameter]

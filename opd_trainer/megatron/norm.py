"""RMSNorm for layers without Transformer Engine."""

from typing import Any

from torch import nn


class Norm(nn.RMSNorm):
    """torch's RMSNorm as Megatron's layer spec wants it; unlike Megatron's wrapper it allows sequence parallelism."""

    def __init__(self, config: Any, hidden_size: int, eps: float, **_unused: Any) -> None:
        """Without values: `opd_trainer.megatron.build` sets the weights of all modules.

        Args:
            config: the layer's transformer config.
            hidden_size: width of what is normalised.
            eps: added to the mean square.
            _unused: what Megatron gives to norms of other kinds.
        """
        super().__init__(hidden_size, eps=eps)
        # Megatron then sums the gradients of tensor-parallel ranks, which see different tokens.
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010  (pyright knows no such field)

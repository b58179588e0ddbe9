"""The output head of a value model: one number for each position."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class ValueHead(nn.Module):
    """Takes the place of Megatron's output layer; every tensor-parallel rank has all of it.

    M = positions, E = hidden size.
    """

    def __init__(self, hidden_size: int) -> None:
        """Without values: `opd_trainer.megatron.build` sets the weights of all modules."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, hidden_size))

    def forward(self, hidden: Tensor, weight: None = None) -> tuple[Tensor, None]:
        """Values f32[M, 1, 1] of hidden states [M, 1, E], and no bias, as Megatron's layers return them."""
        assert weight is None, "a value head is never tied to the embedding"
        return functional.linear(hidden.float(), self.weight.float()), None

"""SwiGLU for layers without Transformer Engine."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class _SwiGlu(torch.autograd.Function):
    """Keeps its input alone: autograd would keep the gate's SiLU and a copy of the other half as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,), (gradient,) = ctx.saved_tensors, gradients
        gate, up = x.chunk(2, dim=-1)
        result = torch.empty_like(x)
        of_gate, of_up = result.chunk(2, dim=-1)
        torch.mul(gradient, F.silu(gate), out=of_up)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=of_gate)
        return result


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up, [..., F] for x [..., 2F] with the gates first (arXiv 2002.05202, eq. 6)."""
    return _SwiGlu.apply(x)  # pyright: ignore[reportReturnType]

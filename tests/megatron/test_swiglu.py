import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from opd_trainer.megatron.swiglu import swiglu


def plain(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def drawn(dtype: torch.dtype) -> Tensor:
    return torch.randn(7, 1, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_the_gradient_is_that_of_finite_differences() -> None:
    assert torch.autograd.gradcheck(swiglu, drawn(torch.float64).requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_gradient_are_autograds_to_the_bit(dtype: torch.dtype) -> None:
    found, expected = (drawn(dtype).requires_grad_() for _ in range(2))
    weights = drawn(dtype)[..., :6]
    for x, function in ((found, swiglu), (expected, plain)):
        y = function(x)
        (y * weights).sum().backward()
    assert torch.equal(swiglu(found), plain(expected))
    assert found.grad is not None
    assert expected.grad is not None
    assert torch.equal(found.grad, expected.grad)


def test_nothing_but_the_input_is_kept() -> None:
    kept: list[Tensor] = []
    x = drawn(torch.float32).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        swiglu(x)
    assert [tensor.data_ptr() for tensor in kept] == [x.data_ptr()]

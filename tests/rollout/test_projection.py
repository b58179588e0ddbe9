import pytest
import torch
from torch.nn import functional as F

from opd_trainer.rollout.embedded.projection import Projection, packs

N, IN, OUT = 5, 96, 160
NEEDS_PACKING = pytest.mark.skipif(
    not packs(torch.zeros(2, 2, dtype=torch.bfloat16)), reason="oneDNN has no products in bfloat16 on this processor"
)


def drawn(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size))).to(dtype)


def ready(dtype: torch.dtype = torch.bfloat16, *, bias: bool = True, shared: bool = False) -> Projection:
    projection = Projection(drawn(OUT, IN, dtype=dtype), drawn(OUT, dtype=dtype) if bias else None, shared=shared)
    projection.pack()
    return projection


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product_and_sum(dtype: torch.dtype, bias: bool) -> None:
    weight, x, hidden = drawn(OUT, IN, dtype=dtype), drawn(N, IN, dtype=dtype), drawn(N, OUT, dtype=dtype)
    projection, before = ready(dtype, bias=bias), hidden.clone()
    product = x.double() @ weight.double().t() + (drawn(OUT, dtype=dtype).double() if bias else 0.0)
    tolerance = 1e-5 if dtype is torch.float32 else 2**-8
    torch.testing.assert_close(projection(x).double(), product, rtol=tolerance, atol=tolerance * 20)
    total = projection.added(hidden, x)
    torch.testing.assert_close(total.double(), product + hidden.double(), rtol=tolerance, atol=tolerance * 20)
    assert torch.equal(hidden, before)


@NEEDS_PACKING
def test_packing_gives_the_plain_matrix_back() -> None:
    assert ready().weight.untyped_storage().nbytes() == 0
    assert ready(shared=True).weight.untyped_storage().nbytes() == OUT * IN * 2


@NEEDS_PACKING
def test_packing_does_not_change_a_bit() -> None:
    x, hidden = drawn(N, IN), drawn(N, OUT)
    assert torch.equal(ready(bias=False)(x), F.linear(x, drawn(OUT, IN)))
    assert torch.equal(ready(bias=False).added(hidden, x), torch.addmm(hidden, x, drawn(OUT, IN).t()))


def test_new_values_take_the_place_of_the_old_ones() -> None:
    projection, x = ready(), drawn(N, IN)
    old = projection(x)
    projection.unpack()
    view = projection.weight[: OUT // 2]
    projection.weight.copy_(drawn(OUT, IN))
    view.zero_()
    projection.pack()
    new = projection(x)
    assert torch.equal(new[:, OUT // 2 :], old[:, OUT // 2 :])
    assert torch.equal(new[:, : OUT // 2], drawn(OUT)[: OUT // 2].expand(N, -1))


def test_single_precision_is_left_as_it_is() -> None:
    """Its products run on plain matrices, and are as fast."""
    assert not packs(torch.zeros(2, 2))
    assert ready(torch.float32).weight.untyped_storage().nbytes() == OUT * IN * 4

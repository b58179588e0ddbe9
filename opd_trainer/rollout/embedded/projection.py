"""One matrix of the decoder and how it multiplies."""

import torch
from torch import Tensor
from torch.nn import functional as F


class Projection:
    """x W^T + b; `weight` is filled while `unpack` was called last, and used after `pack`.

    oneDNN keeps matrices in blocks. Given a plain one in bfloat16 on a CPU it rearranges it in every call, which takes
    as long as the product itself for the few rows of a decoding step. So there the matrix is arranged once and the
    plain one given back; results are the same to the bit.

    Args:
        weight: [out, in].
        bias: [out], or None.
        shared: somebody else reads `weight` (a tied embedding), so that it is never given back.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, shared: bool = False) -> None:
        self.weight, self.bias, self._shared = weight, bias, shared
        self._bytes = weight.untyped_storage().nbytes()
        self._packs = packs(weight)
        self._packed: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """[N, out] for x [N, in]."""
        if self._packed is None:
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")

    def added(self, hidden: Tensor, x: Tensor) -> Tensor:
        """`hidden` [N, out] and the product for x [N, in], added up before they are rounded."""
        if self._packed is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(x, hidden, self._packed, self.bias, "add")
        total = torch.addmm(hidden, x, self.weight.t())
        return total if self.bias is None else total.add_(self.bias)

    def pack(self) -> None:
        """Makes the matrix ready for use."""
        if not self._packs:
            return
        self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, None)
        if not self._shared:
            self.weight.untyped_storage().resize_(0)

    def unpack(self) -> None:
        """Makes `weight` writable; its values are to come."""
        self._packed = None
        self.weight.untyped_storage().resize_(self._bytes)


def packs(weight: Tensor) -> bool:
    """Whether products with this matrix are oneDNN's and in bfloat16."""
    on_cpu = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    return on_cpu and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
